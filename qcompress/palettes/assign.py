"""The nearest palette entry of each value, exactly, with a table over bins in place of a search for each value.

Shape suffixes: K = palette entries, U = bins.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompress.errors import ConfigError
from qcompress.palettes._bins import COUNT, Bins, pieces
from qcompress.palettes.even_grid import finite_floats

Floats = npt.NDArray[np.float32]

_MANY: Final = 1 << 15  # values from which a table over bins is faster than a search for each value
_SAMPLE: Final = 1024
_OPEN: Final = 256  # in a table of codes: the values of this bin have several codes


def assign(values: npt.NDArray[Any], lut: Floats) -> npt.NDArray[np.uint8]:
    """Return the code of the nearest entry for each value; of two equally near entries, the lower.

    Args:
        values: float32, float16 or bfloat16, any shape, finite.
        lut: float32 [K], 1 <= K <= 256; of equal entries the first is used.

    Returns:
        uint8 in the shape of `values`.

    Raises:
        ConfigError: there are no entries or more than 256, or a value is not finite.

    >>> assign(np.array([-9.0, 0.5, 0.6], np.float32), np.array([0, 1], np.float32)).tolist()
    [0, 0, 1]
    """
    flat = finite_floats(values, "palettize").ravel()
    codes = np.empty(flat.size, np.uint8)
    assign_into(flat, lut, codes)
    return codes.reshape(values.shape)


def assign_into(values: Floats, lut: Floats, codes: npt.NDArray[np.uint8]) -> None:
    """Write the code of the nearest entry for each value.

    Args:
        values: float32, 1-D, finite.
        lut: as in `assign`.
        codes: uint8 in the shape of `values`; written to.
    """
    if lut.ndim != 1 or not 1 <= lut.size <= 256:
        raise ConfigError(f"lut must be [K] with 1 to 256 entries, got shape {lut.shape}.")
    distinct, first = np.unique(lut, return_index=True)
    place_K, highest = first.astype(np.uint8), _highest_of_lower(distinct)
    bins = _bins_of_most(values) if len(values) >= _MANY else None
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
        codes[piece] = found  # _OPEN wraps to 0 and is replaced below
        codes[piece][still_open] = place_K[np.searchsorted(highest, values[piece][still_open])]


def _bins_of_most(values: Floats) -> Bins | None:
    """Return bins that tell most values well apart, with few outliers; None if nearly all values are equal."""
    sample = np.sort(values[:: max(1, len(values) // _SAMPLE)])
    low, high = float(sample[len(sample) // 64]), float(sample[-1 - len(sample) // 64])
    return Bins.over(low - (high - low), high + (high - low))


def _highest_of_lower(lut_K: Floats) -> Floats:
    """Return [K - 1]: the largest float32 that is not nearer to entry k + 1 than to k (the midpoint, rounded down)."""
    a, b = lut_K[:-1].astype(np.float64), lut_K[1:].astype(np.float64)
    twice = a + b
    lost = (a - (twice - (twice - a))) + (b - (twice - a))  # the exact rounding error of the sum
    midpoint = twice / 2
    nearest = midpoint.astype(np.float32)
    above = (nearest > midpoint) | ((nearest == midpoint) & (lost < 0))
    return np.where(above, np.nextafter(nearest, np.float32(-np.inf)), nearest)
