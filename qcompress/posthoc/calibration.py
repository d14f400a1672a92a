"""Post-hoc activation grids: observe a value of the graph over calibration batches, choose its scale and zero point.

The grid is per tensor, affine and unsigned: u = clip(rint(x / scale) + zero_point, 0, levels), levels = 2**bits - 1,
and x_hat = (u - zero_point) * scale. Real 0 is always on the grid: padding with zeros costs nothing.

Sources:
    mse: LSQ+, Bhalgat et al. 2020, section 3.2: the initialisation that minimises |x_hat - x|² over scale and offset.
        Deviations: the offset is a whole number of steps (real 0 stays on the grid); the minimum is found by search
        over every zero point and a fine list of scales in place of gradient descent.
    entropy: Migacz, "8-bit Inference with TensorRT", GTC 2017. Deviations: see `entropy`.

Shape suffixes: B = bins of one side of 0, outward; S = scales that are tried; N = codes on one side of 0, 0 to levels.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt

from qcompress.artifacts.packing import check_bits
from qcompress.errors import ConfigError, DataError, did_you_mean

Doubles = npt.NDArray[np.float64]

# A bin holds the values that share sign, exponent and the first 10 bits of the mantissa: it is at most 1/1024 of the
# value wide, a quarter of a step at the far end of an 8-bit grid and less everywhere else. 20 octaves from the largest
# magnitude down are kept apart; what is smaller falls into the two bins next to 0.
_MANTISSA_BITS: Final = 10
_OCTAVES: Final = 20
_BINS: Final = _OCTAVES << _MANTISSA_BITS
_SHIFT: Final = 23 - _MANTISSA_BITS
_CHUNK: Final = 1 << 16

_THRESHOLDS: Final = 2048  # Migacz's number of histogram bins
_COARSE_SCALES: Final = 128
_FINE_SCALES: Final = 24
_REFINEMENTS: Final = 2


@final
class Observer:
    """Histogram of everything that one activation was seen to be, in bounded memory (about 0.3 MB), in one pass.

    Bins are cut by the bits of float32, so their edges depend on the largest magnitude alone: neither the order of the
    values nor how they are batched changes the histogram. Exact zeros are counted apart from the bins.

    Args:
        what: names the observed value in errors.

    >>> seen = Observer("the input of conv1")
    >>> seen.observe(np.array([0.0, 1.0, 3.0], np.float32))
    >>> seen.count, seen.zeros, seen.min, seen.max
    (3, 1, 0.0, 3.0)
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.count = 0
        self.zeros = 0
        self.min = math.inf
        self.max = -math.inf
        self._first = 0  # the leading bits of the magnitudes in bin 0
        self._counts = np.zeros((2, _BINS), np.int64)  # of positive values, of negative values

    def observe(self, values: npt.NDArray[Any]) -> None:
        """Add values of any shape and float dtype; they count as float32 and are not modified.

        Raises:
            DataError: some are not finite in float32; then none is added.
        """
        if not values.size:
            return
        with np.errstate(over="ignore", invalid="ignore"):
            low, high = float(np.float32(values.min())), float(np.float32(values.max()))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DataError(self._not_finite(values))
        self.min, self.max = min(self.min, low), max(self.max, high)
        self._widen(max(abs(low), abs(high)))
        flat = values.ravel(order="K")
        size = min(_CHUNK, flat.size)
        scratch, leading, index = np.empty(size, np.float32), np.empty(size, np.uint32), np.empty(size, np.int64)
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK].astype(np.float32, copy=False)
            n = chunk.size
            self._count(chunk, scratch[:n], leading[:n], index[:n], signed=low < 0)
        self.count += flat.size

    def _count(
        self,
        chunk: npt.NDArray[np.float32],
        scratch: npt.NDArray[np.float32],
        leading: npt.NDArray[np.uint32],
        index: npt.NDArray[np.int64],
        *,
        signed: bool,
    ) -> None:
        """One chunk; the three arrays after it are room to work in: fresh memory would cost as much as the counting."""
        zeros = int(np.count_nonzero(chunk == 0))
        np.add(chunk, np.float32(0), out=scratch)  # -0 becomes 0
        bits = scratch.view(np.uint32)
        np.bitwise_and(bits, np.uint32(0x7FFFFFFF), out=leading)
        leading >>= np.uint32(_SHIFT)
        np.maximum(leading, np.uint32(self._first), out=leading)
        leading -= np.uint32(self._first)
        if signed:
            bits >>= np.uint32(31)
            bits *= np.uint32(_BINS)
            leading += bits
        index[:] = leading  # bincount would make this copy itself
        counts = np.bincount(index)
        self._counts.reshape(-1)[: counts.size] += counts
        self._counts[0, 0] -= zeros
        self.zeros += zeros

    def _widen(self, largest: float) -> None:
        octave = int(np.float32(largest).view(np.uint32)) >> 23
        first = max(octave - _OCTAVES + 1, 0) << _MANTISSA_BITS
        moved = min(first - self._first, _BINS - 1)
        if moved > 0:
            self._counts[:, moved] += self._counts[:, :moved].sum(axis=1)
            self._counts[:, : _BINS - moved] = self._counts[:, moved:].copy()
            self._counts[:, _BINS - moved :] = 0
            self._first = first

    def _not_finite(self, values: npt.NDArray[Any]) -> str:
        with np.errstate(over="ignore", invalid="ignore"):
            finite = np.isfinite(values.astype(np.float32, copy=False))
        bad = values.size - int(np.count_nonzero(finite))
        return (
            f"{self.what} must be finite in float32 on calibration data, got {bad} of {values.size} that "
            "are not: leave those samples out."
        )

    def histogram(self) -> "Histogram":
        """What was seen so far.

        Raises:
            DataError: nothing was.
        """
        if not self.count:
            raise DataError(f"{self.what} must be observed before a grid is chosen, got no calibration data.")
        edges = np.arange(self._first, self._first + _BINS + 1, dtype=np.uint32) << np.uint32(_SHIFT)
        edges_B = edges.view(np.float32).astype(np.float64)
        edges_B[0] = 0
        return Histogram(
            count=self.count,
            min=self.min,
            max=self.max,
            positive=_side(edges_B, self._counts[0], self.min, self.max),
            negative=_side(edges_B, self._counts[1], -self.max, -self.min),
        )


