"""The module of a source, for training; a source that holds only a graph has no module."""

from typing import TYPE_CHECKING, Any

from qcompress.sources.arch import module_of_state_dict
from qcompress.sources.base import Source, SourceOptions

if TYPE_CHECKING:
    import torch


def module_of(source: Source, options: SourceOptions, *, untrained: bool = False) -> "torch.nn.Module | None":
    """Return the module that `--arch` builds with the source's tensors, or the one that the source holds, or None.

    Args:
        source: the opened MODEL.
        options: how it was opened.
        untrained: whether the module of `--arch` keeps the tensors that it was built with.

    Raises:
        SourceError: the module cannot be built or loaded.
    """
    if options.arch is not None:
        if untrained:
            from qcompress.user_code import build_module

            return build_module(options.arch, options.arch_kwargs)
        return module_of_state_dict(source.tensors(), options, source.label)
    found: Any = getattr(source, "module", None)
    return None if found is None or not getattr(source, "holds_module", False) else found()
