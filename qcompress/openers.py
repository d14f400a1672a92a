"""Turns a path or an object into a Source. The kinds of files are in one table, which callers can replace."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from qcompress.compressed.source import CompressedSource
from qcompress.errors import DependencyError, SourceError, UnsafeFileError
from qcompress.sources.base import Source, SourceOptions
from qcompress.sources.detect import DESCRIPTIONS, Content, content_of
from qcompress.sources.pickles.checkpoint import CheckpointSource
from qcompress.sources.pt2.archive import ExportedSource
from qcompress.sources.safetensors_file import SafetensorsSource


@dataclass(frozen=True, slots=True)
class Opener:
    """One kind of file.

    Args:
        name: the kind's name, for messages.
        accepts: returns whether a file or folder is of this kind, judged by its content.
        open: returns its Source.
    """

    name: str
    accepts: Callable[[Path], bool]
    open: Callable[[Path, SourceOptions], Source]


def _is(*contents: Content) -> Callable[[Path], bool]:
    return lambda path: content_of(path) in contents


def _legacy(path: Path, options: SourceOptions) -> Source:
    return CheckpointSource(path, options, legacy=True)


def _trained(path: Path, options: SourceOptions) -> Source:
    return ExportedSource(path / "model.pt2", options)


# The table of kinds of files. To add one, write a module with a Source and add a line here, or in the caller's table.
DEFAULT_OPENERS: Final[tuple[Opener, ...]] = (
    Opener(".safetensors", _is("safetensors"), SafetensorsSource),
    Opener("exported program", _is("exported"), ExportedSource),
    Opener("torch checkpoint", _is("checkpoint"), CheckpointSource),
    Opener("torch checkpoint before 1.6", _is("legacy_checkpoint"), _legacy),
    Opener("compressed model", _is("compressed_folder"), CompressedSource),
    Opener("training run without quantizers", _is("float_folder"), _trained),
)

# Models of kinds that qcompress cannot read.
_OTHER_MODELS: Final[tuple[Content, ...]] = ("torchscript", "old_exported", "tar_checkpoint", "onnx")

_ADVICE: Final[dict[Content, str]] = {
    "empty": "Copy or save the model again.",
    "old_exported": "Load it with the torch that wrote it and save it again with a newer one.",
    "torchscript": "Export the module itself: torch.export.save(torch.export.export(model, (x,)), 'model.pt2').",
    "tar_checkpoint": "Load it with the torch that wrote it and save model.state_dict() again.",
    "zip": "Pass the model file itself.",
    "folder": "Pass a model file in it.",
    "onnx": "Pass the PyTorch model that it was made from.",
    "text": "Pass a model file: .pt2, .pt or .safetensors.",
    "unknown": "Pass a model file: .pt2, .pt or .safetensors.",
}


def load_source(
    model: object, *, openers: Sequence[Opener] = DEFAULT_OPENERS, options: SourceOptions | None = None
) -> Source:
    """Return the Source of a file, a module, an exported program or a state dict.

    Args:
        model: a path, a torch.nn.Module, a torch.export.ExportedProgram, a mapping of names to tensors, or a Source.
        openers: the kinds of files that can be read, tried in order.
        options: options for reading a file.

    Raises:
        SourceError: the model has another type; the message says which, and what to do.

    >>> import numpy as np
    >>> load_source({"w": np.zeros((2, 2), np.float32)}).label
    'state dict'
    """
    options = options or SourceOptions()
    if isinstance(model, str | os.PathLike):
        return _from_file(Path(model), openers, options)
    return _from_object(model, options)


def _from_file(path: Path, openers: Sequence[Opener], options: SourceOptions) -> Source:
    if path.exists():
        for opener in openers:
            if opener.accepts(path):
                return opener.open(path, options)
    content = content_of(path)
    if content == "pickle":
        return _from_pickle(path, options)
    what = DESCRIPTIONS[content]
    found = f"{path} is {what}" if content in _OTHER_MODELS else f"{path} must be a model, but it is {what}"
    raise SourceError(f"{found}. {_ADVICE.get(content, _ADVICE['unknown'])}")


def _from_pickle(path: Path, options: SourceOptions) -> Source:
    from qcompress.sources.pickles.machine import unpickle

    if options.trust_pickle:
        import pickle

        with path.open("rb") as f:
            return _from_object(pickle.load(f), options)
    with path.open("rb") as f:
        names = unpickle(f, str(path)).names
    named = f" that names {', '.join(map(str, names[:10]))}" if names else ""
    raise UnsafeFileError(
        f"{path} is a plain Python pickle{named}, not written by torch.save: reading it would run the code that "
        "it names. None of its code was run. Save it with torch.save(model.state_dict(), …) or torch.export.save. Only "
        "if you trust whoever made it: --trust-pickle."
    )


def _from_object(model: object, options: SourceOptions) -> Source:
    if all(hasattr(type(model), method) for method in ("tensors", "program")):  # a Source; isinstance would hash it
        return cast(Source, model)
    if isinstance(model, Mapping):
        from qcompress.sources.memory.state_dict import StateDictSource

        return StateDictSource(model, options)
    try:
        import torch
    except ImportError:
        raise _no_model(model) from None
    if isinstance(model, torch.nn.Module):
        from qcompress.sources.memory.module import ModuleSource

        return ModuleSource(model)
    if isinstance(model, torch.export.ExportedProgram):
        from qcompress.sources.memory.exported_program import ExportedProgramSource

        return ExportedProgramSource(model)
    raise _no_model(model)


def _no_model(model: Any) -> SourceError | DependencyError:
    return SourceError(
        f"a model must be a path, a torch.nn.Module, an exported program or a state dict, got {type(model).__name__}."
    )