@final
@dataclass(frozen=True, kw_only=True)
class Side:
    """The values on one side of 0, by magnitude, taken as spread evenly over each bin [B].

    Args:
        left: lower edges, rising; the first bin starts at 0 and may be empty.
        right: upper edges, each above its lower one.
        counts: values in each bin.
    """

    left: Doubles
    right: Doubles
    counts: Doubles

    @cached_property
    def _before(self) -> tuple[Doubles, Doubles, Doubles]:
        """Count, sum and sum of squares of all lower bins, [B + 1]."""
        a, b = self.left, self.right
        moments = (self.counts, self.counts * (a + b) / 2, self.counts * (a * a + a * b + b * b) / 3)
        zeroth, first, second = (np.concatenate(([0.0], np.cumsum(m))) for m in moments)
        return zeroth, first, second

    @property
    def totals(self) -> tuple[float, float, float]:
        """Count, sum and sum of squares of the magnitudes."""
        zeroth, first, second = self._before
        return float(zeroth[-1]), float(first[-1]), float(second[-1])

    def below(self, limits: Doubles) -> tuple[Doubles, Doubles, Doubles]:
        """Count, sum and sum of squares of the magnitudes below each limit (>= 0); one within a bin cuts it."""
        i = np.searchsorted(self.left, limits, side="right") - 1
        a, b = self.left[i], self.right[i]
        u = np.minimum(limits, b)
        cut = self.counts[i] * ((u - a) / (b - a))  # the whole count where u is b, to the last bit
        zeroth, first, second = (column[i] for column in self._before)
        return zeroth + cut, first + cut * (a + u) / 2, second + cut * (a * a + a * u + u * u) / 3

    def magnitude(self, rank: int) -> float:
        """The magnitude of that rank, 0 for the smallest, to within its bin."""
        i = int(np.searchsorted(self._before[0], rank, side="right")) - 1
        share = (rank + 0.5 - self._before[0][i]) / self.counts[i]
        return float(self.left[i] + share * (self.right[i] - self.left[i]))


