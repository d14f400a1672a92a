"""Lengths of token sequences: which axes of the inputs have them, and whether a program takes other ones.

torch.export finds which lengths are equal, and bounds those of most tables of positions. A table that is read by
computed positions has no such bound; it is found by watching which rows are read as the length grows.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from qcompress.graph.axes import Axes, resized
from qcompress.graph.program import traced_sizes, user_inputs, value_of
from qcompress.graph.quiet import quiet_torch
from qcompress.graph.value_names import is_tokens

Symbol = Any  # of sympy, which has no types
_TOLERANCE: Final = 1e-4  # of the largest output; other lengths may run other kernels
_SHORTEST: Final = 2  # torch.export specializes a length of 1
_LONGEST_RUN: Final = 4096  # what attention needs grows with the square
_TABLES: Final = (torch.ops.aten.embedding.default, torch.ops.aten.index_select.default, torch.ops.aten.index.Tensor)


@dataclass(frozen=True, slots=True)
class LengthRange:
    """The lengths that a program takes.

    Args:
        least: the shortest one.
        most: the longest one; None: there is no limit.
    """

    least: int
    most: int | None

    def __str__(self) -> str:
        if self.most is None:
            return f"{self.least} or more"
        return f"up to {self.most}" if self.least == _SHORTEST else f"{self.least} to {self.most}"

    @property
    def is_limited(self) -> bool:
        """Whether there are limits that differ from those of every program."""
        return self.least > _SHORTEST or self.most is not None


def length_axes(leaves: Sequence[Any], batch: Sequence[int | None]) -> Axes:
    """Return the axes of each input that may be lengths of tokens: all that are as long as a token sequence.

    Args:
        leaves: the example inputs.
        batch: the axis of each that counts samples.

    >>> [sorted(axes) for axes in length_axes([torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 1, 5, 5)], (0, 0))]
    [[1], [2, 3]]
    """
    lengths = {value.shape[1] for value, own in zip(leaves, batch, strict=True) if is_tokens(value) and own != 1} - {1}
    return tuple(
        frozenset(a for a in range(1, value.ndim) if a != own and value.shape[a] in lengths)
        if isinstance(value, torch.Tensor)
        else frozenset()
        for value, own in zip(leaves, batch, strict=True)
    )


def without_others(exported: ExportedProgram, axes: Axes) -> Axes:
    """Return the axes without those whose size has nothing to do with a token sequence, such as an image's height."""
    nodes = user_inputs(exported)
    sizes = set(_token_lengths(exported))
    return tuple(
        frozenset(a for a in own if (size := _size(node, a)) is None or size.free_symbols <= sizes)
        for node, own in zip(nodes, axes, strict=True)
    )


def length_ranges(
    module: torch.nn.Module, exported: ExportedProgram, leaves: Sequence[Any], spec: pytree.TreeSpec, axes: Axes
) -> dict[str, LengthRange] | None:
    """Return the lengths that a program takes, checked: at two others it gives the outputs of the module.

    Args:
        module: what was traced; run, with its buffers given back.
        exported: its program.
        leaves: the inputs with which it was traced.
        spec: of its arguments.
        axes: those traced as dynamic.

    Returns:
        Ranges by symbol; None if the program is not right at other lengths.
    """
    nodes, traced = user_inputs(exported), exported.module(check_guards=False)

    def inputs(symbol: Symbol, length: int) -> tuple[Any, Any]:
        values = list(leaves)
        for i, (node, own) in enumerate(zip(nodes, axes, strict=True)):
            for axis in own:
                size = _size(node, axis)
                if size is not None and symbol in size.free_symbols:
                    values[i] = resized(values[i], axis, int(size.subs({symbol: length})), cyclic=True)
        args, kwargs = pytree.tree_unflatten(values, spec)
        return args, kwargs

    ranges: dict[str, LengthRange] = {}
    with quiet_torch(), torch.no_grad(), _same_buffers(module):
        for symbol, length in _token_lengths(exported).items():

            def run(what: Callable[..., Any], length: int, symbol: Symbol = symbol) -> Any:
                args, kwargs = inputs(symbol, length)
                return what(*args, **kwargs)

            bounds = exported.range_constraints[symbol]
            least = max(_SHORTEST, int(bounds.lower))
            most = int(bounds.upper) if bounds.upper.is_Integer and bounds.upper < 2**31 else None
            try:
                most = _most(lambda length, run=run: run(module, length), length, most)  # type: ignore[misc]
                others = _other_lengths(length, least, most)
                if len(others) < 2 or not all(_agree(run(module, n), run(traced, n)) for n in others):
                    return None
            except Exception:  # the user's code, at a length that nobody asked for
                return None
            ranges[str(symbol)] = LengthRange(least, most)
    return ranges


