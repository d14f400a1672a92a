"""Activation ranges without training: methods that choose scale and zero point from a histogram.

The grid is per tensor, affine and unsigned: u = clip(rint(x / scale) + zero_point, 0, levels), levels = 2**bits - 1,
and x_hat = (u - zero_point) * scale. Real 0 is always on the grid, so zero padding is exact.

Sources:
    mse: LSQ+, Bhalgat et al. 2020, section 3.2: the initialisation that minimises |x_hat - x|² over scale and offset.
        Deviations: the offset is a whole number of steps (real 0 stays on the grid); the minimum is found by a search
        over all zero points and a fine list of scales, not by gradient descent.
    entropy: Migacz, "8-bit Inference with TensorRT", GTC 2017. Deviations: see `entropy`.

Shape suffixes: S = candidate scales; N = codes on one side of 0, 0 to levels.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompress.artifacts.packing import check_bits
from qcompress.errors import ConfigError, did_you_mean
from qcompress.posthoc.histogram import Doubles, Histogram, Observer, Side

_THRESHOLDS: Final = 2048  # Migacz's number of histogram bins
_COARSE_SCALES: Final = 128
_FINE_SCALES: Final = 24
_REFINEMENTS: Final = 2


def minmax(seen: Histogram, levels: int, upper: float) -> tuple[float, float]:
    """Return the range of all values: nothing is clipped. `levels` and `upper` are unused."""
    return seen.range


def percentile(seen: Histogram, levels: int, upper: float) -> tuple[float, float]:
    """Return the range from the (100 - upper)th to the upper-th percentile of all values; 0 is included.

    Percentiles count zeros and are interpolated as numpy does. If both ends are 0 (nearly all values are), the range of
    all values is returned. `levels` is unused.
    """

    def at(share: float) -> float:
        rank = share / 100 * (seen.count - 1)
        low = math.floor(rank)
        below, above = seen.value(low), seen.value(min(low + 1, seen.count - 1))
        return below + (rank - low) * (above - below)

    low, high = min(at(100 - upper), 0.0), max(at(upper), 0.0)
    return (low, high) if low < high else seen.range


def entropy(seen: Histogram, levels: int, upper: float) -> tuple[float, float]:
    """Return the range [max(min, -T), min(max, T)] whose histogram loses the least information. `upper` is unused.

    Source: Migacz 2017. The values other than exact zeros are counted in bins of width w = max|x| / 2048, with 0 on an
    edge. Every threshold T = i·w whose range holds at least levels + 1 bins is tried:

    - P: the counts in the range, with the counts outside added to the bin at each end; divided by the sum.
    - Q: the n bins of the range, without the counts outside, form levels + 1 groups; bin j (from 0) is in group
      floor(j·(levels + 1) / n). A group's count is shared evenly among its bins in which P > 0; divided by the sum.
    - The smallest KL(P‖Q) = Σ P·log(P / Q) wins; of equal ones, the smallest T.

    Deviations: T clips each side independently, so the range need not be symmetric; groups differ by at most one bin
    (the last one does not take the remainder); KL is infinite where Q is 0 and P is not (no smoothing by an ε).
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
    """Return the range of the grid with the least Σ(x_hat - x)². `upper` is unused.

    Source: LSQ+, section 3.2. Given a scale and a zero point, the errors of both sides of 0 are independent, so one
    pass over the cells of a side gives the errors of all zero points. Scales are searched from coarse to fine. For
    fixed codes u the best scale is Σ|k||x| / Σk², k = u - zero_point, |k| <= levels, and |k| rises with |x|; so by
    Chebyshev's sum inequality it is at least the mean of |x| of one of the sides, divided by levels.
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


# The table of methods: (histogram, levels, upper percentile) -> range. A new method is a function and a line here.
Method = Callable[[Histogram, int, float], tuple[float, float]]
METHODS: Final[Mapping[str, Method]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}


def check_method(method: str, upper: float) -> None:
    """Refuse an unknown method, and a percentile out of range.

    Raises:
        ConfigError: says which values are legal.
    """
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}.{did_you_mean(method, METHODS)}")
    if not 50 < upper <= 100:
        raise ConfigError(f"percentile must be above 50 and at most 100, got {upper!r}.")


def choose_grid(observer: Observer, bits: int, method: str, upper: float) -> tuple[np.float32, int]:
    """Return scale and zero point for what an observer saw.

    A method's range [low, high] becomes scale = (high - low) / levels and zero_point = rint(-low / scale): 0 is on the
    grid, and each value of the range is within half a step of a level. If all values are 0, the scale is 1 and the zero
    point 0. The scale is a normal float32, so all magnitudes below 1e-38 may become 0.

    Args:
        observer: has seen all calibration data.
        bits: width of a code, 1 to 8.
        method: a key of `METHODS`.
        upper: the upper percentile, above 50 and at most 100; used by the method `percentile`.

    Raises:
        ConfigError: an argument is out of range.
        DataError: no value was observed.

    >>> seen = Observer("x")
    >>> seen.observe(np.array([-1.0, 0.0, 2.0], np.float32))
    >>> choose_grid(seen, 2, "minmax", 99.99)
    (np.float32(1.0), 1)
    """
    check_bits(bits)
    check_method(method, upper)
    seen = observer.histogram()
    if seen.range == (0.0, 0.0):
        return np.float32(1), 0
    levels = (1 << bits) - 1
    return _affine(*METHODS[method](seen, levels, upper), levels)


def saturation(observer: Observer, scale: float | np.float32, zero_point: int, bits: int) -> float:
    """Return the share of the observed values that are more than half a step beyond the ends of a grid, 0 to 1.

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
    """Return a grid's signal-to-quantization-noise ratio on the observed values, 10·log10(Σx² / Σ(x_hat - x)²), in dB.

    It is infinite if no value changes, for example if all values are 0.

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
    """Return each side of 0 with the number of its codes."""
    return (seen.positive, (1 << bits) - 1 - zero_point), (seen.negative, zero_point)


def _affine(low: float, high: float, levels: int) -> tuple[np.float32, int]:
    """Return scale and zero point for a range that includes 0."""
    scale = (high - low) / levels
    limits = np.finfo(np.float32)
    return np.float32(min(max(scale, float(limits.tiny)), float(limits.max))), round(-low / scale)


def _errors(side: Side, scales_S: Doubles, levels: int) -> Doubles:
    """Return Σ(x_hat - x)² over one side as [S, N]: for each scale, and for 0 to `levels` codes on that side."""
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
    """Return the counts of one side in bins of equal width, outward from 0 to `reach`."""
    edges = np.arange(min(math.ceil(reach / width), _THRESHOLDS) + 1, dtype=np.float64) * width
    edges[-1] = np.inf
    return np.diff(side.below(edges)[0])


def _divergences(counts: Doubles, start: npt.NDArray[Any], stop: npt.NDArray[Any], groups: int) -> Doubles:
    """Return KL(P‖Q) as in `entropy` for each range of bins [start, stop), from differences of running sums."""
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
