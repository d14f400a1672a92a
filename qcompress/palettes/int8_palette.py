"""int8 palettes: a weight as codes into a table of int8 values, times one scale per output channel.

The int8 values for integer kernels come from a table look-up, and a channel of small weights has a small step.

Source: with each output channel in its own steps, a palette is a choice of K integers in [-p, p]. Between neighbouring
entries a < b every value goes to the nearer one, so the squared error of a palette is a sum over neighbours, and the
best palette is a shortest path over the integers with K stops: dynamic programming.
Deviations from k-means on the values with entries rounded afterwards: no entry is rounded, no two become equal, and the
result is the optimum for these scales.

Shape suffixes: N = values, A, B = integers in [-p, p], H = half steps from -p up, O = output channels, K = entries.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompress.artifacts import PalettizedWeight, granularity
from qcompress.artifacts.base import broadcast_scale
from qcompress.artifacts.packing import check_bits
from qcompress.palettes.even_grid import finite_floats, in_steps, symmetric_scale

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

LARGEST: Final = 127  # largest entry
LARGEST_REDUCED: Final = 63  # with reduce_range


def palettize_int8(
    weight: npt.NDArray[Any],
    bits: int,
    rows_per_lut: int | None = None,
    axis: int = 0,
    *,
    reduce_range: bool = False,
    per_channel: bool = True,
) -> PalettizedWeight:
    """Return a weight as codes into int8 palettes with the least total squared error for its scales.

    Args:
        weight: float32, float16 or bfloat16, finite; not modified.
        bits: width of a code, 1 to 8.
        rows_per_lut: output channels that share a palette; None: all.
        axis: the axis that counts output channels.
        reduce_range: whether entries stay in [-63, 63]: CPUs without VNNI saturate sums of products of larger ones.
        per_channel: whether each output channel has a scale, or the tensor has one.

    Returns:
        The artifact. Its scale is max|w| / 127 (63). Palettes are sorted and hold no unused entries; short ones are
        padded with their last entry.

    Raises:
        ConfigError: bits outside 1..8, another dtype, NaN or Inf, or rows_per_lut below 1.

    >>> w = palettize_int8(np.array([[-1, 0, 0, 1], [-20, 0, 0, 20]], np.float32), bits=2)
    >>> w.lut.tolist(), w.dequantize()[1].round(3).tolist()
    ([[-127, 0, 127]], [-20.0, 0.0, 0.0, 20.0])
    """
    check_bits(bits)
    wide = finite_floats(weight, "palettize")
    largest = LARGEST_REDUCED if reduce_range else LARGEST
    scale = symmetric_scale(wide, largest, axis if per_channel else None)
    steps_OR = granularity.rows(in_steps(wide, scale, axis), axis)
    mass_OR = np.broadcast_to(broadcast_scale(scale, steps_OR.shape, 0).astype(np.float64) ** 2, steps_OR.shape)
    codes_OR = np.zeros(steps_OR.shape, np.uint8)
    group_O = granularity.group_of_row(len(steps_OR), rows_per_lut)
    luts = []
    for group in range(granularity.lut_groups(len(steps_OR), rows_per_lut)):
        members = group_O == group
        steps = steps_OR[members]
        lut = best_integers(steps.ravel(), mass_OR[members].ravel(), 1 << bits, largest)
        nearest = np.searchsorted((lut[1:] + lut[:-1]) / 2, steps)
        is_used = np.bincount(nearest.ravel(), minlength=len(lut)) > 0
        codes_OR[members] = (np.cumsum(is_used) - 1)[nearest]
        luts.append(lut[is_used].astype(np.int8))
    entries = max(len(lut) for lut in luts)
    return PalettizedWeight(
        codes=np.array(granularity.from_rows(codes_OR, weight.shape, axis), np.uint8, order="C"),
        lut=np.stack([np.pad(lut, (0, entries - len(lut)), mode="edge") for lut in luts]),
        bits=bits,
        axis=axis,
        rows_per_lut=rows_per_lut,
        scale=scale,
    )


def best_integers(values_N: F64, mass_N: F64, k: int, largest: int) -> I64:
    """Return the integers with the least total squared distance of values to the nearest of them.

    Args:
        values_N: in [-largest, largest].
        mass_N: weight of each value, finite, > 0.
        k: how many integers, at least 1.
        largest: the integers are in [-largest, largest].

    Returns:
        [min(k, 2 * largest + 1)], sorted, distinct.

    >>> best_integers(np.array([0.1, 0.3, 8.6]), np.ones(3), 2, 63).tolist()
    [0, 9]
    """
    integers_A = np.arange(-largest, largest + 1)
    if k >= len(integers_A):
        return integers_A
    # The border between two integers is at a whole or half step, so sums over half steps are all that is needed.
    half_N = np.clip(np.floor(2 * (values_N + largest)).astype(np.int64), 0, 4 * largest)
    sums_3H = [
        np.concatenate([[0.0], np.cumsum(np.bincount(half_N, mass_N * values_N**power, 4 * largest + 1))])
        for power in range(3)
    ]

    def error(low: I64, high: I64, entry: I64) -> F64:
        """Squared error of the half steps low .. high - 1 to an entry."""
        mass, first, second = (sums_H[high] - sums_H[low] for sums_H in sums_3H)
        return np.asarray(second - 2 * entry * first + entry**2 * mass)

    at_A = 2 * np.arange(len(integers_A))  # the half step of each integer
    low_AB, high_AB = np.broadcast_arrays(at_A[:, None], at_A[None, :])
    middle_AB = (low_AB + high_AB) // 2
    between_AB = error(low_AB, middle_AB, integers_A[:, None]) + error(middle_AB, high_AB, integers_A[None, :])
    between_AB[low_AB >= high_AB] = np.inf
    best_A = error(np.zeros_like(at_A), at_A, integers_A)
    choices = []
    for _ in range(1, k):
        total_AB = best_A[:, None] + between_AB
        choices.append(np.argmin(total_AB, axis=0))
        best_A = total_AB.min(axis=0)
    path = [int(np.argmin(best_A + error(at_A, np.full_like(at_A, 4 * largest + 1), integers_A)))]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return integers_A[path[::-1]]
