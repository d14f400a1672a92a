"""Several weights as one flat tensor, so that a few kernels quantize them all instead of a few for each.

A row holds the elements that share a scale: those of an output channel, or all of a weight.

Shape suffixes: S = rows of all weights, N = elements of all weights.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# A weight with more elements is quantized alone: its kernels are not short, and copies of it would take memory.
_MOST: Final = 1 << 21


@final
class Rows:
    """How weights lie in a flat tensor: row after row, weight after weight.

    Args:
        shapes: (number of rows, elements in a row) of each weight.
        device: where the weights are.

    >>> rows = Rows([(2, 3), (1, 2)], torch.device("cpu"))
    >>> rows.each(torch.tensor([1.0, 2.0, 3.0])).tolist()
    [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 3.0, 3.0]
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> None:
        self.shapes, self.device = tuple(shapes), device
        self.sizes = [count * length for count, length in self.shapes]
        lengths = torch.tensor([length for count, length in self.shapes for _ in range(count)], dtype=torch.long)
        self._row_N = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths).to(device)
        self._constants: dict[Hashable, Tensor] = {}

    def flat(self, weights: Iterable[Tensor], axes: Iterable[int | None]) -> Tensor:
        """Returns the weights as one tensor, [N].

        Args:
            weights: one for each entry of `shapes`.
            axes: the axis of each weight that counts rows; None: it is one row.
        """
        moved = (w if axis is None else w.movedim(axis, 0) for w, axis in zip(weights, axes, strict=True))
        return torch.cat([w.reshape(-1) for w in moved])

    def parts(self, flat_N: Tensor, weights: Iterable[Tensor], axes: Iterable[int | None]) -> list[Tensor]:
        """Returns the inverse of `flat`: the parts of a flat tensor in the shapes of the weights."""
        found = []
        for part, w, axis in zip(torch.split(flat_N, self.sizes), weights, axes, strict=True):
            like = w if axis is None else w.movedim(axis, 0)
            found.append(part.view(like.shape) if axis is None else part.view(like.shape).movedim(0, axis))
        return found

    def each(self, values_S: Tensor) -> Tensor:
        """Returns for each element the value of its row, [N]; gradients are summed."""
        found: Tensor = _Each.apply(values_S, self)  # type: ignore[no-untyped-call]
        return found

    def constant(self, values: Sequence[float], like: Tensor) -> Tensor:
        """Returns a number of each weight, for each of its rows, [S], in the dtype of another tensor; made once."""
        key = (*values, like.dtype)
        if key not in self._constants:
            each = [value for value, (count, _) in zip(values, self.shapes, strict=True) for _ in range(count)]
            self._constants[key] = torch.tensor(each, dtype=like.dtype).to(self.device)
        return self._constants[key]

    @torch.no_grad()
    def reduced(self, flat_N: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
        """Returns a value of each row, [S].

        Args:
            flat_N: values of all elements.
            reduce: torch.sum, torch.mean or torch.amax.
        """
        out_S = flat_N.new_empty(sum(count for count, _ in self.shapes))
        outs = torch.split(out_S, [count for count, _ in self.shapes])
        for part, shape, out in zip(torch.split(flat_N, self.sizes), self.shapes, outs, strict=True):
            reduce(part.view(shape), 1, out=out)
        return out_S


class _Each(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_S: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return values_S.index_select(0, rows._row_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_N: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.rows.reduced(g_N, torch.sum), None


def alike(keys: Sequence[Hashable], weights: Sequence[Tensor]) -> list[list[int]]:
    """Returns the indices of the weights in groups that one flat tensor can hold; large weights are alone.

    Args:
        keys: what the weights of a group must have in common, beside dtype and device; None: nothing will do.
        weights: one for each key.

    >>> alike(["a", "b", "a"], [torch.zeros(2)] * 3)
    [[0, 2], [1]]
    """
    groups: dict[Hashable, list[int]] = {}
    for i, (key, weight) in enumerate(zip(keys, weights, strict=True)):
        alone = key is None or not 0 < weight.numel() <= _MOST
        groups.setdefault((key, weight.dtype, weight.device, i if alone else None), []).append(i)
    return [*groups.values()]
