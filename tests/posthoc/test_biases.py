"""Scales that are large enough for a bias in 32 bits, whatever their sign."""

import numpy as np
import pytest

from qcompress.artifacts import IntegerWeight, PalettizedWeight

LEAST_O = np.array([2.0, 0.5], np.float32)


def test_a_negative_scale_stays_negative():
    """Training makes such: a BatchNorm's negative γ, folded. They were taken for small ones, and all codes lost."""
    weight = IntegerWeight(
        codes=np.array([[4, -2], [7, 1]], np.int8), scale=np.array([-1, -1], np.float32), bits=4, axis=0
    )
    found = weight.raised(LEAST_O)
    assert found.scale.tolist() == [-2, -1]
    assert found.codes.tolist() == [[2, -1], [7, 1]]
    assert np.array_equal(found.dequantize(), weight.dequantize())


@pytest.mark.parametrize("sign", [1, -1])
def test_a_palette_takes_the_nearest_entries(sign):
    lut = np.array([[-8, -4, -1, 2]], np.int8)
    codes = np.array([[0, 1, 3], [0, 1, 3]], np.uint8)
    weight = PalettizedWeight(codes=codes, lut=lut, bits=2, scale=np.array([sign, sign], np.float32))
    found = weight.raised(LEAST_O)
    assert found.scale.tolist() == [2 * sign, sign]
    assert found.codes.tolist() == [[1, 2, 3], [0, 1, 3]]  # of -4, -2 and 1 steps
