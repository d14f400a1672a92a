"""Artifacts: the floats they stand for, the bytes they take, and a stored form that comes back equal."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompress.artifacts import (
    ARTIFACTS,
    ActivationGrid,
    Artifact,
    FloatWeight,
    IntegerWeight,
    PalettizedWeight,
    ThresholdGrid,
)
from qcompress.artifacts.base import along_axis, bits_per_weight, broadcast_scale
from qcompress.artifacts.digest import digest, short_digest
from qcompress.artifacts.granularity import lut_groups
from qcompress.artifacts.integer_range import IntegerRange
from qcompress.errors import ConfigError
from tests.helpers.reference import dequantize_palette, dequantize_uniform, pack_bit_by_bit

SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=4)
FINITE = st.floats(-100, 100, width=32)


def _floats(draw, shape):
    return np.asarray(draw(hnp.arrays(np.float32, shape, elements=FINITE)))


def _lut_and_scale(draw, shape, channels):
    """float32 or float16 with or without a scale, or int8 with one."""
    scale_shape = draw(st.sampled_from([(), (channels,)]))
    dtype = draw(st.sampled_from([np.float32, np.float16, np.int8]))
    if dtype == np.int8:
        return draw(hnp.arrays(np.int8, shape)), _floats(draw, scale_shape)
    return _floats(draw, shape).astype(dtype), _floats(draw, scale_shape) if draw(st.booleans()) else None


@st.composite
def palettized(draw):
    bits, shape = draw(st.integers(1, 8)), draw(SHAPES)
    axis = draw(st.integers(0, len(shape) - 1))
    rows_per_lut = draw(st.none() | st.integers(1, 5))
    entries = draw(st.integers(1, 1 << min(bits, 4)))
    lut, scale = _lut_and_scale(draw, (lut_groups(shape[axis], rows_per_lut), entries), shape[axis])
    return PalettizedWeight(
        codes=draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, entries - 1))),
        lut=lut,
        bits=bits,
        axis=axis,
        rows_per_lut=rows_per_lut,
        scale=scale,
    )


@st.composite
def palettized_vectors(draw):
    shape, d = draw(SHAPES), draw(st.integers(2, 4))
    entries = draw(st.integers(1, 4))
    count = -(-int(np.prod(shape)) // d)
    axis = draw(st.integers(0, len(shape) - 1))
    lut, scale = _lut_and_scale(draw, (1, entries, d), shape[axis])
    return PalettizedWeight(
        codes=draw(hnp.arrays(np.uint8, (count,), elements=st.integers(0, entries - 1))),
        lut=lut,
        bits=2,
        axis=axis,
        weight_shape=shape,
        scale=scale,
    )


@st.composite
def uniform(draw):
    bits, shape, signed = draw(st.integers(1, 8)), draw(SHAPES), draw(st.booleans())
    dtype = np.int8 if signed else np.uint8
    low = -(1 << (bits - 1)) if signed else 0
    codes = st.integers(low, low + (1 << bits) - 1)
    axis = draw(st.none() | st.integers(0, len(shape) - 1))
    block_size = None if axis is None else draw(st.none() | st.integers(1, 5))
    scale_shape = () if axis is None else (shape[axis],)
    if axis is not None and block_size is not None:
        scale_shape = (*shape[:axis], -(-shape[axis] // block_size), *shape[axis + 1 :])
    return IntegerWeight(
        codes=draw(hnp.arrays(dtype, shape, elements=codes)),
        scale=np.asarray(_floats(draw, scale_shape)),
        bits=bits,
        axis=axis,
        block_size=block_size,
        zero_point=np.asarray(draw(hnp.arrays(dtype, scale_shape, elements=codes))) if draw(st.booleans()) else None,
    )


@st.composite
def floats(draw):
    dtype = draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, np.int64]))
    values = draw(hnp.arrays(np.int8, draw(SHAPES)))
    return FloatWeight(values=values.astype(dtype), reason="by plan")


# A new artifact is drawn here and is then held to everything below.
DRAWN = {"palette": palettized() | palettized_vectors(), "uniform": uniform(), "float": floats()}


def test_every_artifact_of_the_table_is_drawn():
    assert set(DRAWN) == set(ARTIFACTS)
    assert all(cls.kind == kind for kind, cls in ARTIFACTS.items())


@pytest.mark.parametrize("kind", ARTIFACTS)
@given(data=st.data())
def test_the_stored_form_comes_back_equal(kind, data):
    artifact = data.draw(DRAWN[kind])
    arrays, fields = artifact.to_arrays()
    again = ARTIFACTS[kind].from_arrays(arrays, fields)
    arrays_again, fields_again = again.to_arrays()
    assert fields_again == fields
    assert arrays_again.keys() == arrays.keys()
    for suffix, array in arrays.items():
        assert arrays_again[suffix].dtype == array.dtype
        np.testing.assert_array_equal(arrays_again[suffix], array)
    np.testing.assert_array_equal(again.dequantize(), artifact.dequantize())


@pytest.mark.parametrize("kind", ARTIFACTS)
@given(data=st.data())
def test_dequantize_gives_the_weight_in_its_own_shape(kind, data):
    artifact = data.draw(DRAWN[kind])
    weight = artifact.dequantize()
    assert isinstance(artifact, Artifact)
    assert weight.shape == artifact.shape
    assert weight.flags.c_contiguous
    assert bits_per_weight(artifact) == 8 * artifact.nbytes / weight.size


@pytest.mark.parametrize("kind", ARTIFACTS)
@given(data=st.data(), elements=st.integers(1, 40))
def test_parts_joined_are_the_whole(kind, data, elements):
    artifact = data.draw(DRAWN[kind])
    for axis in range(len(artifact.shape)):
        parts = artifact.parts(axis, elements)
        assert all(np.prod(part.shape) <= elements for part in parts)
        if parts:
            joined = np.concatenate([part.dequantize() for part in parts], axis)
            assert joined.tobytes() == artifact.dequantize().tobytes()
            assert len(parts) == 1 or np.prod(artifact.shape) > elements


def test_what_cannot_be_cut_there_has_no_parts():
    codes = np.zeros((6, 10), np.uint8)
    grouped = PalettizedWeight(codes=codes, lut=np.zeros((2, 2), np.float32), bits=1, rows_per_lut=3)
    assert [len(grouped.parts(axis, 29)) for axis in (0, 1)] == [0, 3]
    vectors = PalettizedWeight(
        codes=codes[:5, :4].ravel(), lut=np.zeros((1, 2, 4), np.float32), bits=1, weight_shape=(10, 8)
    )
    assert [len(vectors.parts(axis, 39)) for axis in (0, 1)] == [3, 0]
    assert vectors.parts(0, 7) == []


@given(palettized())
def test_a_palette_equals_the_slow_loop(artifact):
    scale = None if artifact.scale is None else np.broadcast_to(artifact.scale, artifact.shape[artifact.axis])
    slow = dequantize_palette(artifact.codes, artifact.lut, artifact.axis, artifact.rows_per_lut, scale)
    np.testing.assert_array_equal(artifact.dequantize(), slow)


@given(palettized_vectors())
def test_a_palette_of_vectors_equals_the_slow_loop(artifact):
    scale = np.broadcast_to(np.float32(1) if artifact.scale is None else artifact.scale, artifact.shape[artifact.axis])
    flat = [np.float32(value) for code in artifact.codes for value in artifact.lut[0, code]]
    slow = [value * scale[at[artifact.axis]] for at, value in zip(np.ndindex(artifact.shape), flat, strict=False)]
    np.testing.assert_array_equal(artifact.dequantize().ravel(), slow)


@given(uniform())
def test_a_uniform_grid_equals_the_slow_loop(artifact):
    slow = dequantize_uniform(artifact.codes, artifact.scale, artifact.zero_point, artifact.axis, artifact.block_size)
    np.testing.assert_array_equal(artifact.dequantize(), slow)


@given(palettized())
def test_nbytes_is_what_the_packed_codes_and_tables_take(artifact):
    packed = pack_bit_by_bit(artifact.codes.ravel().tolist(), artifact.bits)
    scales = 0 if artifact.scale is None else artifact.scale.nbytes
    assert artifact.nbytes == len(packed) + artifact.lut.itemsize * artifact.lut.size + scales


def test_sixteen_bit_floats_take_two_bytes_and_widen_exactly():
    values = np.array([1.5, -0.1, 65280.0], ml_dtypes.bfloat16)
    artifact = FloatWeight(values=values, reason="too small")
    assert artifact.nbytes == 6
    assert artifact.dequantize().dtype == np.float32
    assert artifact.dequantize().astype(ml_dtypes.bfloat16).tobytes() == values.tobytes()


def test_a_weight_without_elements_takes_no_bits_per_weight():
    assert bits_per_weight(FloatWeight(values=np.zeros((0, 3), np.float32), reason="by plan")) == 0


def test_a_scalar_weight_has_one_channel():
    artifact = PalettizedWeight(codes=np.array(1, np.uint8), lut=np.array([[0, 7]], np.float32), bits=1)
    assert artifact.dequantize() == 7


def test_along_axis_broadcasts():
    assert along_axis(np.arange(3), 3, 1).shape == (1, 3, 1)


def test_the_digest_tells_dtype_shape_and_order_apart_but_not_memory_layout():
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    same = {digest(weight), digest(np.asfortranarray(weight)), digest(weight.copy())}
    others = {digest(weight.T), digest(weight.ravel()), digest(weight.astype(np.float16)), digest(-weight)}
    assert len(same) == 1
    assert len(same | others) == 5
    assert all(len(d) == 11 for d in same | others)
    assert short_digest(b"abc") == "ungWv48Bz-p"


CODES = np.zeros((2, 3), np.uint8)
LUT = np.zeros((1, 4), np.float32)
PALETTE = {"codes": CODES, "lut": LUT, "bits": 2}
UNIFORM = {"codes": CODES, "scale": np.ones((), np.float32), "bits": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 9}, r"bits must be in \[1, 8\], got 9\."),
        ({"codes": CODES.astype(np.int64)}, r"PalettizedWeight\.codes must be uint8, got int64\."),
        ({"lut": LUT.astype(np.float64)}, r"PalettizedWeight\.lut must be float32, float16 or int8, got float64\."),
        ({"lut": LUT.astype(np.int8)}, r"PalettizedWeight\.scale must be given for an int8 lut, got None\."),
        (
            {"lut": LUT[0]},
            r"PalettizedWeight\.lut must be \[G, K\], or \[G, K, D\] with D of at least 2, got \(4,\)\.",
        ),
        (
            {"lut": LUT[..., None]},
            r"PalettizedWeight\.lut must be \[G, K\], or \[G, K, D\] with D of at least 2, got \(1, 4, 1\)\.",
        ),
        ({"axis": 2}, r"PalettizedWeight\.axis must be in \[0, 2\), got 2\."),
        ({"axis": -1}, r"PalettizedWeight\.axis must be in \[0, 2\), got -1\."),
        ({"weight_shape": (3, 2)}, r"PalettizedWeight\.codes must be \[3, 2\], got \(2, 3\)\."),
        ({"bits": 1}, r"PalettizedWeight\.lut must have at most 2\*\*1 entries, got 4\."),
        ({"rows_per_lut": 1}, r"PalettizedWeight\.lut must hold 2 tables for its rows_per_lut, got 1\."),
        ({"codes": CODES + 4}, r"PalettizedWeight\.codes must be below the LUT's 4 entries, got 4\."),
        (
            {"codes": np.full((2, 3), 4, np.uint8)},
            r"PalettizedWeight\.codes must be below the LUT's 4 entries, got 4\.",
        ),
        ({"scale": np.ones(2)}, r"PalettizedWeight\.scale must be float32, got float64\."),
        (
            {"scale": np.ones(3, np.float32)},
            r"PalettizedWeight\.scale must be 0-d or one value for each of the 2 output channels, got \(3,\)\.",
        ),
        (
            {"lut": np.zeros((1, 4, 2), np.float32)},
            r"PalettizedWeight\.weight_shape must be given for vectors, got None\.",
        ),
        (
            {"lut": np.zeros((1, 4, 2), np.float32), "weight_shape": (2, 3)},
            r"PalettizedWeight\.codes must be \[3\], got \(2, 3\)\.",
        ),
        (
            {
                "lut": np.zeros((2, 4, 2), np.float32),
                "codes": np.zeros(3, np.uint8),
                "weight_shape": (2, 3),
                "rows_per_lut": 1,
            },
            r"A vector LUT must be one for the whole tensor, got 2\.",
        ),
    ],
)
def test_a_palette_that_does_not_fit_itself_is_refused(changes, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        PalettizedWeight(**{**PALETTE, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 0}, r"bits must be in \[1, 8\], got 0\."),
        ({"codes": CODES.astype(np.int16)}, r"IntegerWeight\.codes must be int8 or uint8, got int16\."),
        ({"scale": np.ones(())}, r"IntegerWeight\.scale must be float32, got float64\."),
        (
            {"codes": np.full((2, 3), 4, np.uint8)},
            r"IntegerWeight\.codes must be in \[0, 3\] at 2 bits, got \(4, 4\)\.",
        ),
        (
            {"codes": np.full((2, 3), 2, np.int8)},
            r"IntegerWeight\.codes must be in \[-2, 1\] at 2 bits, got \(2, 2\)\.",
        ),
        ({"axis": 0}, r"IntegerWeight\.scale must be \[2\], got \(\)\."),
        ({"axis": 2}, r"IntegerWeight\.axis must be in \[0, 2\), got 2\."),
        ({"scale": np.ones(2, np.float32)}, r"IntegerWeight\.scale must be \[\], got \(2,\)\."),
        ({"block_size": 2}, r"IntegerWeight\.block_size must be None without an axis, got 2\."),
        ({"axis": 1, "block_size": 0}, r"IntegerWeight\.block_size must be at least 1, got 0\."),
        ({"axis": 1, "block_size": 2}, r"IntegerWeight\.scale must be \[2, 2\], got \(\)\."),
        (
            {"zero_point": np.zeros((), np.int8)},
            r"IntegerWeight\.zero_point must be uint8 like its codes, got int8\.",
        ),
        ({"zero_point": np.zeros(2, np.uint8)}, r"IntegerWeight\.zero_point must be \[\], got \(2,\)\."),
    ],
)
def test_a_grid_that_does_not_fit_itself_is_refused(changes, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        IntegerWeight(**{**UNIFORM, **changes})


# --- weights as integers


def assert_exact(artifact):
    """`integer_values` found some, and they stand for the same floats bit for bit."""
    codes, scale, axis = artifact.integers()
    assert codes.dtype == np.int8
    assert codes.shape == artifact.shape
    assert scale.dtype == np.float32
    assert scale.shape == (() if axis is None else (artifact.shape[axis],))
    again = codes.astype(np.float32) * broadcast_scale(scale, codes.shape, axis)
    assert again.tobytes() == artifact.dequantize().tobytes()
    return codes


@pytest.mark.parametrize("kind", ARTIFACTS)
@given(data=st.data())
def test_integers_stand_for_the_same_floats_or_there_are_none(kind, data):
    artifact = data.draw(DRAWN[kind])
    if artifact.integers() is not None:
        assert_exact(artifact)
    else:
        assert kind == "float" or artifact.to_arrays()[0].get("lut", LUT).dtype != np.int8


@given(uniform())
def test_which_uniform_grids_are_integers(artifact):
    plain = artifact.zero_point is None or not artifact.zero_point.any()
    fits = artifact.block_size is None and plain and artifact.codes.max() <= 127
    assert (artifact.integers() is not None) == fits


STEPS = st.floats(2.0**-100, 2.0**100, width=32).map(np.float32)
MULTIPLES = st.lists(st.integers(-127, 127), min_size=1, max_size=16)


def palette_of(tables, scale=None):
    lut = np.array(tables, np.float32)
    codes = np.tile(np.arange(lut.shape[1], dtype=np.uint8), (2 * len(lut), 1))
    return PalettizedWeight(codes=codes, lut=lut, bits=8, rows_per_lut=2, scale=scale)


@given(STEPS, MULTIPLES)
def test_any_multiples_of_a_step_are_found_to_be_such(step, multiples):
    codes = assert_exact(palette_of([np.array(multiples, np.float32) * step]))
    # Perhaps of a larger step: then by fewer.
    assert (np.abs(codes[0].astype(int)) <= np.abs(multiples)).all()


@given(st.lists(st.tuples(STEPS, MULTIPLES), min_size=2, max_size=4))
def test_every_group_may_have_its_own_step(groups):
    longest = max(len(multiples) for _, multiples in groups)
    tables = [np.resize(np.array(multiples, np.float32) * step, longest) for step, multiples in groups]
    assert_exact(palette_of(tables))


@pytest.mark.parametrize(
    ("table", "integers"),
    [
        ([-0.3, 0.0, 0.3], [-1, 0, 1]),
        ([-1.5, -0.5, 0.5, 1.5], [-3, -1, 1, 3]),
        ([2.0, -254.0, 7.5, 0.0], None),
        ([0.5, 63.5], [1, 127]),
        ([0.5, 64.0], None),
        ([0.0, 0.0], [0, 0]),
        ([-0.0, 1.0], None),
        ([1.0, np.float32(np.pi)], None),
        ([1.0, np.inf], None),
        ([1.0, np.nan], None),
        ([1e-45, 3e-45], [1, 2]),
        ([3e38, -3e38], [1, -1]),
    ],
)
def test_palettes_by_hand(table, integers):
    weight = palette_of([table])
    found = weight.integers()
    assert (None if found is None else assert_exact(weight)[0].tolist()) == integers


def test_a_scale_is_taken_in_where_that_is_exact():
    ternary = [[-0.3, 0.0, 0.3]]
    assert assert_exact(palette_of(ternary, np.array([0.7, -1.3], np.float32)))[0].tolist() == [-1, 0, 1]
    assert assert_exact(palette_of(ternary, np.array(0.7, np.float32)))[1].tolist() == [-1, 0, 1]
    grid = [np.arange(-7, 8, dtype=np.float32) * np.float32(0.3)]
    assert_exact(palette_of(grid, np.array([0.5, -4], np.float32)))
    assert palette_of(grid, np.array([0.7, 1.3], np.float32)).integers() is None  # rounded twice


def test_a_table_of_int8_is_given_back_as_it_is():
    lut, scale = np.array([[-128, 4]], np.int8), np.array(0.5, np.float32)
    found, found_scale = PalettizedWeight(codes=CODES, lut=lut, bits=1, scale=scale).integer_lut()
    np.testing.assert_array_equal(found, lut)
    assert found_scale == scale


# --- activation grids

SCALES = st.floats(2.0**-20, 2.0**20, width=32).map(lambda v: np.array(v, np.float32))
SITE = ("fc.weight", 0)


@st.composite
def activation_grids(draw, offsets=None):
    scale = draw(SCALES)
    offset = draw(st.floats(-300, 300, width=32)) if offsets is None else draw(offsets)
    return ActivationGrid(
        site=SITE, scale=scale, offset=np.array(offset, np.float32) * scale, bits=draw(st.integers(1, 8)),
        signed=draw(st.booleans()),
    )  # fmt: skip


WHOLE_OFFSETS = st.integers(-400, 200)
ACTIVATIONS = hnp.arrays(np.float32, 20, elements=st.floats(-1e4, 1e4, width=32))


@given(activation_grids(WHOLE_OFFSETS))
def test_a_grid_through_zero_has_a_zero_point_where_a_byte_holds_it(grid):
    n = IntegerRange(grid.bits, grid.signed).n
    wanted = round(-float(grid.offset) / float(grid.scale)) - n
    assert grid.zero_point == (wanted if 0 <= wanted <= 255 else None)
    assert grid.nbytes == (5 if grid.zero_point is not None else 9)
    if grid.zero_point is not None:
        u = np.arange(grid.levels + 1, dtype=np.uint8)
        assert (grid.dequantize(u) == (u.astype(np.float32) - wanted) * grid.scale).all()
        assert 0 in grid.dequantize(u) or not 0 <= wanted <= grid.levels


@given(activation_grids() | activation_grids(WHOLE_OFFSETS))
def test_every_code_is_quantized_to_itself(grid):
    u = np.arange(grid.levels + 1, dtype=np.uint8)
    assert u[-1] == 2**grid.bits - 1
    again = grid.quantize(grid.dequantize(u))
    assert again.dtype == np.uint8
    assert (again == u).all()


@given(activation_grids() | activation_grids(WHOLE_OFFSETS), ACTIVATIONS)
def test_quantized_is_the_nearest_that_there_is(grid, steps):
    x = steps * grid.scale
    every = grid.dequantize(np.arange(grid.levels + 1, dtype=np.uint8)).astype(np.float64)
    least = np.abs(x.astype(np.float64)[:, None] - every).min(axis=1)
    off = np.abs(grid.dequantize(grid.quantize(x)) - x.astype(np.float64))
    assert (off <= least + 2e-3 * grid.scale).all()  # float32 of 1e4 steps


@given(activation_grids(), ACTIVATIONS)
def test_the_zero_point_is_added_after_rounding(grid, steps):
    grid = grid.snapped()
    for value in steps * grid.scale:
        code = round(float(np.float32(value) / grid.scale)) + grid.zero_point
        assert grid.quantize(np.array([value], np.float32))[0] == min(max(code, 0), grid.levels)


def test_infinities_are_clipped():
    grid = ActivationGrid.from_zero_point(SITE, 1e-30, 3, bits=8)
    assert grid.quantize(np.array([-np.inf, 1e38, np.inf], np.float32)).tolist() == [0, 255, 255]


@given(activation_grids())
def test_snapping_moves_no_further_than_it_must(grid):
    snapped = grid.snapped()
    assert snapped.zero_point is not None
    assert snapped.snapped() == snapped
    n = IntegerRange(grid.bits, grid.signed).n
    every = -(np.arange(256) + n) * float(grid.scale)
    least = np.abs(every - float(grid.offset)).min()
    assert abs(float(snapped.offset) - float(grid.offset)) <= least * (1 + 1e-6) + 1e-4 * float(grid.scale)


@given(SCALES, st.integers(0, 255), st.integers(1, 8))
def test_a_grid_from_its_zero_point_has_that_one(scale, zero_point, bits):
    grid = ActivationGrid.from_zero_point(SITE, scale, zero_point, bits)
    assert (grid.zero_point, grid.scale, grid.bits, grid.signed) == (zero_point, scale, bits, False)


@given(activation_grids())
def test_a_grid_comes_back_from_json_exactly(grid):
    assert ActivationGrid.from_dict(json.loads(json.dumps(grid.as_dict()))) == grid


GRID = {"site": SITE, "scale": np.array(0.5, np.float32), "offset": np.array(0, np.float32), "bits": 8, "signed": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 9}, r"bits must be in \[1, 8\], got 9\."),
        (
            {"site": ("a", -2)},
            r"ActivationGrid\.site must be \(name, index\) with an index of at least -1, got \('a', -2\)\.",
        ),
        ({"site": "a"}, r"ActivationGrid\.site must be \(name, index\) with an index of at least -1, got a\."),
        ({"scale": np.ones(1, np.float32)}, r"ActivationGrid\.scale must be float32 and 0-d, got float32 \[1\]\."),
        ({"offset": np.ones(())}, r"ActivationGrid\.offset must be float32 and 0-d, got float64 \[\]\."),
        ({"scale": np.array(0, np.float32)}, r"ActivationGrid\.scale must be finite and above 0, got 0\.0\."),
        ({"scale": np.array(np.nan, np.float32)}, r"ActivationGrid\.scale must be finite and above 0, got nan\."),
        ({"offset": np.array(np.inf, np.float32)}, r"ActivationGrid\.offset must be finite, got inf\."),
    ],
)
def test_a_grid_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        ActivationGrid(**{**GRID, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": True}, r"ActivationGrid\.bits must be stored as int, got True\."),
        ({"signed": 1}, r"ActivationGrid\.signed must be stored as bool, got 1\."),
        ({"scale": "1"}, r"ActivationGrid\.scale must be stored as float, got '1'\."),
        ({"scale": 1e300}, r"ActivationGrid\.scale must be finite and above 0, got inf\."),
        ({"site": ["a", "b"]}, r"ActivationGrid\.site must be \(name, index\) .*, got \('a', 'b'\)\."),
        ({"site": None}, r"ActivationGrid\.site must be stored as list, got None\."),
    ],
)
def test_stored_grids_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        ActivationGrid.from_dict({**ActivationGrid(**GRID).as_dict(), **changes})


def test_a_zero_point_beyond_a_byte_is_refused():
    with pytest.raises(ConfigError, match=r"^ActivationGrid\.zero_point must be in \[0, 255\], got 256\.$"):
        ActivationGrid.from_zero_point(SITE, 0.5, 256, bits=8)


# --- learned thresholds

THRESHOLDS = {
    "site": SITE, "thresholds": np.array([-0.5, 0.25, 0.25], np.float32), "scale": np.array(0.5, np.float32), "bits": 2,
}  # fmt: skip


@given(st.integers(1, 8), hnp.arrays(np.float32, 255, elements=st.floats(-100, 100, width=32)), ACTIVATIONS)
def test_a_code_counts_the_thresholds_that_a_value_reaches(bits, values, x):
    grid = ThresholdGrid(**{**THRESHOLDS, "thresholds": np.sort(values[: 2**bits - 1]), "bits": bits})
    codes = grid.quantize(x)
    assert codes.dtype == np.uint8
    assert codes.tolist() == [sum(v >= t for t in grid.thresholds) for v in x]
    np.testing.assert_array_equal(grid.dequantize(codes), codes.astype(np.float32) * np.float32(0.5))
    assert grid.levels == 2**bits - 1
    assert grid.nbytes == 4 * 2**bits
    stored = json.loads(json.dumps(grid.as_dict()))
    assert ThresholdGrid.from_dict(stored).as_dict() == stored


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 9}, r"bits must be in \[1, 8\], got 9\."),
        ({"site": "a"}, r"ThresholdGrid\.site must be \(name, index\) with an index of at least -1, got a\."),
        ({"bits": 3}, r"ThresholdGrid\.thresholds must be float32 \[7\] at 3 bits, got float32 \[3\]\."),
        (
            {"thresholds": np.zeros(3)},
            r"ThresholdGrid\.thresholds must be float32 \[3\] at 2 bits, got float64 \[3\]\.",
        ),
        (
            {"thresholds": np.array([0, 2, 1], np.float32)},
            r"ThresholdGrid\.thresholds must be finite and ascend, got \[0\.0, 2\.0, 1\.0\]\.",
        ),
        (
            {"thresholds": np.array([0, 1, np.inf], np.float32)},
            r"ThresholdGrid\.thresholds must be finite and ascend, got \[0\.0, 1\.0, inf\]\.",
        ),
        ({"scale": np.ones(1, np.float32)}, r"ThresholdGrid\.scale must be float32 and 0-d, got float32 \[1\]\."),
        ({"scale": np.array(0, np.float32)}, r"ThresholdGrid\.scale must be finite and above 0, got 0\.0\."),
    ],
)
def test_thresholds_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        ThresholdGrid(**{**THRESHOLDS, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 2.0}, r"ThresholdGrid\.bits must be stored as int, got 2\.0\."),
        ({"scale": None}, r"ThresholdGrid\.scale must be stored as float, got None\."),
        ({"thresholds": "abc"}, r"ThresholdGrid\.thresholds must be stored as list, got 'abc'\."),
        ({"thresholds": [0.5, "1", None]}, r"ThresholdGrid\.thresholds must be stored as floats, got \['1', None\]\."),
        ({"thresholds": [0.5]}, r"ThresholdGrid\.thresholds must be float32 \[3\] at 2 bits, got float32 \[1\]\."),
    ],
)
def test_stored_thresholds_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        ThresholdGrid.from_dict({**ThresholdGrid(**THRESHOLDS).as_dict(), **changes})
