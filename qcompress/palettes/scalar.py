"""Scalar k-means: a palette of at most 2**bits values per group of output channels.

Source: the optimum of one-dimensional k-means is found by dynamic programming (`_optimal`). On few distinct values it
is taken as it is. On many, the sorted values are first merged into cells, the optimum over the cells is found, and
Lloyd's iterations on prefix sums of the values themselves take it to a local optimum. Of many more, bins (`_bins`) take
the place of the values, unless they turn out to be too coarse.
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
from qcompress.palettes._bins import COUNT, Bins, pieces
from qcompress.palettes._optimal import F64, I64, optimal_runs
from qcompress.palettes.even_grid import finite_floats
from qcompress.plan.fields import LutDtype

Floats = npt.NDArray[np.float32]

# Exact where distinct values * entries stay below this (about 0.1 s), else on cells.
_EXACT_WORK: Final = 1 << 17
_CELLS_PER_ENTRY: Final = 64  # twice that where bins take the place of values
_MAX_CELLS: Final = 2048
_LLOYD_STEPS: Final = 300
_LEAST_MASS: Final = 1e-12

# From this many values on, bins are faster than sorting, and a table of them faster than a search for each value.
_MANY: Final = 1 << 17
_MANY_TO_ASSIGN: Final = 1 << 15
_BINS_PER_ENTRY: Final = 256  # between the first and the last of nearly all values
_OUTSIDE: Final = 1 / 1024  # of the mass, on either side, that may be outside the bins
_REFINEMENTS: Final = 8
_LOST: Final = 1 / 256  # of the squared error, what bins may lose at the very most
_SAMPLE: Final = 1024
# Between these powers of 2 the largest value needs no scale beside float16: no entry is above its largest number, and
# its smallest step is small beside the largest value.
_LEAST_HALF: Final = -8
_MOST_HALF: Final = 15
_OPEN: Final = 256  # in a table of codes: the bin holds values of several


def fit_lut(values: npt.NDArray[Any], bits: int, weights: npt.NDArray[Any] | None = None) -> Floats:
    """The palette for some values: at most 2**bits entries with a small total squared distance to the values.

    Args:
        values: float32, float16 or bfloat16, any shape, finite.
        bits: width of a code, 1 to 8.
        weights: how much each value counts, shape of `values`, finite and not negative; None, or all 0: all the same.

    Returns:
        float32 [K], sorted, distinct, K <= 2**bits. Where `values` holds no more than 2**bits distinct ones (those of
        weight 0 left out), exactly these; so none for no values.

    Raises:
        ConfigError: bits outside 1..8, another dtype, NaN or Inf, or weights that do not fit.

    >>> fit_lut(np.array([0.0, 0.2, 1.0, 1.2], np.float32), 1).round(3).tolist()
    [0.10000000149011612, 1.100000023841858]
    >>> fit_lut(np.array([3, 1, 3], np.float16), 4).tolist()
    [1.0, 3.0]
    """
    check_bits(bits)
    flat = finite_floats(values, "palettize").ravel()
    mass = None if weights is None else checked_weights(weights, values.shape).ravel()
    return _fit(flat, mass, 1 << bits)


def assign(values: npt.NDArray[Any], lut: Floats) -> npt.NDArray[np.uint8]:
    """The nearest entry of each value; of two equally near ones the lower.

    Args:
        values: float32, float16 or bfloat16, any shape, finite.
        lut: float32 [K], 1 <= K <= 256; entries that occur twice count once, by their first place.

    Returns:
        uint8 in the shape of `values`.

    Raises:
        ConfigError: no entries, more than 256, or values that are not finite.

    >>> assign(np.array([-9.0, 0.5, 0.6], np.float32), np.array([0, 1], np.float32)).tolist()
    [0, 0, 1]
    """
    flat = finite_floats(values, "palettize").ravel()
    codes = np.empty(flat.size, np.uint8)
    _assign(flat, lut, codes)
    return codes.reshape(values.shape)


def palettize(
    weight: npt.NDArray[Any],
    bits: int,
    rows_per_lut: int | None = None,
    axis: int = 0,
    weights: npt.NDArray[Any] | None = None,
    lut_dtype: LutDtype = "float32",
) -> PalettizedWeight:
    """A weight as codes into one palette per `rows_per_lut` output channels.

    Args:
        weight: float32, float16 or bfloat16, finite.
        bits: width of a code, 1 to 8.
        rows_per_lut: output channels that share a palette; None: all.
        axis: the axis that counts output channels.
        weights: how much each element counts, shape of `weight`; None: all the same.
        lut_dtype: float32, or float16: entries are rounded to it, and codes are of the nearest rounded ones.

    Returns:
        The artifact. Palettes are sorted; one with fewer entries than the longest is padded with its last. With float16
        it has a scale where float16 by itself would not reach the values.

    Raises:
        ConfigError: as for `fit_lut`, rows_per_lut below 1, or lut_dtype int8, which `palettes.integer` makes.

    >>> w = palettize(np.array([[1, 1, 2], [5, 6, 6]], np.float32), bits=1, rows_per_lut=1)
    >>> w.lut.tolist(), w.codes.tolist()
    ([[1.0, 2.0], [5.0, 6.0]], [[0, 0, 1], [0, 1, 1]])
    """
    check_bits(bits)
    if lut_dtype not in ("float32", "float16"):
        raise ConfigError(
            f"lut_dtype must be float32 or float16, got {lut_dtype!r}: palettes.integer makes palettes of int8."
        )
    values = finite_floats(weight, "palettize")
    shift = half_shift(values) if lut_dtype == "float16" else 0

    def rows(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        # One palette for all: one row will do, and needs no copy.
        return values.reshape(1, -1) if rows_per_lut is None else granularity.rows(values, axis)

    rows_OR = rows(np.ldexp(values, -shift) if shift else values)
    mass_OR = None if weights is None else rows(checked_weights(weights, weight.shape))
    codes_OR = np.empty(rows_OR.shape, np.uint8)
    group_O = granularity.group_of_row(len(rows_OR), rows_per_lut)
    edges = np.searchsorted(group_O, np.arange(granularity.lut_groups(len(rows_OR), rows_per_lut) + 1))
    luts = []
    for first, last in pairwise(edges):
        members = rows_OR[first:last].reshape(-1)
        lut = _fit(members, None if mass_OR is None else mass_OR[first:last].reshape(-1), 1 << bits)
        if lut_dtype == "float16":
            lut = np.unique(lut.astype(np.float16)).astype(np.float32)
        if lut.size:  # a weight without elements has a palette without entries
            _assign(members, lut, codes_OR[first:last].reshape(-1))
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
    """The power of 2 by which float16 must be scaled to tell values apart as well as it can; 0 where they need none.

    >>> half_shift(np.array([0.3, -1], np.float32)), half_shift(np.array([1e-9], np.float32))
    (0, -30)
    """
    exponent = int(np.frexp(np.abs(values).max(initial=0))[1]) - 1
    return 0 if _LEAST_HALF <= exponent < _MOST_HALF else exponent


class _Points:
    """Sorted distinct values with prefix sums of their mass and moments, so that any run's mean costs two look-ups."""

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
        """Any order, any mass; what has no mass is left out."""
        return cls(*_distinct(values, mass), entries)

    def fit(self) -> Floats:
        """The palette: the best where that does not take long, else near it."""
        if len(self.x) <= self.entries:
            return self.true_x.astype(np.float32)
        if len(self.x) * self.entries > _EXACT_WORK:
            return self.palette(self.near_best(_CELLS_PER_ENTRY))
        return self.palette(self._best(np.arange(len(self.x) + 1)))

    def near_best(self, cells_per_entry: int) -> I64:
        """Edges of the best runs that are made of cells, and from there the nearest local optimum."""
        edges_C = self._cells(min(_MAX_CELLS, max(256, cells_per_entry * self.entries)))
        return self._lloyd(self._best(edges_C))

    def palette(self, edges: I64) -> Floats:
        """The means of runs."""
        first, last = self.true_x[edges[:-1]], self.true_x[edges[1:] - 1]
        means = np.clip(self._means(edges) + (first - self.x[edges[:-1]]), first, last)
        return np.unique(means.astype(np.float32))

    def _best(self, edges_C: I64) -> I64:
        """Edges of the best runs that are made of whole cells."""
        entries = min(self.entries, len(edges_C) - 1)
        return edges_C[optimal_runs(self._means(edges_C), np.diff(self.n[edges_C]), entries)]

    def _means(self, edges: I64) -> F64:
        means = np.diff(self.s[edges]) / np.diff(self.n[edges]) + self.centre
        return np.asarray(np.clip(means, self.x[edges[:-1]], self.x[edges[1:] - 1]))

    def errors(self, edges: I64) -> F64:
        """The squared error of each run to its mean."""
        errors = np.diff(self.q[edges]) - np.diff(self.s[edges]) ** 2 / np.diff(self.n[edges])
        errors[np.diff(edges) == 1] = 0
        return np.asarray(errors)

    def _cells(self, count: int) -> I64:
        """Edges of about `count` cells of like squared error: again and again the worst half is cut at its means.

        Unlike cells of like width or like mass this neither wastes cells on the gaps of a heavy tail nor lumps it.
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
        """Means of runs, runs of what is nearest to each mean, and again until nothing moves."""
        for _ in range(_LLOYD_STEPS):
            means = self._means(edges)
            cuts = np.searchsorted(self.x, (means[1:] + means[:-1]) / 2, side="right")
            moved = np.unique(np.concatenate([[0], cuts, [len(self.x)]]))
            if np.array_equal(moved, edges):
                break
            edges = moved
        return edges


def _distinct(values: Floats | F64, mass: npt.NDArray[Any] | None) -> tuple[F64, F64]:
    """The distinct values [U] in order, and the mass of each in parts of the largest one of a value."""
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
    # What hardly counts is held above the rounding error of the sums.
    return values[first_U].astype(np.float64), np.maximum(mass_U, mass_U.sum() * _LEAST_MASS)


def _gaps_shortened(sorted_U: F64, mass_U: F64, entries: int) -> F64:
    """The values, those gaps shortened that lie between the runs of every best palette.

    Beside an outlier of 1e30 all sums would lose the digits of the other values. With cuts at the widest gaps, the
    squared error is at most all mass times the squared sum of the other gaps; a run across a gap has at least half the
    least mass times the squared gap.
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
    """The palette for values and masses, 1-D both."""
    if mass is not None and not mass.any():
        mass = None
    lut = _fit_binned(values, mass, entries) if len(values) >= _MANY else None
    return _Points.of(values, mass, entries).fit() if lut is None else lut