def _token_lengths(exported: ExportedProgram) -> dict[Symbol, int]:
    """Return the symbols of the lengths of token sequences, and their sizes in the trace."""
    nodes = [node for node in user_inputs(exported) if is_tokens(node.meta.get("val"))]
    return {size: traced_sizes(node)[1] for node in nodes if (size := _size(node, 1)) is not None and size.is_Symbol}


def _size(node: Node, axis: int) -> Any | None:
    """Return the symbolic size of an axis; None if it is a number."""
    size = value_of(node).shape[axis]
    return None if isinstance(size, int) or size.node.maybe_as_int() is not None else size.node.expr


def _other_lengths(length: int, least: int, most: int | None) -> list[int]:
    """Return two lengths to check, a shorter one first where that is possible.

    >>> _other_lengths(16, 2, None), _other_lengths(16, 2, 16), _other_lengths(2, 2, 20), _other_lengths(26, 26, None)
    ([8, 32], [8, 12], [4, 3], [])
    """
    if length == least > _SHORTEST:
        return []  # all columns are read one by one: they are no sequence
    wanted = (max(least, length // 2), 2 * length, length + 1, 3 * length // 4, length - 1)
    legal = [n for n in wanted if n != length and n >= least and (most is None or n <= most)]
    return list(dict.fromkeys(legal))[:2]


def _most(run: Callable[[int], Any], length: int, most: int | None) -> int | None:
    """Return the longest length that a model takes; None: there is no limit.

    Args:
        run: runs the model at a length.
        length: that of the example.
        most: the limit that torch.export found.
    """
    if length == most:
        return most
    before, after = _RowsRead(), _RowsRead()
    with before:
        run(length)
    try:
        with after:
            run(length + 1)
    except Exception:
        return length
    grown = [
        length + (rows - 1 - last) // (then - last)
        for (last, rows), (then, _) in zip(before.found, after.found, strict=False)
        if then > last
    ]
    limit = min(grown, default=None)
    if limit is None or (most is not None and limit >= most):
        return most
    if limit > _LONGEST_RUN:
        return limit
    try:
        run(limit + 1)
    except Exception:
        return limit
    return most  # rows of buckets: they grow no further


class _RowsRead(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the last row that is read of each table, and how many rows it has."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _TABLES:
            table, rows = args[0], args[-1] if func is torch.ops.aten.index_select.default else args[1]
            rows = rows[0] if isinstance(rows, list | tuple) else rows
            if isinstance(rows, torch.Tensor) and rows.numel() and rows.dtype in (torch.int64, torch.int32):
                self.found.append((int(rows.max()), len(table)))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _same_buffers(module: torch.nn.Module) -> Iterator[None]:
    """Give a module back the buffers that it had."""
    held = [(part, dict(part._buffers)) for part in module.modules()]
    values = {id(b): (b, b.clone()) for _, buffers in held for b in buffers.values() if b is not None}
    try:
        yield
    finally:
        for part, buffers in held:
            part._buffers.update(buffers)
        for buffer, value in values.values():
            buffer.copy_(value)


def _agree(wanted: Any, got: Any) -> bool:
    pairs = list(zip(pytree.tree_leaves(wanted), pytree.tree_leaves(got), strict=True))
    return all(_close(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


def _close(wanted: torch.Tensor, got: torch.Tensor) -> bool:
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        return False
    finite = wanted[wanted.isfinite()] if wanted.is_floating_point() else wanted.new_zeros(0)
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(wanted, got, rtol=0, atol=_TOLERANCE * scale, equal_nan=True)
