"""The digests that a file carries: of each tensor's name and what it must decode to, of each activation's grid."""

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompress.artifacts.base import Floats
from qcompress.artifacts.digest import digest, short_digest


def tensor_digest(name: str, values: npt.NDArray[Any]) -> str:
    """11 characters for a decoded tensor under its name.

    >>> tensor_digest("a", np.zeros(2)) == tensor_digest("b", np.zeros(2))
    False
    """
    return short_digest(name.encode(), digest(np.asarray(values)).encode())


def grid_digest(
    site: tuple[str, int], scale: Floats, zero_point: int, offset: Floats, bits: int, thresholds: Floats | None
) -> str:
    """11 characters for a grid at its site, as a file has it.

    Args:
        site: what it quantizes.
        scale: float32.
        zero_point: the stored code of 0, or of `offset` where that is free.
        offset: float32; 0 unless it is free.
        bits: width of a code.
        thresholds: float32 [L]; None: the grid is uniform.

    >>> one, zero = np.float32(1), np.float32(0)
    >>> grid_digest(("x", -1), one, 0, zero, 8, None) == grid_digest(("x", -1), one, 1, zero, 8, None)
    False
    """
    numbers = np.array([scale, offset], np.float32).tobytes()
    return short_digest(
        repr((site, zero_point, bits)).encode(), numbers, b"" if thresholds is None else thresholds.tobytes()
    )
