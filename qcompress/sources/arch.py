"""Makes a program from a state dict: the user's factory builds the architecture, and the tensors are loaded into it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from qcompress.errors import SourceError, did_you_mean
from qcompress.graph.conversion import to_torch
from qcompress.graph.options import ProgramOptions
from qcompress.kinds import COUNTER
from qcompress.sources.base import LazyArray, SourceOptions, SourceTensor
from qcompress.sources.prefixes import Fit, fit
from qcompress.sources.state_names import kind_by_name, shapes_by_name
from qcompress.user_code import build_module

if TYPE_CHECKING:
    import torch

    from qcompress.graph.program import FloatProgram

__all__ = ["load_state", "module_of_state_dict", "program_of_state_dict", "with_kinds_of"]


def program_of_state_dict(
    tensors: Iterable[SourceTensor], source: SourceOptions, options: ProgramOptions, label: str
) -> "FloatProgram":
    """Return the float program of the architecture in `source.arch`, with these tensors loaded into it.

    Raises:
        SourceError: no architecture is given, it cannot be built, or the tensors do not fit it.
    """
    if source.arch is None:
        raise SourceError(
            f"{label}: a state dict holds no program: pass its architecture with --arch package.module:factory or "
            "--arch path/file.py:factory."
        )
    module, found = _built(tensors, source, label)

    from qcompress.graph.tracing import from_module

    program = from_module(module.eval(), options)
    return replace(program, notes=(f"{label}: {found.note}", *program.notes)) if found.note else program


def module_of_state_dict(tensors: Iterable[SourceTensor], source: SourceOptions, label: str) -> "torch.nn.Module":
    """Return the module that `source.arch` builds, with these tensors loaded into it.

    Raises:
        SourceError: it cannot be built, or the tensors do not fit it.
    """
    return _built(tensors, source, label)[0]


def _built(tensors: Iterable[SourceTensor], source: SourceOptions, label: str) -> tuple["torch.nn.Module", Fit]:
    """Return the module with its tensors, and how their names fit it."""
    assert source.arch is not None
    module = build_module(source.arch, source.arch_kwargs)
    arrays = {name: t.array for t in tensors for name in (t.name, *t.aliases)}
    found = fit(arrays, _needed(module))
    own = {found.names[name]: array for name, array in arrays.items() if name in found.names}
    load_state(module, own, label, f"--arch {source.arch}")
    return module, found


def _needed(module: "torch.nn.Module") -> list[list[str]]:
    """Return the names of each tensor that a file must have."""
    import torch

    names: dict[int, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and not name.endswith(COUNTER):
            names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def with_kinds_of(tensors: Iterable[SourceTensor], source: SourceOptions, label: str) -> Iterator[SourceTensor]:
    """Yield the tensors of a state dict; if an architecture is given, with its kinds and in its order.

    Without it, the kinds are unknown but for those that names tell.
    """
    kept = list(tensors)
    if source.arch is None:
        shapes = shapes_by_name(kept)
        yield from (replace(tensor, kind=kind_by_name(tensor.name, shapes)) for tensor in kept)
        return
    from qcompress.graph.symbolic import kinds_of

    module, found = _built(kept, source, label)
    kinds, own = kinds_of(module), found.names
    order = {name: i for i, name in enumerate(kinds)}
    named = [
        replace(t, name=own[t.name], aliases=tuple(own.get(a, a) for a in t.aliases)) for t in kept if t.name in own
    ]
    for tensor in sorted(named, key=lambda t: order.get(t.name, len(order))):
        yield replace(tensor, kind=kinds.get(tensor.name, "other"))


def load_state(module: "torch.nn.Module", arrays: Mapping[str, LazyArray], label: str, who: str) -> None:
    """Load named arrays into a module; names and shapes must be equal.

    One name of a tied tensor is enough; the counters `num_batches_tracked` may be missing.

    Args:
        module: is changed in place.
        arrays: the state dict.
        label: the origin of the arrays, for messages.
        who: the origin of the module, for messages.

    Raises:
        SourceError: names or shapes differ; the message counts them, and shows the first and the nearest ones.
    """
    import torch

    expected = {name: t for name, t in module.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    given_ids = {id(expected[name]) for name in arrays if name in expected}
    missing = [
        name
        for name, t in expected.items()
        if name not in arrays and id(t) not in given_ids and not name.endswith(COUNTER)
    ]
    unexpected = [name for name in arrays if name not in expected]
    if missing or unexpected:
        raise SourceError(f"{label} does not fit {who}: {_difference(missing, unexpected)} Check --arch-kwargs.")
    wrong = [name for name, array in arrays.items() if tuple(expected[name].shape) != array.shape]
    if wrong:
        examples = "; ".join(
            f"{name} is {list(arrays[name].shape)} in the file, {list(expected[name].shape)} in the architecture"
            for name in wrong[:3]
        )
        raise SourceError(f"{label} does not fit {who}: {len(wrong)} shapes differ ({examples}). Check --arch-kwargs.")
    state = {name: to_torch(np.asarray(array)) for name, array in arrays.items()}
    module.load_state_dict(state, strict=False)


def _difference(missing: list[str], unexpected: list[str]) -> str:
    parts = []
    if missing:
        first = missing[0]
        parts.append(
            f"{len(missing)} tensors are missing in the file ({_some(missing)}).{did_you_mean(first, unexpected)}"
        )
    if unexpected:
        first = unexpected[0]
        parts.append(
            f"{len(unexpected)} are unknown to the architecture ({_some(unexpected)}).{did_you_mean(first, missing)}"
        )
    return " ".join(parts)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
