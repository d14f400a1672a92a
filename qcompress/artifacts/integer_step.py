"""Scales of integers: the step of which values are small multiples, and scales of at least a given size."""

from typing import Final

import numpy as np

from qcompress.artifacts.base import Floats

_LARGEST: Final = 127  # int8 with either sign


def common_step(values: Floats) -> np.float32 | None:
    """Return the largest float32 of which every value is a multiple by at most 127 (float32 products), or None."""
    magnitudes = np.unique(np.abs(values[values != 0]))
    if not len(magnitudes):
        return np.float32(1)
    if not np.isfinite(magnitudes[-1]):
        return None
    # The smallest value is j steps for some j. It and the largest value are rounded products, so the step that gives
    # both is within an ulp of the quotient.
    smallest, largest = float(magnitudes[0]), float(magnitudes[-1])
    j = np.arange(1, _LARGEST + 1)
    most = np.rint(largest * j / smallest)
    most = most[most <= _LARGEST]
    nearest = (largest / most).astype(np.float32)
    below, above = np.nextafter(nearest, np.float32(0)), np.nextafter(nearest, np.float32(largest))
    steps = np.unique(np.concatenate([below, nearest, above]))
    steps = steps[steps > 0]
    for magnitude in magnitudes:  # nearly all steps fail at the first one or two
        counts = np.rint(magnitude / steps)
        steps = steps[(counts <= _LARGEST) & (counts * steps == magnitude)]
    return np.float32(steps[-1]) if len(steps) else None


def raised_scale(scale: Floats, least_O: Floats) -> Floats:
    """Return a scale whose size is at least the given one, its sign kept.

    Args:
        scale: float32, 0-d or [O].
        least_O: float32 [O]; the largest counts where `scale` is 0-d.

    >>> raised_scale(np.array([-1.0, 3.0], np.float32), np.array([2.0, 2.0], np.float32)).tolist()
    [-2.0, 3.0]
    """
    size = np.maximum(np.abs(scale), least_O if scale.ndim else least_O.max())
    return np.asarray(np.copysign(size, scale), np.float32)
