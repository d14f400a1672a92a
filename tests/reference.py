"""The obvious way to do what the package does fast: one bit, one element, one loop at a time."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt


def pack_bit_by_bit(codes: Sequence[int], bits: int) -> bytes:
    """Bit b of code i is bit i * bits + b of the stream; bit s of the stream is bit s % 8 of byte s // 8."""
    stream = bytearray(-(-len(codes) * bits // 8))
    for i, code in enumerate(codes):
        for b in range(bits):
            position = i * bits + b
            stream[position // 8] |= (code >> b & 1) << position % 8
    return bytes(stream)


def dequantize_palette(
    codes: npt.NDArray[Any],
    lut: npt.NDArray[Any],
    axis: int,
    rows_per_lut: int | None,
    scale: npt.NDArray[Any] | None,
) -> npt.NDArray[np.float32]:
    """Each element by itself: its output channel says which table and which scale."""
    values = np.empty(codes.shape, np.float32)
    for index in np.ndindex(*codes.shape):
        channel = index[axis] if index else 0
        group = 0 if rows_per_lut is None else channel // rows_per_lut
        value = lut[group, codes[index]]
        values[index] = value if scale is None else np.float32(value) * np.float32(scale[channel])
    return values


def dequantize_uniform(
    codes: npt.NDArray[Any],
    scale: npt.NDArray[Any],
    zero_point: npt.NDArray[Any] | None,
    axis: int | None,
    block_size: int | None,
) -> npt.NDArray[np.float32]:
    """Each element by itself: its place along the axis says which scale and which zero point."""
    values = np.empty(codes.shape, np.float32)
    for index in np.ndindex(*codes.shape):
        place: Any = ()
        if axis is not None and block_size is None:
            place = index[axis]
        elif axis is not None and block_size is not None:
            place = (*index[:axis], index[axis] // block_size, *index[axis + 1 :])
        zero = 0 if zero_point is None else int(zero_point[place])
        values[index] = np.float32(int(codes[index]) - zero) * np.float32(scale[place])
    return values


def nearest(value: float, lut: Sequence[float]) -> int:
    """The index of the nearest entry, in exact fractions; of two equally near ones the lower."""
    distances = [abs(Fraction(value) - Fraction(entry)) for entry in lut]
    return distances.index(min(distances))


def best_squared_error(values: Sequence[float], k: int) -> float:
    """The least total squared distance of sorted values to k means, by trying every split."""

    def error(run: Sequence[float]) -> float:
        mean = sum(run) / len(run)
        return sum((x - mean) ** 2 for x in run)

    ordered = sorted(values)
    n = len(ordered)
    splits = ((0, *cut, n) for cut in combinations(range(1, n), min(k, n) - 1))
    return min(sum(error(ordered[i:j]) for i, j in pairwise(s)) for s in splits)
