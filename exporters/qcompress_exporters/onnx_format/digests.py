"""Digests that a file carries: of each decoded tensor under its name, and of each activation's grid."""

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompress.artifacts.base import Floats
from qcompress.artifacts.digest import digest, short_digest


def tensor_digest(name: str, values: npt.NDArray[Any]) -> str:
    """Return 11 characters for a decoded tensor under its name.

    >>> tensor_digest("a", np.zeros(2)) == tensor_digest("b", np.zeros(2))
    False
    """
    return short_digest(name.encode(), digest(np.asarray(values)).encode())


def grid_digest(
    site: tuple[str, int], scale: Floats, zero_point: int, offset: Floats, bits: int, thresholds: Floats | None
) -> str:
    """Return 11 characters for a grid at its site, as a file holds it.

    Args:
        site: of the activation.
        scale: float32 0-d.
        zero_point: stored code of 0 before a free offset is added.
        offset: the free offset, float32 0-d; 0 without one.
        bits: width of a code.
        thresholds: float32 [levels]; None for an even grid.

    >>> one, zero = np.float32(1), np.float32(0)
    >>> grid_digest(("x", -1), one, 0, zero, 8, None) == grid_digest(("x", -1), one, 1, zero, 8, None)
    False
    """
    numbers = np.array([scale, offset], np.float32).tobytes()
    return short_digest(
        repr((site, zero_point, bits)).encode(), numbers, b"" if thresholds is None else thresholds.tobytes()
    )
