"""Guesses at the axes of example inputs that count samples, and example inputs of other sizes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from qcompress.graph.options import ProgramOptions
from qcompress.graph.value_names import key_name

Axes = tuple[frozenset[int], ...]


def batch_axes(leaves: Sequence[Any]) -> list[tuple[int | None, ...]]:
    """Return guesses at the axis of each input that is its batch, the likeliest first; None: it has none.

    The batch is the first axis of the first input. Of other inputs, too, it is the first axis; but the state of a
    recurrent net is [layers, batch, hidden].
    """
    first = next((i for i, t in enumerate(leaves) if isinstance(t, torch.Tensor) and t.ndim), 0)
    batch = len(leaves[first]) if leaves and isinstance(leaves[first], torch.Tensor) and leaves[first].ndim else 0
    shapes = [tuple(t.shape) if batch and isinstance(t, torch.Tensor) else () for t in leaves]
    equal = [[i for i, n in enumerate(shape) if n == batch] for shape in shapes]
    guesses = (
        tuple(0 if 0 in axes else None for axes in equal),
        tuple(axes[0] if axes else None for axes in equal),
        tuple(axes[min(1, len(axes) - 1) if i != first else 0] if axes else None for i, axes in enumerate(equal)),
    )
    return list(dict.fromkeys(guesses))


def input_labels(arguments: Mapping[str, Any], options: ProgramOptions) -> list[str]:
    """Return what the user calls each tensor of the arguments: the names given, or the arguments' and keys' own."""
    leaves, _ = pytree.tree_flatten_with_path(arguments)
    if options.input_names and len(options.input_names) == len(leaves):
        return list(options.input_names)
    return [key_name(path[1:]) or key_name(path[:1]) for path, _ in leaves]


def dynamic_axes(
    arguments: Mapping[str, Any], batch: Sequence[int | None], lengths: Axes, options: ProgramOptions
) -> dict[str, Any]:
    """Return the dynamic axes of each tensor of each argument: the batch, lengths, and those that the user named."""
    leaves, spec = pytree.tree_flatten(arguments)
    dims = []
    for name, tensor, own, more in zip(input_labels(arguments, options), leaves, batch, lengths, strict=True):
        rank = tensor.ndim if isinstance(tensor, torch.Tensor) else 0
        wanted = {axis for given, axis in options.dynamic or {} if given == name} | more
        wanted |= set() if own is None else {own}
        dims.append({axis: torch.export.Dim.AUTO for axis in sorted(wanted) if axis < rank})
    axes: dict[str, Any] = pytree.tree_unflatten(dims, spec)
    return axes


def resized(value: Any, axis: int | None, size: int, *, cyclic: bool = False) -> Any:
    """Return a tensor of another size along an axis; any other value as it is.

    Args:
        value: a tensor, or something else.
        axis: which one; None: none.
        size: along it.
        cyclic: whether a longer tensor starts again from its first slice; if not, its last one is repeated.
    """
    if axis is None:
        return value
    own = value.shape[axis]
    places = torch.arange(size) % own if cyclic else torch.arange(size).clamp(max=own - 1)
    return value.index_select(axis, places)
