"""Scalar k-means: a palette of at most 2**bits values per group of output channels.

Source: the optimum of one-dimensional k-means is found by dynamic programming (`_optimal`). On few distinct values it
is taken as it is. On many, the sorted values are first merged into cells, the optimum over the cells is found, and
Lloyd's iterations on prefix sums of the values themselves take it to a local optimum.
Deviations from plain k-means: no random start; the same values give the same palette.

Shape suffixes: N = values, U = cells, K = palette entries, O = output channels, R = elements of one output channel,
G = LUT groups.
"""

from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from qcompress import granularity
from qcompress.artifacts import PalettizedWeight
from qcompress.errors import ConfigError
from qcompress.packing import check_bits
from qcompress.palettes._optimal import F64, I64, optimal_runs
from qcompress.uniform import finite_floats

Floats = npt.NDArray[np.float32]

# Exact where distinct values * entries stay below this (about 0.1 s), else on cells.
_EXACT_WORK: Final = 1 << 17
_CELLS_PER_ENTRY: Final = 64
_MAX_CELLS: Final = 2048
_LLOYD_STEPS: Final = 300
_LEAST_MASS: Final = 1e-12
_ASSIGN_CHUNK: Final = 1 << 18


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
    mass = None if weights is None else _checked_weights(weights, values.shape)
    points = _Points.of(flat, mass)
    return points.fit(1 << bits)


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
    if lut.ndim != 1 or not 1 <= lut.size <= 256:
        raise ConfigError(f"assign: lut must be [K] with 1 to 256 entries, got the shape {lut.shape}.")
    distinct, place = np.unique(lut, return_index=True)
    highest = _highest_of_lower(distinct)
    codes = np.empty(flat.size, np.uint8)
    for start in range(0, flat.size, _ASSIGN_CHUNK):
        piece = slice(start, start + _ASSIGN_CHUNK)
        codes[piece] = place.astype(np.uint8)[np.searchsorted(highest, flat[piece], side="left")]
    return codes.reshape(values.shape)


def palettize(
    weight: npt.NDArray[Any],
    bits: int,
    rows_per_lut: int | None = None,
    axis: int = 0,
    weights: npt.NDArray[Any] | None = None,
) -> PalettizedWeight:
    """A weight as codes into one palette per `rows_per_lut` output channels.

    Args:
        weight: float32, float16 or bfloat16, finite.
        bits: width of a code, 1 to 8.
        rows_per_lut: output channels that share a palette; None: all.
        axis: the axis that counts output channels.
        weights: how much each element counts, shape of `weight`; None: all the same.

    Returns:
        The artifact. Palettes are sorted; one with fewer entries than the longest is padded with its last.

    Raises:
        ConfigError: as for `fit_lut`, or rows_per_lut below 1.

    >>> w = palettize(np.array([[1, 1, 2], [5, 6, 6]], np.float32), bits=1, rows_per_lut=1)
    >>> w.lut.tolist(), w.codes.tolist()
    ([[1.0, 2.0], [5.0, 6.0]], [[0, 0, 1], [0, 1, 1]])
    """
    check_bits(bits)
    rows_OR = granularity.rows(finite_floats(weight, "palettize"), axis)
    mass_OR = None if weights is None else granularity.rows(_checked_weights(weights, weight.shape), axis)
    group_O = granularity.group_of_row(len(rows_OR), rows_per_lut)
    codes_OR = np.zeros(rows_OR.shape, np.uint8)
    luts = []
    for group in range(granularity.lut_groups(len(rows_OR), rows_per_lut)):
        members = group_O == group
        luts.append(fit_lut(rows_OR[members], bits, None if mass_OR is None else mass_OR[members]))
        if luts[-1].size:  # a weight without elements has a palette without entries
            codes_OR[members] = assign(rows_OR[members], luts[-1])
    entries = max(len(lut) for lut in luts)
    codes = granularity.from_rows(codes_OR, weight.shape, axis)
    return PalettizedWeight(
        codes=np.array(codes, np.uint8, order="C"),
        lut=np.stack(
            [np.pad(lut, (0, entries - len(lut)), mode="edge") if len(lut) < entries else lut for lut in luts]
        ),
        bits=bits,
        axis=axis,
        rows_per_lut=rows_per_lut,
    )


