"""Statistics of one tensor over its finite values, computed in chunks, so that memory stays bounded for any size.

Moments are exact to rounding even if the mean is large against the standard deviation: values are scaled by a power of
two (exact; fourth powers then neither overflow nor underflow), shifted by the smallest one, and centred on their mean.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

_CHUNK: Final = 1 << 17
# If one value of ten differs from the others, it is exactly 3σ from the mean; rounding must not move it beyond.
_TIE: Final = 1 + 1e-12


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TensorStatistics:
    """Statistics of a tensor's finite values; None for each statistic that is undefined.

    Args:
        count: number of elements.
        non_finite: how many of them are NaN or infinite; all other statistics leave them out.
        min: smallest value.
        max: largest value.
        mean: mean.
        std: population standard deviation.
        kurtosis: fourth standardised moment, 3 for a normal distribution; None if all values are equal.
        beyond_3_sigma: share of values farther than 3 standard deviations from the mean, 0 to 1.
        beyond_6_sigma: the same for 6.
    """

    count: int
    non_finite: int
    min: float | None = None
    max: float | None = None
    mean: float | None = None
    std: float | None = None
    kurtosis: float | None = None
    beyond_3_sigma: float | None = None
    beyond_6_sigma: float | None = None

    @property
    def range(self) -> float | None:
        """Largest minus smallest value; None also if that overflows float64."""
        if self.min is None or self.max is None:
            return None
        width = self.max - self.min
        return width if math.isfinite(width) else None


def statistics(values: npt.NDArray[Any]) -> TensorStatistics:
    """Return the statistics of a tensor of any real dtype, bfloat16 and float8 included; booleans count as 0 and 1.

    Complex values have no order, so they are only counted. `values` is not modified.

    >>> s = statistics(np.array([0, 0, 0, 4], np.float32))
    >>> s.mean, s.std, s.range, round(s.kurtosis, 3), s.beyond_3_sigma
    (1.0, 1.7320508075688772, 4.0, 2.333, 0.0)
    >>> statistics(np.array([1.0, np.nan])).non_finite
    1
    """
    values = np.asarray(values)
    if values.dtype.kind == "c":
        return TensorStatistics(count=values.size, non_finite=_non_finite(values))
    finite, low, high = 0, math.inf, -math.inf
    for x in _finite_chunks(values):
        finite += x.size
        low, high = min(low, float(x.min())), max(high, float(x.max()))
    non_finite = values.size - finite
    if not finite:
        return TensorStatistics(count=values.size, non_finite=non_finite)
    if low == high:
        return TensorStatistics(
            count=values.size,
            non_finite=non_finite,
            min=low,
            max=high,
            mean=low,
            std=0.0,
            beyond_3_sigma=0.0,
            beyond_6_sigma=0.0,
        )
    return _moments(values, finite, low, high)


def _moments(values: npt.NDArray[Any], finite: int, low: float, high: float) -> TensorStatistics:
    exponent = math.frexp(max(abs(low), abs(high)))[1]
    shift = math.ldexp(low, -exponent)

    def shifted() -> Iterator[Doubles]:
        for x in _finite_chunks(values):
            yield np.ldexp(x, -exponent) - shift

    mean = math.fsum(float(x.sum()) for x in shifted()) / finite
    sums = [(float(d.sum()), float((d**2).sum()), float((d**4).sum())) for d in (x - mean for x in shifted())]
    first, second, fourth = (math.fsum(column) / finite for column in zip(*sums, strict=True))
    variance = second - first**2  # `first` is the rounding error of the mean
    std = math.sqrt(variance)
    beyond = [0, 0]
    for d in (np.abs(x - mean) for x in shifted()):
        for i, sigmas in enumerate((3, 6)):
            beyond[i] += int(np.count_nonzero(d > sigmas * std * _TIE))
    return TensorStatistics(
        count=values.size,
        non_finite=values.size - finite,
        min=low,
        max=high,
        mean=math.ldexp(shift + mean, exponent),
        std=math.ldexp(std, exponent),
        kurtosis=fourth / variance**2,
        beyond_3_sigma=beyond[0] / finite,
        beyond_6_sigma=beyond[1] / finite,
    )


def _chunks(values: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """Yield the elements in memory order, a bounded number at a time; as views if the layout allows it."""
    if values.flags.c_contiguous or values.flags.f_contiguous:
        flat: Any = values.ravel(order="K")
    else:
        flat = values.flat
    for start in range(0, values.size, _CHUNK):
        yield flat[start : start + _CHUNK]


def _finite_chunks(values: npt.NDArray[Any]) -> Iterator[Doubles]:
    for chunk in _chunks(values):
        with np.errstate(invalid="ignore"):  # signalling NaNs warn when they are widened
            x = chunk.astype(np.float64)
        x = x[np.isfinite(x)]
        if x.size:
            yield x


def _non_finite(values: npt.NDArray[Any]) -> int:
    return sum(int(np.count_nonzero(~np.isfinite(chunk))) for chunk in _chunks(values))
