"""Artifacts: the floats they stand for, the bytes they take, and a stored form that comes back equal."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompress.artifacts import (
    ARTIFACTS,
    Artifact,
    FloatWeight,
    IntegerWeight,
    PalettizedWeight,
    along_axis,
    bits_per_weight,
    digest,
    short_digest,
)
from qcompress.errors import ConfigError
from qcompress.granularity import lut_groups
from reference import dequantize_palette, dequantize_uniform, pack_bit_by_bit

SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=4)
FINITE = st.floats(-100, 100, width=32)


def _floats(draw, shape):
    return draw(hnp.arrays(np.float32, shape, elements=FINITE))


@st.composite
def palettized(draw):
    bits, shape = draw(st.integers(1, 8)), draw(SHAPES)
    axis = draw(st.integers(0, len(shape) - 1))
    rows_per_lut = draw(st.none() | st.integers(1, 5))
    entries = draw(st.integers(1, 1 << min(bits, 4)))
    lut = _floats(draw, (lut_groups(shape[axis], rows_per_lut), entries))
    return PalettizedWeight(
        codes=draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, entries - 1))),
        lut=lut,
        bits=bits,
        axis=axis,
        rows_per_lut=rows_per_lut,
        scale=_floats(draw, (shape[axis],)) if draw(st.booleans()) else None,
    )


@st.composite
def palettized_vectors(draw):
    shape, d = draw(SHAPES), draw(st.integers(2, 4))
    entries = draw(st.integers(1, 4))
    count = -(-int(np.prod(shape)) // d)
    return PalettizedWeight(
        codes=draw(hnp.arrays(np.uint8, (count,), elements=st.integers(0, entries - 1))),
        lut=_floats(draw, (1, entries, d)),
        bits=2,
        weight_shape=shape,
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


@given(palettized())
def test_a_palette_equals_the_slow_loop(artifact):
    slow = dequantize_palette(artifact.codes, artifact.lut, artifact.axis, artifact.rows_per_lut, artifact.scale)
    np.testing.assert_array_equal(artifact.dequantize(), slow)


@given(palettized_vectors())
def test_a_palette_of_vectors_equals_the_slow_loop(artifact):
    flat = [value for code in artifact.codes for value in artifact.lut[0, code]]
    np.testing.assert_array_equal(artifact.dequantize().ravel(), flat[: int(np.prod(artifact.shape))])


@given(uniform())
def test_a_uniform_grid_equals_the_slow_loop(artifact):
    slow = dequantize_uniform(artifact.codes, artifact.scale, artifact.zero_point, artifact.axis, artifact.block_size)
    np.testing.assert_array_equal(artifact.dequantize(), slow)


@given(palettized())
def test_nbytes_is_what_the_packed_codes_and_tables_take(artifact):
    packed = pack_bit_by_bit(artifact.codes.ravel().tolist(), artifact.bits)
    scales = 0 if artifact.scale is None else artifact.scale.nbytes
    assert artifact.nbytes == len(packed) + 4 * artifact.lut.size + scales


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
        ({"lut": LUT.astype(np.float64)}, r"PalettizedWeight\.lut must be float32, got float64\."),
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
            r"PalettizedWeight\.scale must have one value for each of the 2 output channels, got \(3,\)\.",
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
            r"IntegerWeight\.zero_point must be uint8 as its codes are, got int8\.",
        ),
        ({"zero_point": np.zeros(2, np.uint8)}, r"IntegerWeight\.zero_point must be \[\], got \(2,\)\."),
    ],
)
def test_a_grid_that_does_not_fit_itself_is_refused(changes, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        IntegerWeight(**{**UNIFORM, **changes})
