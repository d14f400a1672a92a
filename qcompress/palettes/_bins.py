"""Counts of values in bins of equal width: all that a palette needs of many values, without sorting them.

Shape suffixes: U = bins, N = values of a piece, T = values outside the bins.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

COUNT: Final = 1 << 15
PIECE: Final = 1 << 16
_MOST_OUTSIDE: Final = COUNT


def pieces(count: int) -> Iterator[slice]:
    """Yield slices of PIECE values each."""
    return (slice(start, start + PIECE) for start in range(0, count, PIECE))


@dataclass(frozen=True, slots=True)
class Bins:
    """COUNT bins of equal width; the first and the last hold the values below and above the others.

    A larger value is never in a lower bin.

    Args:
        low: where bin 2 starts.
        per_unit: bins in a stretch of 1.
    """

    low: np.float32
    per_unit: np.float32

    @classmethod
    def over(cls, low: float, high: float) -> Self | None:
        """Return bins whose first and last hold no value of [low, high]; None if float32 cannot tell them apart."""
        if not low < high:
            return None
        with np.errstate(over="ignore"):
            start, per_unit = np.float32(low), np.float32((COUNT - 4) / (high - low))
        return cls(start, per_unit) if np.isfinite(per_unit) else None

    def of(self, values_N: Floats) -> I64:
        """Return [N]: the bin of each value."""
        with np.errstate(over="ignore"):
            place_N = values_N - self.low
            place_N *= self.per_unit
        place_N += 2
        np.maximum(place_N, 0, out=place_N)
        np.minimum(place_N, COUNT - 1, out=place_N)
        return place_N.astype(np.int64)

    @property
    def width(self) -> float:
        """Width of a bin."""
        return 1 / float(self.per_unit)

    def middle(self, bins: I64) -> F64:
        """Return the middle of each bin."""
        return np.asarray(float(self.low) + (bins - 1.5) * self.width)

    def count(self, values: Floats, mass: npt.NDArray[np.generic] | None) -> tuple[F64, Floats, F64] | None:
        """Return the masses in the bins.

        Args:
            values: 1-D.
            mass: weight of each value, finite, at least 0, not all 0; None: 1 each.

        Returns:
            The mass [U] in each bin, 0 in the first and the last; then the values [T] outside and their masses. Masses
            are relative to the largest. None if too many values are outside.
        """
        largest = 1.0 if mass is None else float(mass.max())
        mass_U, outside, outside_mass, count = np.zeros(COUNT), [], [], 0
        for piece in pieces(len(values)):
            values_N = values[piece]
            mass_N = None if mass is None else mass[piece].astype(np.float64) / largest
            bins_N = self.of(values_N)
            mass_U += np.bincount(bins_N, mass_N, COUNT)
            outside_N = np.flatnonzero((bins_N == 0) | (bins_N == COUNT - 1))
            outside.append(values_N[outside_N])
            outside_mass.append(np.ones(len(outside_N)) if mass_N is None else mass_N[outside_N])
            count += len(outside_N)
            if count > _MOST_OUTSIDE:
                return None
        mass_U[0] = mass_U[-1] = 0
        return mass_U, np.concatenate(outside), np.concatenate(outside_mass)
