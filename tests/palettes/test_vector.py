"""Palettes of vectors: seeded, the same on any number of threads, never far from what slow k-means finds."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompress.artifacts import granularity
from qcompress.errors import ConfigError
from qcompress.palettes import vector
from qcompress.palettes.scalar import palettize
from qcompress.palettes.vector import palettize_vectors
from tests.helpers.reference import lloyd, nearest_vector

# Few digits: many equal vectors, many exact ties, and float64 is exact.
COARSE = st.integers(-20, 20).map(lambda n: n / 4)


def heavy_tailed(count, seed=0):
    """Like a trained layer: one weight of a thousand is eight times as large."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=count) * 0.05
    values[generator.integers(0, count, max(1, count // 1000))] *= 8
    return values.astype(np.float32)


def squared_error(weight, artifact, weights=None):
    error = (weight.astype(np.float64) - artifact.dequantize()) ** 2
    return float((error if weights is None else error * weights).sum())


@given(st.data())
def test_no_more_distinct_vectors_than_entries_are_kept_exactly(data):
    dim = data.draw(st.sampled_from(vector.DIMS))
    finite = st.floats(-(2**100), 2**100, width=32)
    distinct = data.draw(hnp.arrays(np.float32, (data.draw(st.integers(1, 8)), dim), elements=finite))
    codes = data.draw(st.lists(st.integers(0, len(distinct) - 1), min_size=1, max_size=40))
    made = palettize_vectors(distinct[codes], 3, dim)
    np.testing.assert_allclose(made.dequantize(), distinct[codes], rtol=0, atol=1e-15 * np.abs(distinct).max())
    assert made.lut.shape[1] <= len(set(codes))


@pytest.mark.parametrize("rare", [1, 5])
def test_rare_vectors_among_very_many_equal_ones_are_kept(rare):
    weight = np.zeros((50_000, 2), np.float32)
    weight[: 2 * rare : 2] = np.arange(rare)[:, None] + 1
    made = palettize_vectors(weight, 3, 2)
    np.testing.assert_array_equal(made.dequantize(), weight)
    assert made.lut.shape == (1, rare + 1, 2)


@given(st.data())
def test_codes_point_to_the_nearest_entry(data):
    dim = data.draw(st.sampled_from(vector.DIMS))
    shape = (data.draw(st.integers(1, 30)), dim)
    weight = data.draw(hnp.arrays(np.float32, shape, elements=COARSE))
    weights = data.draw(st.none() | hnp.arrays(np.float32, shape, elements=st.integers(1, 4)))
    made = palettize_vectors(weight, 2, dim, importance=weights)
    masses = [None] * len(weight) if weights is None else weights.tolist()
    for code, row, mass in zip(made.codes, weight.tolist(), masses, strict=True):
        got, wanted = made.lut[0, code].tolist(), made.lut[0, nearest_vector(row, made.lut[0].tolist(), mass)].tolist()
        squared = [
            sum(m * (x - c) ** 2 for m, x, c in zip(mass or [1] * dim, row, e, strict=True)) for e in (got, wanted)
        ]
        assert squared[0] == pytest.approx(squared[1], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(data=st.data())
def test_what_boxes_rule_out_is_never_the_nearest(dtype, data):
    dim = data.draw(st.integers(1, 4))
    x = data.draw(hnp.arrays(np.float32, (dim, data.draw(st.integers(1, 40))), elements=COARSE))
    lut = data.draw(hnp.arrays(dtype, (data.draw(st.integers(1, 20)), dim), elements=COARSE))
    mass = data.draw(st.none() | hnp.arrays(np.float32, x.shape, elements=st.integers(0, 3)))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_PIECE", 3), ("_PAIRS", 1), ("_BLOCK", 2)):
            patch.setattr(vector, name, value)
        codes, squared = vector._Vectors(x, mass).assigned(lut)
    every = vector._Vectors(x, mass).squared(lut.astype(np.float64))
    np.testing.assert_allclose(every[codes, np.arange(x.shape[1])], every.min(axis=0), rtol=1e-4)
    np.testing.assert_allclose(squared, every.min(axis=0), rtol=1e-4, atol=1e-30)
    if dtype == np.float64:
        np.testing.assert_array_equal(codes, every.argmin(axis=0))


def test_an_order_holds_every_vector_once_and_neighbours_together():
    points = vector._Vectors(heavy_tailed(40_000).reshape(2, -1))
    order = points.near_together()
    np.testing.assert_array_equal(np.sort(order), np.arange(20_000))
    apart = np.abs(np.diff(points.x, axis=1)).mean()
    assert np.abs(np.diff(points.at(order).x, axis=1)).mean() < 0.5 * apart


@pytest.mark.parametrize(("bits", "dim"), [(2, 2), (4, 2), (4, 4), (5, 8)])
def test_it_is_no_worse_than_plain_k_means(bits, dim):
    weight = heavy_tailed(4000 * dim)
    rows = weight.reshape(-1, dim).astype(np.float64)
    slow = min(lloyd(rows, 1 << bits, seed, steps=30) for seed in range(2))
    assert squared_error(weight, palettize_vectors(weight, bits, dim)) <= 1.01 * slow


def test_pairs_at_a_width_are_better_than_scalars_at_the_same_bits_per_weight():
    weight = heavy_tailed(100_000)
    assert squared_error(weight, palettize_vectors(weight, 6, 2)) < 0.8 * squared_error(weight, palettize(weight, 3))


def test_a_coreset_stands_for_all_vectors():
    points = vector._Vectors(heavy_tailed(100_000).reshape(2, -1))
    mass = vector._Vectors(points.x, np.random.default_rng(0).random(points.x.shape, np.float32))
    lut = np.random.default_rng(1).normal(size=(5, 2)).astype(np.float32) * 0.05
    for whole in (points, mass):
        sample = whole.coreset(4000, np.random.default_rng(0))
        assert len(sample) == 4000
        assert sample.share.sum() == pytest.approx(len(whole), rel=0.05)
        estimate = (sample.assigned(lut)[1] * sample.share).sum()
        assert estimate == pytest.approx(whole.assigned(lut)[1].sum(), rel=0.05)


def test_a_seed_gives_the_same_palette_on_any_number_of_threads():
    weight, threads = heavy_tailed(100_000).reshape(100, -1), torch.get_num_threads()
    try:
        made = []
        for count in (1, 2):
            torch.set_num_threads(count)
            made.append(palettize_vectors(weight, 5, 2, seed=3))
    finally:
        torch.set_num_threads(threads)
    assert made[0].lut.tobytes() == made[1].lut.tobytes()
    assert made[0].codes.tobytes() == made[1].codes.tobytes()
    assert palettize_vectors(weight, 5, 2, seed=4).lut.tobytes() != made[0].lut.tobytes()


@pytest.mark.parametrize("exponent", [-100, -30, 100])
def test_scaling_the_values_scales_the_palette(exponent):
    weight = heavy_tailed(40_000)
    made, scaled = palettize_vectors(weight, 4, 2), palettize_vectors(np.ldexp(weight, exponent), 4, 2)
    np.testing.assert_array_equal(scaled.codes, made.codes)
    np.testing.assert_array_equal(scaled.lut, np.ldexp(made.lut, exponent))


def test_outliers_take_entries_and_leave_the_others_near_theirs():
    weight = heavy_tailed(40_000)
    alone = squared_error(weight, palettize_vectors(weight, 4, 2))
    weight[[5, 100]] = [1e6, -1e6]
    made = palettize_vectors(weight, 4, 2)
    error = (made.dequantize().astype(np.float64) - weight) ** 2
    assert error.reshape(-1, 2)[[2, 50]].max() == 0
    assert error.sum() <= 2 * alone


def test_weights_lower_the_error_that_they_weigh():
    weight = heavy_tailed(60_000).reshape(100, -1)
    weights = np.random.default_rng(2).random(weight.shape) ** 8
    weighed = palettize_vectors(weight, 4, 2, importance=weights)
    assert squared_error(weight, weighed, weights) < squared_error(weight, palettize_vectors(weight, 4, 2), weights)


def test_what_has_no_weight_has_no_say():
    weight = heavy_tailed(2000)
    weights = np.ones_like(weight)
    weights[:1000] = 0
    made = palettize_vectors(weight, 3, 2, importance=weights)
    assert squared_error(weight[1000:], palettize_vectors(weight[1000:], 3, 2)) == pytest.approx(
        squared_error(weight, made, weights), rel=0.05
    )


@pytest.mark.parametrize("dim", vector.DIMS)
@pytest.mark.parametrize("weighed", [False, True])
def test_a_tail_is_filled_up_with_what_has_no_say(dim, weighed):
    weight = heavy_tailed(33 * 31).reshape(33, 31)
    weight[-1, -1] = 5  # filled up with it, the tail would have an entry of its own
    weights = np.random.default_rng(0).random(weight.shape) if weighed else np.ones(weight.shape)
    made = palettize_vectors(weight, 3, dim, importance=weights if weighed else None)
    assert made.codes.shape == (-(-weight.size // dim),)
    assert made.dequantize().shape == weight.shape
    missing = -weight.size % dim
    filled = np.append(weight.ravel(), np.zeros(missing, np.float32))
    wanted = palettize_vectors(filled, 3, dim, importance=np.append(weights.ravel(), np.zeros(missing)))
    np.testing.assert_array_equal(made.codes, wanted.codes)
    np.testing.assert_array_equal(made.dequantize().ravel(), wanted.dequantize()[: weight.size])


@pytest.mark.parametrize(("lut_dtype", "slack"), [("float16", 1.001), ("int8", 1.2)])
@pytest.mark.parametrize("exponent", [-40, -10, 0, 30])
def test_entries_of_fewer_bits_are_what_codes_are_nearest_to(lut_dtype, slack, exponent):
    weight = np.ldexp(heavy_tailed(8000), exponent)
    plain, made = palettize_vectors(weight, 4, 4), palettize_vectors(weight, 4, 4, lut_dtype=lut_dtype)
    assert made.lut.dtype == lut_dtype
    assert (made.scale is None) == (lut_dtype == "float16" and exponent == 0)
    assert squared_error(weight, made) <= slack * squared_error(weight, plain)
    saved = plain.lut.nbytes - plain.lut.size * made.lut.itemsize
    assert made.nbytes <= plain.nbytes - saved + 4
    entries = (made.lut[0].astype(np.float64) * (1 if made.scale is None else made.scale)).tolist()
    for code, row in zip(made.codes[:200], weight.reshape(-1, 4).tolist(), strict=False):
        assert code == nearest_vector(row, entries, None)


def test_weights_that_are_all_zero_are_as_none():
    weight = heavy_tailed(200)
    made = palettize_vectors(weight, 2, 4, importance=np.zeros(200))
    np.testing.assert_array_equal(made.dequantize(), palettize_vectors(weight, 2, 4).dequantize())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sixteen_bit_floats_are_read_as_the_floats_they_are(dtype):
    weight = heavy_tailed(3000).astype(dtype)
    wide = palettize_vectors(weight.astype(np.float32), 3, 2)
    np.testing.assert_array_equal(palettize_vectors(weight, 3, 2).lut, wide.lut)


def test_vectors_run_along_rows_of_any_layout():
    weight = heavy_tailed(24 * 40).reshape(24, 40)
    made = palettize_vectors(np.asfortranarray(weight), 4, 8, axis=1)
    assert made.axis == 1
    assert made.codes.tolist() == palettize_vectors(weight, 4, 8).codes.tolist()
    for code, row in zip(made.codes, granularity.vectors(made.dequantize(), 8), strict=True):
        np.testing.assert_array_equal(made.lut[0, code], row)


@pytest.mark.parametrize("weight", [np.full((3, 4), -0.25, np.float32), np.zeros(8, np.float32)])
def test_constant_weights_are_exact(weight):
    made = palettize_vectors(weight, 4, 4)
    assert made.lut.shape == (1, 1, 4)
    np.testing.assert_array_equal(made.dequantize(), weight)


def test_a_weight_without_elements_has_a_palette_without_entries():
    made = palettize_vectors(np.zeros((0, 4), np.float32), 2, 4)
    assert made.lut.shape == (1, 0, 4)
    assert made.dequantize().shape == (0, 4)


def test_the_palette_is_sorted_and_all_of_it_used():
    made = palettize_vectors(heavy_tailed(600), 8, 2)
    assert made.lut[0].tolist() == sorted(made.lut[0].tolist())
    assert set(made.codes.tolist()) == set(range(made.lut.shape[1]))


def test_the_weight_is_not_written_to():
    weight = heavy_tailed(500)
    before = weight.copy()
    weight.setflags(write=False)
    palettize_vectors(weight, 2, 2)
    np.testing.assert_array_equal(weight, before)


EIGHT = np.zeros(8, np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((EIGHT, 0, 2), r"bits must be in \[1, 8\], got 0\."),
        ((EIGHT, 2, 3), r"vector_dim must be 2, 4 or 8, got 3\."),
        ((np.zeros(8), 2, 2), r"Weights to palettize must be float32, float16 or bfloat16, got float64\."),
        ((EIGHT + np.inf, 2, 2), r"Weights to palettize must be finite, got 8 NaN or Inf among 8\."),
        ((EIGHT, 2, 2, 0, np.ones(4)), r"importance must have the shape of the values, \(8,\), got \(4,\)\."),
        (
            (EIGHT, 2, 2, 0, EIGHT - 1),
            r"importance must be finite and not negative, got a NaN, an Inf or a negative number\.",
        ),
    ],
)
def test_what_cannot_be_palettized_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        palettize_vectors(*arguments)