class _Points:
    """Sorted values with prefix sums of their mass and first two moments, so that any run's mean costs two look-ups."""

    def __init__(self, sorted_N: F64, mass_N: F64 | None) -> None:
        centre = float(sorted_N.mean()) if len(sorted_N) else 0.0
        self.x = sorted_N
        self.centre = centre
        shifted = sorted_N - centre
        first = shifted if mass_N is None else shifted * mass_N
        self.n = np.arange(len(sorted_N) + 1, dtype=np.float64) if mass_N is None else _prefix(mass_N)
        self.s = _prefix(first)
        self.q = _prefix(first * shifted)

    @classmethod
    def of(cls, flat: Floats, mass: F64 | None) -> Self:
        """Any order, any mass; what has no mass is left out."""
        flat = flat + np.float32(0)  # -0.0 becomes 0.0: one value, one bit pattern
        if mass is None or not mass.any():
            return cls(np.sort(flat).astype(np.float64), None)
        mass = mass.ravel() / mass.max()
        counted = np.flatnonzero(mass)
        order = counted[np.argsort(flat[counted], kind="stable")]
        # What hardly counts is held above the rounding error of the sums.
        return cls(flat[order].astype(np.float64), np.maximum(mass[order], mass.sum() * _LEAST_MASS))

    def fit(self, entries: int) -> Floats:
        """The palette of at most `entries` values."""
        first_of_U = np.flatnonzero(np.diff(self.x, prepend=-np.inf)) if len(self.x) else np.zeros(0, np.int64)
        if len(first_of_U) <= entries:
            return self.x[first_of_U].astype(np.float32)
        if len(first_of_U) * entries <= _EXACT_WORK:
            edges_U = np.append(first_of_U, len(self.x))
            return np.unique(self._means(self._best(edges_U, entries)).astype(np.float32))
        edges_U = self._cells(min(_MAX_CELLS, max(256, _CELLS_PER_ENTRY * entries)))
        return np.unique(self._lloyd(self._means(self._best(edges_U, entries))).astype(np.float32))

    def _best(self, edges_U: I64, entries: int) -> I64:
        """Edges of the best `entries` runs that are made of whole cells."""
        entries = min(entries, len(edges_U) - 1)
        return edges_U[optimal_runs(self._means(edges_U), np.diff(self.n[edges_U]), entries)]

    def _means(self, edges: I64) -> F64:
        means = np.diff(self.s[edges]) / np.diff(self.n[edges]) + self.centre
        # Beside an outlier of 1e10 the sums of small values lose their digits: a mean still lies among its values.
        return np.asarray(np.clip(means, self.x[edges[:-1]], self.x[edges[1:] - 1]))

    def _cells(self, count: int) -> I64:
        """Edges of about `count` cells of like squared error: again and again the worst half is cut at its means.

        Unlike cells of like width or like mass this neither wastes cells on the gaps of a heavy tail nor lumps it.
        """
        edges = np.array([0, len(self.x)])
        while len(edges) - 1 < count:
            means = self._means(edges)
            error = np.diff(self.q[edges]) - np.diff(self.s[edges]) ** 2 / np.diff(self.n[edges])
            error[self.x[edges[:-1]] == self.x[edges[1:] - 1]] = 0
            worst = np.argsort(-error, kind="stable")[: min(max(1, len(error) // 2), count + 1 - len(edges))]
            worst = worst[error[worst] > 0]
            if not len(worst):
                break
            cuts = np.searchsorted(self.x, means[worst], side="right")
            edges = np.union1d(edges, np.clip(cuts, edges[worst] + 1, edges[worst + 1] - 1))
        return edges

    def _lloyd(self, centroids_K: F64) -> F64:
        """Nearest entry, mean of its values, and again until nothing moves."""
        for _ in range(_LLOYD_STEPS):
            cuts = np.searchsorted(self.x, (centroids_K[1:] + centroids_K[:-1]) / 2, side="right")
            edges = np.concatenate([[0], cuts, [len(self.x)]])
            kept = np.flatnonzero(np.diff(edges))  # an entry that lost its last value stays where it is
            moved = centroids_K.copy()
            moved[kept] = self._means(edges[np.append(kept, len(centroids_K))])
            moved.sort()
            if np.array_equal(moved, centroids_K):
                break
            centroids_K = moved
        return centroids_K


def _prefix(values: F64) -> F64:
    return np.concatenate([[0.0], np.cumsum(values)])


def _highest_of_lower(lut_K: Floats) -> Floats:
    """[K - 1]: the highest float32 that is no nearer to entry k + 1 than to k: the exact midpoint, rounded down."""
    a, b = lut_K[:-1].astype(np.float64), lut_K[1:].astype(np.float64)
    twice = a + b
    lost = (a - (twice - (twice - a))) + (b - (twice - a))  # what rounding took from the sum, exactly
    midpoint = twice / 2
    nearest = midpoint.astype(np.float32)
    above = (nearest > midpoint) | ((nearest == midpoint) & (lost < 0))
    return np.where(above, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def _checked_weights(weights: npt.NDArray[Any], shape: tuple[int, ...]) -> F64:
    wide = np.asarray(weights, np.float64)
    if wide.shape != shape:
        raise ConfigError(f"weights must have the shape of the values, {shape}, got {wide.shape}.")
    if not np.isfinite(wide).all() or (wide < 0).any():
        raise ConfigError("weights must be finite and not negative, got a NaN, an Inf or a negative one.")
    return wide