def _fit_binned(values: Floats, mass: npt.NDArray[Any] | None, entries: int) -> Floats | None:
    """A palette near the best one for many values; None where bins are too coarse for them."""
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
    """A few values and masses in place of many, and the most that this moves them: squared distance per mass.

    Bins are so narrow that enough of them lie between the first and the last of nearly all values; the few outside are
    kept as they are. None where bins do not get so narrow.
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


def _assign(values: Floats, lut: Floats, codes: npt.NDArray[np.uint8]) -> None:
    """Write the code of each value; 1-D all of them."""
    if lut.ndim != 1 or not 1 <= lut.size <= 256:
        raise ConfigError(f"assign: lut must be [K] with 1 to 256 entries, got the shape {lut.shape}.")
    distinct, first = np.unique(lut, return_index=True)
    place_K, highest = first.astype(np.uint8), _highest_of_lower(distinct)
    bins = _bins_of_most(values) if len(values) >= _MANY_TO_ASSIGN else None
    if bins is None:
        for piece in pieces(len(values)):
            codes[piece] = place_K[np.searchsorted(highest, values[piece])]
        return
    ends_K = bins.of(highest)
    code_U = place_K[np.searchsorted(ends_K, np.arange(COUNT))].astype(np.int16)
    code_U[ends_K] = _OPEN
    for piece in pieces(len(values)):
        found = code_U[bins.of(values[piece])]
        still_open = np.flatnonzero(found == _OPEN)
        codes[piece] = found  # 256 becomes 0 until it is known
        codes[piece][still_open] = place_K[np.searchsorted(highest, values[piece][still_open])]


def _bins_of_most(values: Floats) -> Bins | None:
    """Bins that tell most values well apart, whatever a few are; None for values that are nearly all the same."""
    sample = np.sort(values[:: max(1, len(values) // _SAMPLE)])
    low, high = float(sample[len(sample) // 64]), float(sample[-1 - len(sample) // 64])
    return Bins.over(low - (high - low), high + (high - low))


def _prefix(values: F64) -> F64:
    sums = np.zeros(len(values) + 1)
    np.cumsum(values, out=sums[1:])
    return sums


def _highest_of_lower(lut_K: Floats) -> Floats:
    """[K - 1]: the highest float32 that is no nearer to entry k + 1 than to k: the exact midpoint, rounded down."""
    a, b = lut_K[:-1].astype(np.float64), lut_K[1:].astype(np.float64)
    twice = a + b
    lost = (a - (twice - (twice - a))) + (b - (twice - a))  # what rounding took from the sum, exactly
    midpoint = twice / 2
    nearest = midpoint.astype(np.float32)
    above = (nearest > midpoint) | ((nearest == midpoint) & (lost < 0))
    return np.where(above, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def checked_weights(weights: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """How much values count.

    Args:
        weights: any real dtype.
        shape: of the values.

    Raises:
        ConfigError: another shape, or one that is not finite or negative.
    """
    weights = np.asarray(weights)
    if weights.shape != shape:
        raise ConfigError(f"weights must have the shape of the values, {shape}, got {weights.shape}.")
    if not (weights.min(initial=0) >= 0 and np.isfinite(weights.max(initial=0))):  # either is NaN where one weight is
        raise ConfigError("weights must be finite and not negative, got a NaN, an Inf or a negative one.")
    return weights
