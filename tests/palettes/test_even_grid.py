"""Rounding to a uniform grid: the nearest code, the scale that the largest weight asks for, and no channel is lost."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompress.artifacts.base import broadcast_scale
from qcompress.errors import ConfigError
from qcompress.palettes.even_grid import finite_floats, round_to_nearest, symmetric_scale
from tests.helpers.reference import round_uniform

TINY = float(np.finfo(np.float32).tiny)
# What a code at every width still has a normal scale for, and what needs rounding of exact halves.
WEIGHTS = st.floats(-(2.0**60), 2.0**60, width=32) | st.integers(-20, 20).map(lambda n: n / 4)
SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, max_side=5)


@st.composite
def cases(draw, elements=WEIGHTS):
    """A weight, an axis of it, and options."""
    shape = draw(SHAPES)
    weight = draw(hnp.arrays(np.float32, shape, elements=elements))
    options = {
        "bits": draw(st.integers(2, 8)),
        "reduce_range": draw(st.booleans()),
        "per_channel": draw(st.booleans()),
        "axis": draw(st.integers(0, len(shape) - 1)),
    }
    return weight, options


def largest_code(options):
    return (1 << (min(options["bits"], 7) if options["reduce_range"] else options["bits"]) - 1) - 1


@given(cases(WEIGHTS.filter(lambda v: v == 0 or abs(v) > 1e-30)))
def test_it_is_what_the_slow_version_gives(case):
    weight, options = case
    got = round_to_nearest(weight, **options)
    codes, scale = round_uniform(weight, largest_code(options), options["axis"] if options["per_channel"] else None)
    np.testing.assert_array_equal(got.codes, codes)
    np.testing.assert_array_equal(got.scale, scale)


@given(cases())
def test_no_other_code_is_nearer(case):
    weight, options = case
    got = round_to_nearest(weight, **options)
    p = largest_code(options)
    assert np.abs(got.codes.astype(int)).max() <= p
    scale = np.broadcast_to(broadcast_scale(got.scale, weight.shape, got.axis), weight.shape)
    for w, code, step in zip(weight.flat, got.codes.flat, scale.flat, strict=True):
        off = abs(Fraction(float(w)) - int(code) * Fraction(float(step)))
        for other in (int(code) - 1, int(code) + 1):
            assert abs(other) > p or abs(Fraction(float(w)) - other * Fraction(float(step))) >= off


@given(cases())
def test_the_largest_of_a_channel_has_the_largest_code_and_every_scale_is_normal(case):
    weight, options = case
    got = round_to_nearest(weight, **options)
    assert got.bits == options["bits"]
    assert got.zero_point is None
    assert np.isfinite(got.scale).all()
    assert (got.scale >= TINY).all()
    axes = tuple(i for i in range(weight.ndim) if i != got.axis)
    most = np.abs(got.codes.astype(int)).max(axis=axes)
    magnitude = np.abs(weight).max(axis=axes)
    assert ((most == largest_code(options)) | (magnitude < TINY * 128)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_is_on_the_grid_stays_as_it_is(dtype):
    codes = np.arange(-63, 64).reshape(1, -1)
    weight = (codes * 0.25).astype(dtype)
    assert round_to_nearest(weight, 7).codes.tolist() == codes.tolist()
    np.testing.assert_array_equal(round_to_nearest(weight, 7).dequantize(), weight.astype(np.float32))


def test_channels_of_zeros_or_next_to_nothing_are_zeros_with_a_scale_of_one():
    got = round_to_nearest(np.array([[0.0, -0.0], [1e-45, -1e-40], [0.5, 1.0]], np.float32), 8)
    assert got.codes.tolist() == [[0, 0], [0, 0], [64, 127]]
    assert got.scale.tolist() == [1, 1, np.float32(1) / np.float32(127)]


@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_without_elements_or_axes(per_channel):
    empty = round_to_nearest(np.zeros((3, 0), np.float32), 4, per_channel=per_channel)
    assert empty.scale.tolist() == ([1, 1, 1] if per_channel else 1)
    scalar = round_to_nearest(np.array(-3, np.float32), 2, per_channel=per_channel)
    assert (scalar.codes, scalar.scale, scalar.axis) == (-1, 3, None)


def test_the_scales_of_channels_beat_one_for_all():
    weight = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32) * np.logspace(-2, 0, 16)[:, None]
    error = {
        per_channel: np.square(
            round_to_nearest(weight.astype(np.float32), 4, per_channel=per_channel).dequantize() - weight
        ).sum()
        for per_channel in (True, False)
    }
    assert error[True] < error[False] / 2


@given(hnp.arrays(np.float32, SHAPES, elements=st.floats(-1e6, 1e6, width=32)))
def test_the_input_is_not_modified(weight):
    before = weight.copy()
    round_to_nearest(weight, 4)
    np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize(
    ("weight", "bits", "message"),
    [
        (
            np.zeros(3, np.float32),
            1,
            r"bits must be in \[2, 8\] for an even grid \(signed codes of 1 bit are only -1 and 0\), got 1; "
            r'use scheme = "palette", which writes 1 bit as two values\.',
        ),
        (np.zeros(3, np.float32), 9, r"bits must be in \[1, 8\], got 9\."),
        (np.zeros(3), 4, r"Weights to round must be float32, float16 or bfloat16, got float64\."),
        (np.array([1, np.nan], np.float32), 4, r"Weights to round must be finite, got 1 NaN or Inf among 2\."),
    ],
)
def test_what_cannot_be_rounded_is_refused(weight, bits, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        round_to_nearest(weight, bits)


def test_the_step_is_per_index_of_an_axis():
    values = np.array([[1, -6], [3, 2]], np.float32)
    assert symmetric_scale(values, 3, axis=1).tolist() == [1, 2]
    assert symmetric_scale(values, 3, axis=None).tolist() == 2
    assert finite_floats(values, "round") is values


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("per_channel", [True, False])
def test_clipping_finds_the_least_error(bits, per_channel):
    weight = np.random.default_rng(bits).standard_t(4, (6, 200)).astype(np.float32)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def error(row, scale):
        return float(((np.clip(np.round(row / scale), low, high) * scale - row) ** 2).sum())

    found = round_to_nearest(weight, bits, per_channel=per_channel, clip=True)
    rows = weight.astype(np.float64) if per_channel else weight.astype(np.float64).reshape(1, -1)
    for row, scale in zip(rows, np.atleast_1d(found.scale), strict=True):
        best = min(error(row, s) for s in np.linspace(0.01, 1, 2000) * np.abs(row).max() / high)
        assert error(row, scale) <= 1.02 * best
    plain = round_to_nearest(weight, bits, per_channel=per_channel)
    assert ((found.dequantize() - weight) ** 2).sum() < ((plain.dequantize() - weight) ** 2).sum()


def test_clipping_keeps_what_is_exact():
    weight = np.array([[-7, 1, 0], [0, 0, 0], [0.25, 0.25, 0.25]], np.float32)
    assert round_to_nearest(weight, 4, clip=True).dequantize().tolist() == weight.tolist()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [((5, 12), 0), ((12, 5), 1), ((5, 10), 0)])
def test_each_block_is_rounded_as_a_row_of_its_own(shape, axis, clip):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = round_to_nearest(weight, 3, axis, clip=clip, block_size=4)
    assert (found.axis, found.block_size) == (1 - axis, 4)
    rows, got = (np.moveaxis(values, axis, 0) for values in (weight, found.dequantize()))
    for start in range(0, rows.shape[1], 4):
        alone = round_to_nearest(rows[:, start : start + 4], 3, clip=clip)
        np.testing.assert_array_equal(got[:, start : start + 4], alone.dequantize())
        np.testing.assert_array_equal(np.moveaxis(found.scale, axis, 0)[:, start // 4], alone.scale)


def test_blocks_hold_an_outlier_s_harm():
    weight = np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32)
    weight[:, 5] *= 50
    errors = {
        size: np.square(round_to_nearest(weight, 4, clip=True, block_size=size).dequantize() - weight).sum()
        for size in (None, 64, 16)
    }
    assert errors[16] < errors[64] < errors[None]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 3, 4)])
@pytest.mark.parametrize("block_size", [2, 10**12])
def test_blocks_of_any_shape(shape, block_size):
    found = round_to_nearest(np.ones(shape, np.float32), 4, block_size=block_size)
    np.testing.assert_array_equal(found.dequantize(), np.ones(shape, np.float32))


def test_blocks_of_a_vector_are_refused():
    message = r"^block_size needs a weight with inputs and outputs, got 2 for shape \[3\]; remove it\.$"
    with pytest.raises(ConfigError, match=message):
        round_to_nearest(np.ones(3, np.float32), 4, block_size=2)
