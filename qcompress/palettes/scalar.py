"""Scalar k-means: a palette of at most 2**bits values per group of output channels.

Source: dynamic programming finds the optimum of one-dimensional k-means (`_optimal`). It runs on the values themselves
if few are distinct. Otherwise the sorted values are first merged into cells, the optimum over the cells is found, and
Lloyd's iterations on prefix sums of the values move it to a local optimum. For even more values, bins (`_bins`) replace
the values, unless they turn out to be too coarse.
Deviations from plain k-means: no random start; the same values give the same palette.

Shape suffixes: N = values, U = distinct values or bins, C = cells, K = palette entries, T = values outside the bins,
O = output channels, R = elements of one output channel, G = LUT groups.
"""

from itertools import pairwise
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from qcompress.artifacts import PalettizedWeight, granularity
from qcompress.artifacts.packing import check_bits
from qcompress.errors import ConfigError
from qcompress.palettes._bins import COUNT, Bins
from qcompress.palettes._optimal import F64, I64, optimal_runs
from qcompress.palettes.assign import assign_into
from qcompress.palettes.even_grid import finite_floats
from qcompress.plan.fields import LutDtype

Floats = npt.NDArray[np.float32]

# Exact if distinct values * entries are at most this (about 0.1 s), else on cells.
_EXACT_WORK: Final = 1 << 17
_CELLS_PER_ENTRY: Final = 64  # twice as many if bins replace the values
_MAX_CELLS: Final = 2048
_LLOYD_STEPS: Final = 300
_LEAST_MASS: Final = 1e-12

# From this many values on, bins are faster than sorting.
_MANY: Final = 1 << 17
_BINS_PER_ENTRY: Final = 256  # between the ends of nearly all values
_OUTSIDE: Final = 1 / 1024  # share of the mass on either side that may be outside the bins
_REFINEMENTS: Final = 8
_LOST: Final = 1 / 256  # share of the squared error that bins may add at most
# If the largest value is between these powers of 2, float16 entries need no scale: none overflows, and float16's
# smallest step is small compared with the largest value.
_LEAST_HALF: Final = -8
_MOST_HALF: Final = 15


def fit_lut(values: npt.NDArray[Any], bits: int, importance: npt.NDArray[Any] | None = None) -> Floats:
    """Return a palette of at most 2**bits entries with a small total squared distance to the values.

    Args:
        values: float32, float16 or bfloat16, any shape, finite.
        bits: width of a code, 1 to 8.
        importance: weight of each value's squared error, shape of `values`, finite, at least 0; None or all 0: equal.

    Returns:
        float32 [K], sorted, distinct, K <= 2**bits; empty for no values. If at most 2**bits distinct values have
        importance above 0, exactly these.

    Raises:
        ConfigError: bits outside 1..8, another dtype, NaN or Inf, or an invalid importance.

    >>> fit_lut(np.array([0.0, 0.2, 1.0, 1.2], np.float32), 1).round(3).tolist()
    [0.10000000149011612, 1.100000023841858]
    >>> fit_lut(np.array([3, 1, 3], np.float16), 4).tolist()
    [1.0, 3.0]
    """
    check_bits(bits)
    flat = finite_floats(values, "palettize").ravel()
    mass = None if importance is None else checked_importance(importance, values.shape).ravel()
    return _fit(flat, mass, 1 << bits)


