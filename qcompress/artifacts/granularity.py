"""The only view of a weight as rows, LUT groups, blocks and vectors.

`rows`, `vectors` and their inverses take arrays and tensors; gradients pass through them.

Shape suffixes: O = output channels, R = elements of one output channel, G = LUT groups, V = vectors, D = vector_dim,
N = blocks of one row, B = block_size.
"""

import math
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from qcompress.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = npt.NDArray[np.float32]
Values = TypeVar("Values", npt.NDArray[Any], "Tensor")


def output_axis(kind: str) -> int:
    """Return the axis of a weight that counts output channels: 1 for transposed convolutions, else 0.

    >>> output_axis("conv_transpose"), output_axis("linear")
    (1, 0)
    """
    return 1 if kind == "conv_transpose" else 0


def rows(weight: Values, axis: int = 0) -> Values:
    """Return the weight as [O, R]: one row per output channel.

    >>> rows(np.zeros((2, 3, 4)), axis=1).shape
    (3, 8)
    """
    if weight.ndim == 0:
        return weight.reshape(1, 1)
    count = weight.shape[axis]
    return _moved(weight, axis, 0).reshape(count, math.prod(weight.shape) // count if count else 0)


def from_rows(rows_OR: Values, shape: tuple[int, ...], axis: int = 0) -> Values:
    """Return a weight from its rows; the exact inverse of `rows`.

    >>> w = np.arange(24).reshape(2, 3, 4)
    >>> bool((from_rows(rows(w, 1), w.shape, 1) == w).all())
    True
    """
    if not shape:
        return rows_OR.reshape(())
    axis %= len(shape)
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return _moved(rows_OR.reshape(moved), 0, axis)


def lut_groups(channels: int, rows_per_lut: int | None) -> int:
    """Return the number of LUTs of a weight with `channels` output channels; the last group may be shorter.

    >>> lut_groups(10, None), lut_groups(10, 4), lut_groups(10, 64)
    (1, 3, 1)
    """
    if rows_per_lut is None:
        return 1
    if rows_per_lut < 1:
        raise ConfigError(f"rows_per_lut must be at least 1, got {rows_per_lut!r}.")
    return max(1, -(-channels // rows_per_lut))


def group_of_row(channels: int, rows_per_lut: int | None) -> npt.NDArray[np.int64]:
    """Return [O]: the LUT group of each output channel.

    >>> group_of_row(5, 2).tolist()
    [0, 0, 1, 1, 2]
    """
    if rows_per_lut is None:
        return np.zeros(channels, np.int64)
    lut_groups(channels, rows_per_lut)
    return np.arange(channels, dtype=np.int64) // rows_per_lut


def input_axis(ndim: int, axis: int) -> int:
    """Return the axis that blocks run along: it counts a matrix's inputs, or an embedding's dimensions.

    Args:
        ndim: number of the weight's axes, at least 2.
        axis: the axis that counts output channels.

    >>> input_axis(2, axis=0), input_axis(2, axis=1)
    (1, 0)
    """
    return ndim - 1 - axis


def blocks(rows_OR: npt.NDArray[np.generic], block_size: int) -> npt.NDArray[np.generic]:
    """Return rows as blocks [O, N, B] of consecutive elements; the last block of a row is filled with zeros.

    B is block_size, or the length of a row if that is less.

    >>> blocks(np.array([[1, 2, 3]]), 2).tolist()
    [[[1, 2], [3, 0]]]
    """
    block_size = max(1, min(block_size, rows_OR.shape[1]))
    count = -(-rows_OR.shape[1] // block_size)
    filled = np.pad(rows_OR, ((0, 0), (0, count * block_size - rows_OR.shape[1])))
    return filled.reshape(len(rows_OR), count, block_size)


def vectors(weight: Values, d: int, axis: int | None = None) -> Values:
    """Return the weight as [V, D]: vectors of d consecutive row-major elements, or, if given, of elements along `axis`.

    The tail is filled with the last element.

    >>> vectors(np.arange(5), 2).tolist()
    [[0, 1], [2, 3], [4, 4]]
    >>> vectors(np.arange(4).reshape(2, 2), 2, axis=0).tolist()
    [[0, 2], [1, 3]]
    """
    if d < 1:
        raise ConfigError(f"vector_dim must be at least 1, got {d!r}.")
    flat = (weight if axis is None else _moved(weight, axis, -1)).reshape(-1)
    tail = -flat.shape[0] % d
    return (_with_tail(flat, tail) if tail else flat).reshape(-1, d)


def from_vectors(vectors_VD: Values, shape: tuple[int, ...], axis: int | None = None) -> Values:
    """Return a weight from its vectors; the exact inverse of `vectors`.

    >>> from_vectors(vectors(np.arange(5), 2), (5,)).tolist()
    [0, 1, 2, 3, 4]
    """
    flat = vectors_VD.reshape(-1)[: math.prod(shape)]
    if axis is None:
        return flat.reshape(shape)
    along: int = axis % len(shape)
    moved = (*shape[:along], *shape[along + 1 :], shape[along])
    return _moved(flat.reshape(moved), -1, axis)


def _moved(values: Values, source: int, destination: int) -> Values:
    if isinstance(values, np.ndarray):
        return np.moveaxis(values, source, destination)
    return values.moveaxis(source, destination)


def _with_tail(flat: Values, tail: int) -> Values:
    if isinstance(flat, np.ndarray):
        return np.concatenate([flat, np.repeat(flat[-1:], tail)])
    import torch

    return torch.cat([flat, flat[-1:].expand(tail)])
