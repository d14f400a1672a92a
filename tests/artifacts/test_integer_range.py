"""Integer grids: the limits of every width."""

import numpy as np
import pytest

from qcompress.artifacts.integer_range import IntegerRange
from qcompress.errors import ConfigError


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_grid_has_two_to_the_bits_codes_and_holds_zero(bits, signed):
    limits = IntegerRange(bits, signed)
    assert limits.p - limits.n + 1 == 1 << bits
    assert limits.n <= 0 <= limits.p


@pytest.mark.parametrize(("signed", "dtype"), [(False, np.uint8), (True, np.int8)])
def test_eight_bits_are_numpys_limits(signed, dtype):
    limits = IntegerRange(8, signed)
    assert (limits.n, limits.p) == (np.iinfo(dtype).min, np.iinfo(dtype).max)


def test_one_signed_bit_is_minus_one_and_zero():
    assert (IntegerRange(1, signed=True).n, IntegerRange(1, signed=True).p) == (-1, 0)


@pytest.mark.parametrize("bits", [0, 9])
def test_a_width_outside_1_to_8_is_refused(bits):
    with pytest.raises(ConfigError, match=rf"^bits must be in \[1, 8\], got {bits}\.$"):
        IntegerRange(bits, signed=True)