def palettize(
    weight: npt.NDArray[Any],
    bits: int,
    rows_per_lut: int | None = None,
    axis: int = 0,
    importance: npt.NDArray[Any] | None = None,
    lut_dtype: LutDtype = "float32",
) -> PalettizedWeight:
    """Return a weight as codes into one palette per `rows_per_lut` output channels.

    Args:
        weight: float32, float16 or bfloat16, finite.
        bits: width of a code, 1 to 8.
        rows_per_lut: output channels that share a palette; None: all.
        axis: the axis that counts output channels.
        importance: weight of each element's squared error, shape of `weight`; None: equal.
        lut_dtype: float32 or float16. Entries are rounded to it, and codes point to the nearest rounded entries.

    Returns:
        The artifact. Palettes are sorted, and short ones are padded with their last entry. With float16 it has a scale
        if the values are out of float16's range.

    Raises:
        ConfigError: as for `fit_lut`, rows_per_lut below 1, or lut_dtype int8; see `palettize_int8`.

    >>> w = palettize(np.array([[1, 1, 2], [5, 6, 6]], np.float32), bits=1, rows_per_lut=1)
    >>> w.lut.tolist(), w.codes.tolist()
    ([[1.0, 2.0], [5.0, 6.0]], [[0, 0, 1], [0, 1, 1]])
    """
    check_bits(bits)
    if lut_dtype not in ("float32", "float16"):
        raise ConfigError(
            f"lut_dtype must be float32 or float16, got {lut_dtype!r}; palettize_int8 makes int8 palettes."
        )
    values = finite_floats(weight, "palettize")
    shift = half_shift(values) if lut_dtype == "float16" else 0

    def rows(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        # With one palette for all, a single row needs no copy.
        return values.reshape(1, -1) if rows_per_lut is None else granularity.rows(values, axis)

    rows_OR = rows(np.ldexp(values, -shift) if shift else values)
    mass_OR = None if importance is None else rows(checked_importance(importance, weight.shape))
    codes_OR = np.empty(rows_OR.shape, np.uint8)
    group_O = granularity.group_of_row(len(rows_OR), rows_per_lut)
    edges = np.searchsorted(group_O, np.arange(granularity.lut_groups(len(rows_OR), rows_per_lut) + 1))
    luts = []
    for first, last in pairwise(edges):
        members = rows_OR[first:last].reshape(-1)
        lut = _fit(members, None if mass_OR is None else mass_OR[first:last].reshape(-1), 1 << bits)
        if lut_dtype == "float16":
            lut = np.unique(lut.astype(np.float16)).astype(np.float32)
        if lut.size:  # an empty weight has an empty palette
            assign_into(members, lut, codes_OR[first:last].reshape(-1))
        luts.append(lut)
    entries = max(len(lut) for lut in luts)
    codes = granularity.from_rows(codes_OR, weight.shape, 0 if rows_per_lut is None else axis)
    return PalettizedWeight(
        codes=np.asarray(codes, np.uint8, order="C"),
        lut=np.stack(
            [np.pad(lut, (0, entries - len(lut)), mode="edge") if len(lut) < entries else lut for lut in luts]
        ).astype(lut_dtype, copy=False),
        bits=bits,
        axis=axis,
        rows_per_lut=rows_per_lut,
        scale=np.array(2.0**shift, np.float32) if shift else None,
    )


def half_shift(values: Floats) -> int:
    """Return the exponent of the scale that float16 needs to tell values apart as well as it can; 0 without a scale.

    >>> half_shift(np.array([0.3, -1], np.float32)), half_shift(np.array([1e-9], np.float32))
    (0, -30)
    """
    exponent = int(np.frexp(np.abs(values).max(initial=0))[1]) - 1
    return 0 if _LEAST_HALF <= exponent < _MOST_HALF else exponent


class _Points:
    """Sorted distinct values with prefix sums of mass and moments, so that the mean of any run costs two look-ups."""

    def __init__(self, sorted_U: F64, mass_U: F64, entries: int) -> None:
        self.entries = entries
        self.true_x = sorted_U
        self.x = _gaps_shortened(sorted_U, mass_U, entries)
        self.centre = float((self.x * mass_U).sum() / mass_U.sum()) if len(sorted_U) else 0.0
        shifted = self.x - self.centre
        self.n = _prefix(mass_U)
        self.s = _prefix(shifted * mass_U)
        self.q = _prefix(shifted * shifted * mass_U)

    @classmethod
    def of(cls, values: Floats | F64, mass: npt.NDArray[Any] | None, entries: int) -> Self:
        """Return the points of unsorted values; values with mass 0 are dropped."""
        return cls(*_distinct(values, mass), entries)

    def fit(self) -> Floats:
        """Return the palette: the optimum if that is fast, else one close to it."""
        if len(self.x) <= self.entries:
            return self.true_x.astype(np.float32)
        if len(self.x) * self.entries > _EXACT_WORK:
            return self.palette(self.near_best(_CELLS_PER_ENTRY))
        return self.palette(self._best(np.arange(len(self.x) + 1)))

    def near_best(self, cells_per_entry: int) -> I64:
        """Return edges of the best runs of whole cells, moved to the nearest local optimum."""
        edges_C = self._cells(min(_MAX_CELLS, max(256, cells_per_entry * self.entries)))
        return self._lloyd(self._best(edges_C))

    def palette(self, edges: I64) -> Floats:
        """Return the means of runs."""
        first, last = self.true_x[edges[:-1]], self.true_x[edges[1:] - 1]
        means = np.clip(self._means(edges) + (first - self.x[edges[:-1]]), first, last)
        return np.unique(means.astype(np.float32))

    def _best(self, edges_C: I64) -> I64:
        """Return edges of the best runs of whole cells."""
        entries = min(self.entries, len(edges_C) - 1)
        return edges_C[optimal_runs(self._means(edges_C), np.diff(self.n[edges_C]), entries)]

    def _means(self, edges: I64) -> F64:
        means = np.diff(self.s[edges]) / np.diff(self.n[edges]) + self.centre
        return np.asarray(np.clip(means, self.x[edges[:-1]], self.x[edges[1:] - 1]))

    def errors(self, edges: I64) -> F64:
        """Return the squared error of each run to its mean."""
        errors = np.diff(self.q[edges]) - np.diff(self.s[edges]) ** 2 / np.diff(self.n[edges])
        errors[np.diff(edges) == 1] = 0
        return np.asarray(errors)

    def _cells(self, count: int) -> I64:
        """Return edges of about `count` cells of similar squared error: the worst half is cut at its means repeatedly.

        Unlike cells of equal width or mass, these neither waste cells on the gaps of a heavy tail nor lump it together.
        """
        edges = np.array([0, len(self.x)])
        while len(edges) - 1 < count:
            means = self._means(edges)
            error = self.errors(edges)
            worst = np.argsort(-error, kind="stable")[: min(max(1, len(error) // 2), count + 1 - len(edges))]
            worst = worst[error[worst] > 0]
            if not len(worst):
                break
            cuts = np.searchsorted(self.x, means[worst], side="right")
            edges = np.union1d(edges, np.clip(cuts, edges[worst] + 1, edges[worst + 1] - 1))
        return edges

    def _lloyd(self, edges: I64) -> I64:
        """Return edges after Lloyd's iterations: means of runs, then runs of the values nearest to each mean."""
        for _ in range(_LLOYD_STEPS):
            means = self._means(edges)
            cuts = np.searchsorted(self.x, (means[1:] + means[:-1]) / 2, side="right")
            moved = np.unique(np.concatenate([[0], cuts, [len(self.x)]]))
            if np.array_equal(moved, edges):
                break
            edges = moved
        return edges


def _distinct(values: Floats | F64, mass: npt.NDArray[Any] | None) -> tuple[F64, F64]:
    """Return the sorted distinct values [U] and their masses, relative to the largest mass of one value."""
    values = values + values.dtype.type(0)  # -0.0 becomes 0.0: one value, one bit pattern
    if mass is None:
        values.sort()
    else:
        order = np.argsort(values, kind="stable")
        order = order[mass[order] > 0]
        values, mass = values[order], mass[order].astype(np.float64) / mass.max()
    is_first = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=is_first[1:])
    first_U = np.flatnonzero(is_first)
    if mass is None:
        return values[first_U].astype(np.float64), np.diff(first_U, append=len(values)).astype(np.float64)
    mass_U = np.add.reduceat(mass, first_U)
    # Keep tiny masses above the rounding error of the sums.
    return values[first_U].astype(np.float64), np.maximum(mass_U, mass_U.sum() * _LEAST_MASS)


def _gaps_shortened(sorted_U: F64, mass_U: F64, entries: int) -> F64:
    """Return the values with those gaps shortened that every optimal palette cuts at.

    An outlier of 1e30 would make all sums lose the digits of the other values. With cuts at the widest gaps, the
    squared error is at most the total mass times the squared sum of the other gaps; a run across a gap has an error of
    at least half the least mass times the squared gap.
    """
    gaps = np.diff(sorted_U)
    if len(gaps) < entries:
        return sorted_U
    others = gaps[gaps <= np.partition(gaps, -entries)[-entries]].sum()
    longest = 2 * others * np.sqrt(mass_U.sum() / mass_U.min())
    if gaps.max() <= longest:
        return sorted_U
    return np.concatenate([[0.0], np.cumsum(np.minimum(gaps, longest))])


def _fit(values: Floats, mass: npt.NDArray[Any] | None, entries: int) -> Floats:
    """Return the palette for values and masses, both 1-D."""
    if mass is not None and not mass.any():
        mass = None
    lut = _fit_binned(values, mass, entries) if len(values) >= _MANY else None
    return _Points.of(values, mass, entries).fit() if lut is None else lut


def _fit_binned(values: Floats, mass: npt.NDArray[Any] | None, entries: int) -> Floats | None:
    """Return a palette close to the optimum for many values; None if bins are too coarse for them."""
    found = _binned(values, mass, entries)
    if found is None:
        return None
    points, lost = _Points.of(*found[:2], entries), found[2]
    del found  # memory
    edges = points.near_best(2 * _CELLS_PER_ENTRY)
    if lost > _LOST * points.errors(edges).sum() / points.n[-1]:
        return None
    return np.unique(np.clip(points.palette(edges), values.min(), values.max()))


def _binned(values: Floats, mass: npt.NDArray[Any] | None, entries: int) -> tuple[F64, F64, float] | None:
    """Return few values and masses in place of many, and how far that moves them at most: squared distance per mass.

    Bins are narrowed until enough of them lie between the ends of nearly all values; the few values outside are kept.
    None if they cannot be narrowed that far.
    """
    low, high = float(values.min()), float(values.max())
    share = min(_OUTSIDE, COUNT / 8 / len(values))
    for _ in range(_REFINEMENTS):
        bins = Bins.over(low, high)
        found = None if bins is None else bins.count(values, mass)
        if bins is None or found is None:
            return None
        inside_U, values_T, mass_T = found
        sums_U = np.cumsum(inside_U)
        first, last = np.searchsorted(sums_U, [share * sums_U[-1], (1 - share) * sums_U[-1]])
        if last - first >= min(_BINS_PER_ENTRY * entries, COUNT // 4):
            filled = np.flatnonzero(inside_U)
            masses = np.concatenate([inside_U[filled], mass_T])
            return np.concatenate([bins.middle(filled), values_T]), masses, (bins.width / 2) ** 2
        low, high = float(bins.middle(first)) - bins.width / 2, float(bins.middle(last)) + bins.width / 2
    return None


def _prefix(values: F64) -> F64:
    sums = np.zeros(len(values) + 1)
    np.cumsum(values, out=sums[1:])
    return sums


def checked_importance(importance: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return the importance of values as an array.

    Args:
        importance: any real dtype.
        shape: shape of the values.

    Raises:
        ConfigError: it has another shape, or holds a NaN, an Inf or a negative number.
    """
    importance = np.asarray(importance)
    if importance.shape != shape:
        raise ConfigError(f"importance must have the shape of the values, {shape}, got {importance.shape}.")
    # With a NaN inside, minimum and maximum are NaN.
    if not (importance.min(initial=0) >= 0 and np.isfinite(importance.max(initial=0))):
        raise ConfigError("importance must be finite and not negative, got a NaN, an Inf or a negative number.")
    return importance
