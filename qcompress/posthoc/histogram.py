"""Histograms of observed activations, in bounded memory and one pass.

Shape suffixes: B = bins of one side of 0, outward.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt

from qcompress.errors import DataError

Doubles = npt.NDArray[np.float64]

# A bin holds the values that share sign, exponent and the first 10 bits of the mantissa. It is at most 1/1024 of the
# value wide: a quarter of a step at the far end of an 8-bit grid, and less everywhere else. The bins span 20 octaves
# from the largest magnitude down; smaller values fall into the two bins next to 0.
_MANTISSA_BITS: Final = 10
_OCTAVES: Final = 20
_BINS: Final = _OCTAVES << _MANTISSA_BITS
_SHIFT: Final = 23 - _MANTISSA_BITS
_CHUNK: Final = 1 << 16


@final
class Observer:
    """Collects the histogram of one activation in one pass and about 0.3 MB.

    Bin edges follow the bits of float32 and depend only on the largest magnitude, so the order of the values and the
    batch size do not change the histogram. Exact zeros are counted separately.

    Args:
        what: the name of the observed value for error messages.

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
        self._counts = np.zeros((2, _BINS), np.int64)  # positive values, negative values

    def observe(self, values: npt.NDArray[Any]) -> None:
        """Add values.

        Args:
            values: any shape and float dtype; rounded to float32; not modified.

        Raises:
            DataError: some values are not finite in float32. No value is added then.
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
        """Count one chunk.

        Args:
            chunk: the values.
            scratch: buffer of the chunk's size, like the two below: allocating would take as long as counting.
            leading: buffer.
            index: buffer.
            signed: whether any observed value is negative.
        """
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
            f"{self.what} must be finite in float32 on calibration data, but {bad} of {values.size} values are not; "
            "remove the samples that cause them."
        )

    def histogram(self) -> "Histogram":
        """Return the histogram of all values so far.

        Raises:
            DataError: no value was observed.
        """
        if not self.count:
            raise DataError(f"{self.what} was not observed: its grid needs calibration data.")
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
    """The values on one side of 0, by magnitude, assumed to be evenly distributed within each bin.

    Args:
        left: [B] lower edges, ascending; the first bin starts at 0 and may be empty.
        right: [B] upper edges, each above its lower edge.
        counts: [B] number of values in each bin.
    """

    left: Doubles
    right: Doubles
    counts: Doubles

    @cached_property
    def _before(self) -> tuple[Doubles, Doubles, Doubles]:
        """Count, sum and sum of squares over all lower bins, each [B + 1]."""
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
        """Return count, sum and sum of squares of the magnitudes below each limit.

        Args:
            limits: any shape, at least 0; a limit within a bin cuts it.
        """
        i = np.searchsorted(self.left, limits, side="right") - 1
        a, b = self.left[i], self.right[i]
        u = np.minimum(limits, b)
        cut = self.counts[i] * ((u - a) / (b - a))  # exactly the whole count if u equals b
        zeroth, first, second = (column[i] for column in self._before)
        return zeroth + cut, first + cut * (a + u) / 2, second + cut * (a * a + a * u + u * u) / 3

    def magnitude(self, rank: int) -> float:
        """Return the magnitude with the given rank, 0 for the smallest, to within its bin."""
        i = int(np.searchsorted(self._before[0], rank, side="right")) - 1
        share = (rank + 0.5 - self._before[0][i]) / self.counts[i]
        return float(self.left[i] + share * (self.right[i] - self.left[i]))


@final
@dataclass(frozen=True, kw_only=True)
class Histogram:
    """The values that an observer saw, for the calibration methods.

    Args:
        count: number of values, including zeros.
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
        """Smallest and largest value; 0 is always included."""
        return min(self.min, 0.0), max(self.max, 0.0)

    def value(self, rank: int) -> float:
        """Return the value with the given rank, 0 for the smallest, to within its bin."""
        negative, positive = int(self.negative.totals[0]), int(self.positive.totals[0])
        if rank < negative:
            return -self.negative.magnitude(negative - 1 - rank)
        rank -= self.count - positive
        return self.positive.magnitude(rank) if rank >= 0 else 0.0


def _side(edges_B: Doubles, counts_B: npt.NDArray[np.int64], low: float, high: float) -> Side:
    """Return the bins in use, cut to [low, high], after an empty bin that starts at 0."""
    used = np.flatnonzero(counts_B)
    left_B = np.concatenate(([0.0], np.maximum(edges_B[used], low)))
    right_B = np.concatenate(([0.0], np.minimum(edges_B[used + 1], high)))
    return Side(
        left=left_B,
        right=np.maximum(right_B, np.nextafter(left_B, np.inf)),
        counts=np.concatenate(([0.0], counts_B[used].astype(np.float64))),
    )
