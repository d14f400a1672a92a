"""Packing: exact inverse pairs, exact sizes, and the bit order that the docstring promises."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompress.artifacts.packing import check_bits, from_planes, pack, packed_nbytes, to_planes, unpack
from qcompress.errors import ConfigError
from tests.helpers.reference import pack_bit_by_bit

WIDTHS = st.integers(1, 8)


@st.composite
def bits_and_codes(draw):
    bits = draw(WIDTHS)
    codes = draw(st.lists(st.integers(0, (1 << bits) - 1), max_size=40))
    return bits, np.array(codes, np.uint8)


@given(bits_and_codes())
def test_unpack_inverts_pack(case):
    bits, codes = case
    packed = pack(codes, bits)
    assert packed.nbytes == packed_nbytes(len(codes), bits) == -(-len(codes) * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits, len(codes)), codes)


@given(bits_and_codes())
def test_pack_equals_the_bit_by_bit_reference(case):
    bits, codes = case
    assert pack(codes, bits).tobytes() == pack_bit_by_bit(codes.tolist(), bits)


@given(st.data())
def test_planes_are_an_exact_inverse_pair_and_each_packs_by_itself(data):
    widths = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=4).filter(lambda w: sum(w) <= 16))
    bits = sum(widths)
    dtype = np.uint8 if bits <= 8 else np.uint16
    codes = np.array(data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=1, max_size=30)), dtype)
    planes = to_planes(codes, widths)
    stored = [pack(plane, width) for plane, width in zip(planes, widths, strict=True)]
    again = [unpack(p, width, codes.size) for p, width in zip(stored, widths, strict=True)]
    np.testing.assert_array_equal(from_planes(again, widths), codes)
    assert all(int(plane.max()) < 1 << width for plane, width in zip(planes, widths, strict=True))


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_of_every_width_survives(bits):
    codes = np.arange(1 << bits, dtype=np.uint8)
    np.testing.assert_array_equal(unpack(pack(codes, bits), bits, codes.size), codes)


def test_three_bits_are_a_two_bit_and_a_one_bit_plane():
    low, high = to_planes(np.array([[0b101, 0b010]], np.uint8), (2, 1))
    assert low.tolist() == [[0b01, 0b10]]
    assert high.tolist() == [[1, 0]]


def test_nothing_is_written_into_the_arguments():
    codes = np.array([1, 2, 3], np.uint8)
    packed = pack(codes, 8)
    packed[0] = 99
    planes = to_planes(codes, (2, 1))
    from_planes(planes, (2, 1))[0] = 99
    assert codes.tolist() == [1, 2, 3]
    assert planes[0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("bits", range(1, 9))
def test_any_shape_packs_in_row_major_order(shape, bits):
    codes = np.random.default_rng(0).integers(0, 1 << bits, shape).astype(np.uint8)
    np.testing.assert_array_equal(pack(np.asfortranarray(codes), bits), pack(codes.ravel(), bits))


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_a_width_outside_1_to_8_is_refused(bits):
    wanted = rf"^bits must be in \[1, 8\], got {bits}\.$"
    with pytest.raises(ConfigError, match=wanted):
        check_bits(bits)
    with pytest.raises(ConfigError, match=wanted):
        pack(np.zeros(1, np.uint8), bits)
    with pytest.raises(ConfigError, match=wanted):
        unpack(np.zeros(1, np.uint8), bits, 1)


@pytest.mark.parametrize("code", [4, 255])
def test_a_code_that_does_not_fit_is_refused(code):
    with pytest.raises(ConfigError, match=rf"^pack: every code must be in \[0, 2\*\*2 = 4\), got {code}\.$"):
        pack(np.array([0, code], np.uint8), 2)


@pytest.mark.parametrize("code", [-1, 256, 300])
def test_a_code_beyond_uint8_is_refused_and_not_wrapped(code):
    with pytest.raises(ConfigError, match=rf"^pack: every code must be in \[0, 2\*\*8 = 256\), got {code}\.$"):
        pack(np.array([0, code]), 8)


def test_bytes_that_do_not_belong_to_the_count_are_refused():
    with pytest.raises(ConfigError, match=r"^unpack: 5 codes of 3 bits take 2 bytes, got 3\.$"):
        unpack(np.zeros(3, np.uint8), 3, 5)


def test_a_word_has_at_most_16_bits():
    with pytest.raises(ConfigError, match=r"^a word must have at most 16 bits, got planes of 8 \+ 8 \+ 1\.$"):
        to_planes(np.zeros(1, np.uint16), (8, 8, 1))