@final
@dataclass(frozen=True, kw_only=True)
class Histogram:
    """What an observer saw, as the methods read it.

    Args:
        count: number of values, zeros included.
        min: smallest value.
        max: largest value.
        positive: the values above 0.
        negative: the values below 0.
    """

    count: int
    min: float
    max: float
    positive: Side
    negative: Side

    @property
    def range(self) -> tuple[float, float]:
        """From the smallest to the largest value, 0 included."""
        return min(self.min, 0.0), max(self.max, 0.0)

    def value(self, rank: int) -> float:
        """The value of that rank, 0 for the smallest, to within its bin."""
        negative, positive = int(self.negative.totals[0]), int(self.positive.totals[0])
        if rank < negative:
            return -self.negative.magnitude(negative - 1 - rank)
        rank -= self.count - positive
        return self.positive.magnitude(rank) if rank >= 0 else 0.0


def minmax(seen: Histogram, levels: int, upper: float) -> tuple[float, float]:
    """The range of all values: nothing is clipped. `levels` and `upper` play no part."""
    return seen.range


def percentile(seen: Histogram, levels: int, upper: float) -> tuple[float, float]:
    """From the (100 - upper)th to the upper-th percentile of all values, zeros among them; 0 is included.

    Percentiles are interpolated between values as numpy does. Where both ends are 0 (nearly all values are), the range
    of all values. `levels` plays no part.
    """

    def at(share: float) -> float:
        rank = share / 100 * (seen.count - 1)
        low = math.floor(rank)
        below, above = seen.value(low), seen.value(min(low + 1, seen.count - 1))
        return below + (rank - low) * (above - below)

    low, high = min(at(100 - upper), 0.0), max(at(upper), 0.0)
    return (low, high) if low < high else seen.range


def entropy(seen: Histogram, levels: int, upper: float) -> tuple[float, float]:
    """The range [max(min, -T), min(max, T)] whose histogram loses the least information. `upper` plays no part.

    Source: Migacz 2017. The values other than exact zeros are counted in bins of width w = max|x| / 2048, with 0 on an
    edge. Every threshold T = i·w whose range holds at least levels + 1 bins is tried:

    - P: the counts in the range; what lies outside is added to the bin at its end; divided by the sum.
    - Q: the n bins of the range, without what lies outside, make levels + 1 groups, bin j (from 0) being in group
      floor(j·(levels + 1) / n). A group's count is shared evenly among its bins in which P > 0; divided by the sum.
    - The smallest KL(P‖Q) = Σ P·log(P / Q) wins, of equal ones the smallest T.

    Deviations: T acts on each side alone, so that a range need not be symmetric; groups differ by at most one bin (in
    place of a last one that takes the remainder); KL is infinite where Q is 0 and P is not (no smoothing by an ε).
    """
    low, high = seen.range
    width = max(-low, high) / _THRESHOLDS
    below, above = _linear(seen.negative, -low, width), _linear(seen.positive, high, width)
    thresholds = np.arange(1, _THRESHOLDS + 1)
    start = len(below) - np.minimum(thresholds, len(below))
    stop = len(below) + np.minimum(thresholds, len(above))
    enough = stop - start > levels
    kl = _divergences(np.concatenate((below[::-1], above)), start[enough], stop[enough], levels + 1)
    threshold = float(thresholds[enough][np.argmin(kl)]) * width
    return max(low, -threshold), min(high, threshold)


def mse(seen: Histogram, levels: int, upper: float) -> tuple[float, float]:
    """The grid with the least Σ(x_hat - x)². `upper` plays no part.

    Source: LSQ+, section 3.2. For one scale the errors of both sides of 0 are independent given the zero point, so one
    pass over the cells of a side gives the error of every zero point; the scales are searched from coarse to fine. With
    the codes u held fixed the best scale is Σ|k||x| / Σk², k = u - zero_point, |k| <= levels, and |k| rises with |x|;
    so (Chebyshev's sum inequality) it is at least the mean of |x| of one of the sides, divided by levels.
    """
    low, high = seen.range
    zero_points = np.arange(levels + 1)
    if not low < 0 < high:
        zero_points = zero_points[:1] if high > 0 else zero_points[-1:]

    def errors(scales_S: Doubles) -> Doubles:
        positive, negative = _errors(seen.positive, scales_S, levels), _errors(seen.negative, scales_S, levels)
        return positive[:, levels - zero_points] + negative[:, zero_points]

    means = [total / count for count, total, _ in (seen.positive.totals, seen.negative.totals) if count]
    plain = float(_affine(low, high, levels)[0])
    scales_S = np.sort(np.append(np.geomspace(min(means) / levels, 2 * (high - low) / levels, _COARSE_SCALES), plain))
    for _ in range(_REFINEMENTS + 1):
        table = errors(scales_S)
        best, at = (int(i) for i in np.unravel_index(np.argmin(table), table.shape))
        scale, zero_point = float(scales_S[best]), int(zero_points[at])
        near = scales_S[max(best - 1, 0)], scales_S[min(best + 1, len(scales_S) - 1)]
        scales_S = np.sort(np.append(np.geomspace(*near, _FINE_SCALES), scale))
    return -zero_point * scale, (levels - zero_point) * scale


# The table of methods: what was seen, levels, upper percentile -> range. A new one is a function above and a line here.
Method = Callable[[Histogram, int, float], tuple[float, float]]
METHODS: Final[Mapping[str, Method]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}


def grid(observer: Observer, bits: int, method: str = "mse", *, percentile: float = 99.99) -> tuple[np.float32, int]:
    """Scale and zero point for what an observer saw.

    A method's range [low, high] becomes scale = (high - low) / levels and zero_point = rint(-low / scale): 0 is on the
    grid, and every value of the range is within half a step of a level. Zeros alone get scale 1, zero point 0. The
    scale is a normal float32, so magnitudes below 1e-38 may all become 0.

    Args:
        observer: what was seen.
        bits: width of a code, 1 to 8.
        method: a key of `METHODS`.
        percentile: the upper one, for that method: above 50, at most 100.

    Raises:
        ConfigError: an argument is not one of those.
        DataError: nothing was observed.

    >>> seen = Observer("x")
    >>> seen.observe(np.array([-1.0, 0.0, 2.0], np.float32))
    >>> grid(seen, 2, "minmax")
    (np.float32(1.0), 1)
    """
    check_bits(bits)
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}.{did_you_mean(method, METHODS)}")
    if not 50 < percentile <= 100:
        raise ConfigError(f"percentile must be above 50 and at most 100, got {percentile!r}.")
    seen = observer.histogram()
    if seen.range == (0.0, 0.0):
        return np.float32(1), 0
    levels = (1 << bits) - 1
    return _affine(*METHODS[method](seen, levels, percentile), levels)


def saturation(observer: Observer, scale: float | np.float32, zero_point: int, bits: int) -> float:
    """Share of the observed values that lie beyond the ends of a grid by more than half a step, 0 to 1.

    >>> seen = Observer("x")
    >>> seen.observe(np.array([0.0, 1.0, 2.0, 9.0], np.float32))
    >>> saturation(seen, 1.0, 0, 2)
    0.25
    """
    seen = observer.histogram()
    beyond = 0.0
    for side, codes in _sides(seen, zero_point, bits):
        beyond += side.totals[0] - float(side.below(np.array([(codes + 0.5) * float(scale)]))[0][0])
    return beyond / seen.count


def sqnr_db(observer: Observer, scale: float | np.float32, zero_point: int, bits: int) -> float:
    """Signal to quantization noise of a grid on what was observed, 10·log10(Σx² / Σ(x_hat - x)²), in dB.

    Infinite where nothing is lost, zeros alone for one.

    >>> seen = Observer("x")
    >>> seen.observe(np.full(10, 3.0, np.float32))
    >>> round(sqnr_db(seen, 2.0, 0, 1), 3)  # 3 becomes 2: 10·log10(9 / 1)
    9.542
    """
    signal = noise = 0.0
    for side, codes in _sides(observer.histogram(), zero_point, bits):
        signal += side.totals[2]
        noise += float(_errors(side, np.array([float(scale)]), codes)[0, codes])
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf


def _sides(seen: Histogram, zero_point: int, bits: int) -> tuple[tuple[Side, int], tuple[Side, int]]:
    """Each side with the codes that it has beyond 0."""
    return (seen.positive, (1 << bits) - 1 - zero_point), (seen.negative, zero_point)


def _side(edges_B: Doubles, counts_B: npt.NDArray[np.int64], low: float, high: float) -> Side:
    """The bins in use, cut to [low, high], behind an empty one that starts at 0."""
    used = np.flatnonzero(counts_B)
    left_B = np.concatenate(([0.0], np.maximum(edges_B[used], low)))
    right_B = np.concatenate(([0.0], np.minimum(edges_B[used + 1], high)))
    return Side(
        left=left_B,
        right=np.maximum(right_B, np.nextafter(left_B, np.inf)),
        counts=np.concatenate(([0.0], counts_B[used].astype(np.float64))),
    )


def _affine(low: float, high: float, levels: int) -> tuple[np.float32, int]:
    """Scale and zero point of a range that includes 0."""
    scale = (high - low) / levels
    limits = np.finfo(np.float32)
    return np.float32(min(max(scale, float(limits.tiny)), float(limits.max))), round(-low / scale)


def _errors(side: Side, scales_S: Doubles, levels: int) -> Doubles:
    """Σ(x_hat - x)² over one side, [S, N]: for each scale, and for 0 to `levels` codes on that side."""
    codes_N = np.arange(levels + 1)
    edges_SN: Doubles = np.maximum(codes_N - 0.5, 0) * scales_S[:, None]
    values_SN: Doubles = codes_N * scales_S[:, None]
    below = side.below(edges_SN)

    def distance(moments: tuple[Doubles, Doubles, Doubles], to: Doubles) -> Doubles:
        zeroth, first, second = moments
        return second - 2 * to * first + to * to * zeroth

    zeroth, first, second = (np.diff(moment, axis=1) for moment in below)
    cells = np.cumsum(distance((zeroth, first, second), values_SN[:, :-1]), axis=1)
    zeroth, first, second = (total - moment for total, moment in zip(side.totals, below, strict=True))
    beyond = distance((zeroth, first, second), values_SN)
    beyond[:, 1:] += cells
    return beyond


def _linear(side: Side, reach: float, width: float) -> Doubles:
    """Counts of one side in bins of equal width, outward from 0 to `reach`."""
    edges = np.arange(min(math.ceil(reach / width), _THRESHOLDS) + 1, dtype=np.float64) * width
    edges[-1] = np.inf
    return np.diff(side.below(edges)[0])


def _divergences(counts: Doubles, start: npt.NDArray[Any], stop: npt.NDArray[Any], groups: int) -> Doubles:
    """KL(P‖Q) as in `entropy` for each range of bins [start, stop): sums over bins are differences of running sums."""
    running = np.concatenate(([0.0], np.cumsum(counts)))
    total = running[-1]
    used = np.concatenate(([0], np.cumsum(counts > 0)))
    x_log_x = np.concatenate(([0.0], np.cumsum(_x_log_x(counts))))
    below, above = running[start], total - running[stop]
    inside = total - below - above
    first, last = counts[start], counts[stop - 1]

    edges = start[:, None] - (-np.arange(groups + 1) * (stop - start)[:, None] // groups)
    q = np.diff(running[edges], axis=1)
    p, bins = q.copy(), np.diff(used[edges], axis=1)
    p[:, 0] += below
    p[:, -1] += above
    bins[:, 0] += (first == 0) & (below > 0)
    bins[:, -1] += (last == 0) & (above > 0)

    p_log_p = x_log_x[stop] - x_log_x[start] - _x_log_x(first) - _x_log_x(last)
    p_log_p += _x_log_x(first + below) + _x_log_x(last + above)
    lost = ((p > 0) & (q == 0)).any(axis=1)
    share = q / np.maximum(bins, 1)
    share[share == 0] = 1
    p_log_q = (p * np.log(share)).sum(axis=1)
    kl = (p_log_p - p_log_q) / total + np.log(np.where(lost, 1, inside) / total)
    return np.where(lost, np.inf, kl)


def _x_log_x(x: Doubles) -> Doubles:
    return x * np.log(np.where(x > 0, x, 1))
