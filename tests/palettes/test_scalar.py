"""Scalar k-means: the optimum where it can be had, near it elsewhere, and codes that are truly the nearest."""

import tracemalloc
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompress.errors import ConfigError
from qcompress.palettes import _bins, scalar
from qcompress.palettes import assign as assigning
from qcompress.palettes._bins import COUNT, Bins
from qcompress.palettes._optimal import optimal_runs
from qcompress.palettes.assign import assign
from qcompress.palettes.even_grid import round_to_nearest
from qcompress.palettes.int8_palette import best_integers, palettize_int8
from qcompress.palettes.scalar import fit_lut, palettize
from tests.helpers.reference import best_integer_error, best_squared_error, nearest

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Few digits: many equal values, many exact ties.
COARSE = st.integers(-20, 20).map(lambda n: n / 4)


def squared_error(values, lut, weights=None):
    error = (values.astype(np.float64) - lut[assign(values, lut)]) ** 2
    return float((error if weights is None else error * weights).sum())


def heavy_tailed(count, seed=0):
    """Like a trained layer: one weight of a thousand is eight times as large."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=count) * 0.05
    values[generator.integers(0, count, max(1, count // 1000))] *= 8
    return values.astype(np.float32)


@given(st.lists(COARSE, min_size=1, max_size=10), st.integers(1, 2))
def test_few_values_get_the_best_palette_there_is(values, bits):
    array = np.array(values, np.float32)
    best = best_squared_error(values, 1 << bits)
    assert squared_error(array, fit_lut(array, bits)) == pytest.approx(best, rel=1e-5, abs=1e-6)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=300), st.integers(1, 8))
def test_a_palette_is_sorted_distinct_and_within_the_values(values, bits):
    array = np.array(values, np.float32)
    lut = fit_lut(array, bits)
    assert lut.dtype == np.float32
    assert 1 <= len(lut) <= 1 << bits
    assert (np.diff(lut) > 0).all()
    assert array.min() <= lut[0]
    assert lut[-1] <= array.max()


@given(st.lists(FINITE, max_size=16, unique=True), st.integers(1, 5), st.randoms(use_true_random=False))
def test_no_more_distinct_values_than_entries_are_kept_exactly(values, repeats, random):
    repeated = values * repeats
    random.shuffle(repeated)
    array = np.array(repeated, np.float32)
    lut = fit_lut(array, 4)
    np.testing.assert_array_equal(lut, np.unique(array))
    assert palettize(array, 4).dequantize().tolist() == array.tolist()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [300, 2000, 30000])
def test_large_inputs_come_within_a_thousandth_of_the_optimum(count, bits):
    values = heavy_tailed(count)
    points, mass = np.unique(values, return_counts=True)
    edges = optimal_runs(points.astype(np.float64), mass.astype(np.float64), 1 << bits)
    means = [np.average(points[i:j], weights=mass[i:j]) for i, j in pairwise(edges)]
    best = squared_error(values, np.array(means, np.float32))
    assert best <= squared_error(values, fit_lut(values, bits)) * (1 + 1e-6)
    assert squared_error(values, fit_lut(values, bits)) <= best * 1.001


# --- many values: bins in place of sorting


MANY = 140_000


@pytest.fixture
def sorting(monkeypatch):
    """Calls fit_lut as if no number of values were many."""

    def fit(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(scalar, "_MANY", np.inf)
            return fit_lut(*arguments)

    return fit


@pytest.mark.parametrize("bits", [1, 2, 4, 6])
@pytest.mark.parametrize("weighted", [False, True])
def test_bins_come_near_what_sorting_finds(sorting, bits, weighted):
    values = heavy_tailed(MANY)
    weights = np.random.default_rng(3).random(MANY) ** 4 if weighted else None
    sorted_error = squared_error(values, sorting(values, bits, weights), weights)
    assert squared_error(values, fit_lut(values, bits, weights), weights) <= 1.0003 * sorted_error


def normal(seed=0):
    return np.random.default_rng(seed).normal(size=MANY)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(normal() * 1e-4, id="small"),
        pytest.param(normal() * 1e-42, id="subnormal"),
        pytest.param(1 + normal() * 1e-4, id="far from zero"),
        pytest.param(np.full(MANY, 0.3), id="constant"),
        pytest.param(np.zeros(MANY), id="zeros"),
        pytest.param(normal() * (normal(1) > 1.3), id="nine of ten are zero"),
        pytest.param(normal() * (normal(1) > 3), id="nearly all are zero"),
        pytest.param(np.rint(normal()), id="fewer than entries"),
        pytest.param(np.rint(normal() * 9), id="few"),
        pytest.param(np.random.default_rng(0).standard_cauchy(MANY), id="cauchy"),
        pytest.param(np.exp(4 * normal()), id="lognormal"),
        pytest.param(10 ** (6 * normal()), id="all magnitudes"),
        pytest.param(np.where(normal(1) > 0, normal(), normal() * 1e-5), id="two widths"),
        pytest.param(np.where(normal(1) > 0, normal(), normal() + 1e4), id="two places"),
        pytest.param(np.clip(normal(), -1, 1), id="clipped"),
    ],
)
def test_bins_that_are_too_coarse_are_made_narrower_or_not_taken(sorting, values):
    values = values.astype(np.float32)
    assert squared_error(values, fit_lut(values, 4)) <= 1.001 * squared_error(values, sorting(values, 4))


@pytest.mark.parametrize("count", [9000, MANY])
@pytest.mark.parametrize("outliers", [[1e10], [-1e10, 1e10], [-1e30, 1e10, 1e20], [-3.4e38, 3.4e38]])
def test_outliers_of_any_size_take_an_entry_each_and_spoil_nothing(monkeypatch, count, outliers):
    body = heavy_tailed(count)
    lut = fit_lut(np.append(body, np.array(outliers, np.float32)), 4)
    assert set(np.array(outliers, np.float32)) <= set(lut)
    alone = scalar._Points.of(body, None, 16 - len(outliers)).fit()
    assert squared_error(body, lut) <= 1.001 * squared_error(body, alone)


def test_a_far_value_does_not_blur_near_ones():
    # Sums of squares of 1e8 hold no digit of 0.01.
    values = np.array([0.0, 0.01, 1.0, 1.02, 1e8], np.float32)
    assert fit_lut(values, 2).tolist() == pytest.approx([0.005, 1.0, 1.02, 1e8])


def test_bins_do_not_depend_on_order_or_scale():
    values = heavy_tailed(MANY)
    lut = fit_lut(values, 4)
    assert fit_lut(np.random.default_rng(1).permutation(values), 4).tobytes() == lut.tobytes()
    np.testing.assert_array_equal(fit_lut(values * np.float32(2**-30), 4), lut * np.float32(2**-30))


def test_a_palette_of_many_values_is_within_them():
    for values in (heavy_tailed(MANY), np.random.default_rng(0).random(MANY, np.float32)):
        lut = fit_lut(values, 8)
        assert values.min() <= lut[0]
        assert lut[-1] <= values.max()


def test_many_whole_weights_count_like_repetitions():
    values = heavy_tailed(MANY)
    weights = np.random.default_rng(1).integers(0, 4, MANY)
    repeated = np.repeat(values, weights)
    error = squared_error(values, fit_lut(values, 4, weights), weights)
    assert error == pytest.approx(squared_error(repeated, fit_lut(repeated, 4)), rel=1e-4)


@given(st.lists(FINITE, min_size=2, max_size=50), FINITE, FINITE)
def test_a_higher_value_is_never_in_a_lower_bin(values, one, other):
    low, high = sorted([one, other])
    bins = Bins.over(low, high)
    if bins is None:
        return
    found = bins.of(np.sort(np.array([*values, low, high], np.float32)))
    assert (np.diff(found) >= 0).all()
    ends = bins.of(np.array([low, high], np.float32))
    assert ends.min() > 0
    assert ends.max() < COUNT - 1


def test_bins_hold_all_mass():
    values, weights = heavy_tailed(MANY), np.random.default_rng(0).random(MANY)
    bins = Bins.over(-0.1, 0.1)
    inside, outside, outside_mass = bins.count(values, weights)
    middle = bins.middle(np.arange(COUNT))
    assert np.abs(middle[inside > 0]).max() < 0.1 + bins.width
    assert np.abs(outside).min() > 0.0999
    assert inside.sum() + outside_mass.sum() == pytest.approx(weights.sum() / weights.max(), rel=1e-9)
    inner = np.abs(values) < 0.1
    assert inside @ middle == pytest.approx(values[inner] @ weights[inner] / weights.max(), abs=MANY * bins.width)


def test_many_values_take_little_memory_beside_their_codes():
    weight = np.tile(heavy_tailed(1 << 18), 8).reshape(64, -1)
    palettize(weight[:1], 4)
    tracemalloc.start()
    palettize(weight, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= weight.size + 3 * 4 * (1 << 18)


# ---


@pytest.mark.parametrize("points", [5, 320, 321, 1000])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_both_ways_to_solve_the_recurrence_agree(monkeypatch, points, k):
    x = np.sort(np.random.default_rng(points).standard_cauchy(points))
    mass = np.random.default_rng(k).random(points) + 0.01
    found = []
    for dense in (0, points):
        monkeypatch.setattr("qcompress.palettes._optimal._DENSE", dense)
        edges = optimal_runs(x, mass, k)
        assert len(edges) == k + 1
        assert (np.diff(edges) > 0).all()
        runs = [slice(i, j) for i, j in pairwise(edges)]
        found.append(sum(np.average(x[r], weights=mass[r]) ** 2 * mass[r].sum() for r in runs))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_the_cells_do_not_lump_a_heavy_tail():
    # Quantiles as a start leave the few outliers in one entry: 1.6 times the error at 256 entries.
    values = heavy_tailed(100_000)
    uniform = np.linspace(values.min(), values.max(), 256).astype(np.float32)
    quantiles = np.quantile(values, (np.arange(256) + 0.5) / 256).astype(np.float32)
    error = squared_error(values, fit_lut(values, 8))
    assert error < 0.1 * squared_error(values, uniform)
    assert error < 0.1 * squared_error(values, quantiles)


@pytest.mark.parametrize("outlier", [1e4, 1e6])
def test_one_huge_outlier_takes_one_entry_and_spoils_nothing(outlier):
    body = heavy_tailed(50_000)
    values = np.append(body, np.float32(outlier)).astype(np.float32)
    lut = fit_lut(values, 3)
    alone = fit_lut(body, 3)
    assert lut[-1] == np.float32(outlier)
    assert squared_error(body, lut) <= 2 * squared_error(body, alone)


@given(st.lists(FINITE, min_size=1, max_size=200), st.integers(1, 8))
def test_any_finite_values_get_a_finite_palette(values, bits):
    lut = fit_lut(np.array(values, np.float32), bits)
    assert np.isfinite(lut).all()
    assert (np.diff(lut) > 0).all()


def test_the_same_values_give_the_same_palette_in_any_order():
    values = heavy_tailed(20_000)
    shuffled = np.random.default_rng(1).permutation(values)
    assert fit_lut(values, 4).tobytes() == fit_lut(shuffled, 4).tobytes()


def test_scaling_the_values_scales_the_palette():
    # An absolute step in the fit would show here: some tools round weights to 1e-4.
    values = heavy_tailed(20_000)
    np.testing.assert_array_equal(fit_lut(values * np.float32(2**-30), 4), fit_lut(values, 4) * np.float32(2**-30))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sixteen_bit_floats_are_read_as_the_floats_they_are(dtype):
    values = heavy_tailed(3000).astype(dtype)
    np.testing.assert_array_equal(fit_lut(values, 3), fit_lut(values.astype(np.float32), 3))
    assert palettize(values, 3).dequantize().dtype == np.float32


@given(st.data())
def test_whole_weights_count_like_repetitions(data):
    values = data.draw(st.lists(COARSE, min_size=1, max_size=12))
    weights = data.draw(st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values)).filter(any))
    array, repeated = np.array(values, np.float32), np.repeat(np.array(values, np.float32), weights)
    lut = fit_lut(array, 2, np.array(weights, np.float32))
    assert squared_error(array, lut, weights) == pytest.approx(squared_error(repeated, fit_lut(repeated, 2)), abs=1e-6)


@pytest.mark.parametrize("count", [2000, 50_000])
def test_weights_lower_the_error_that_they_weigh(count):
    values = heavy_tailed(count)
    weights = np.random.default_rng(2).random(count) ** 8
    weighted = squared_error(values, fit_lut(values, 3, weights), weights)
    assert weighted <= squared_error(values, fit_lut(values, 3), weights)


def test_weights_that_are_all_zero_are_as_none():
    values = heavy_tailed(100)
    np.testing.assert_array_equal(fit_lut(values, 2, np.zeros(100)), fit_lut(values, 2))


def test_weights_of_any_magnitude_are_taken():
    values = heavy_tailed(5000)
    weights = np.random.default_rng(3).random(5000)
    weights[::2] *= 1e-300
    assert len(fit_lut(values, 4, weights)) == 16
    np.testing.assert_array_equal(fit_lut(values, 4, weights * 2.0**900), fit_lut(values, 4, weights))


@given(st.lists(FINITE, max_size=30), st.lists(FINITE, min_size=1, max_size=12))
def test_assign_takes_the_nearest_in_exact_arithmetic(values, entries):
    lut = np.unique(np.array(entries, np.float32) + np.float32(0))
    codes = assign(np.array(values, np.float32), lut)
    assert codes.tolist() == [nearest(value, lut.tolist()) for value in values]


@given(st.lists(st.tuples(COARSE, COARSE), min_size=1, max_size=20))
def test_assign_takes_the_lower_of_two_equally_near(pairs):
    for pair in pairs:
        lut = np.unique(np.array(pair, np.float32))
        assert assign(np.array([sum(pair) / 2], np.float32), lut).tolist() == [0]


def test_assign_is_exact_where_float64_is_not():
    # The midpoint of -1e-30 and 2 is just below 1, but not in float64.
    assert assign(np.array([1.0], np.float32), np.array([-1e-30, 2.0], np.float32)).tolist() == [1]
    assert assign(np.array([1.0], np.float32), np.array([1e-30, 2.0], np.float32)).tolist() == [0]


def test_assign_takes_the_first_of_equal_entries():
    padded = np.array([0, 1, 1, 1], np.float32)
    assert assign(np.array([-1, 1, 5], np.float32), padded).tolist() == [0, 1, 1]


@given(st.lists(FINITE, max_size=30), st.lists(FINITE, min_size=1, max_size=12))
def test_a_table_of_bins_assigns_the_nearest_in_exact_arithmetic(values, entries):
    lut = np.unique(np.array(entries, np.float32) + np.float32(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assigning, "_MANY", 1)
        codes = assign(np.array(values, np.float32), lut)
    assert codes.tolist() == [nearest(value, lut.tolist()) for value in values]


@pytest.mark.parametrize("entries", [1, 2, 5, 16, 256])
@pytest.mark.parametrize("outlier", [1.0, 1e30])
def test_many_values_are_assigned_the_nearest_and_the_lower_of_two(entries, outlier):
    generator = np.random.default_rng(entries)
    # Whole and half numbers: float64 is exact, and many values are in the middle of two entries.
    lut = np.sort(generator.choice(np.arange(-400, 400), entries, replace=False)).astype(np.float32)
    values = np.rint(generator.normal(size=50_000) * 200).astype(np.float32) / 2
    values[0] = lut[-1] = outlier
    lut = np.unique(lut)
    distance = np.abs(values[:, None].astype(np.float64) - lut)
    np.testing.assert_array_equal(assign(values, lut), distance.argmin(axis=1))


def test_assign_works_across_its_chunks(monkeypatch):
    values = heavy_tailed(1000)
    lut = fit_lut(values, 4)
    whole = assign(values, lut)
    monkeypatch.setattr(_bins, "PIECE", 7)
    np.testing.assert_array_equal(assign(values, lut), whole)


@given(st.data())
def test_each_group_has_the_palette_of_its_own_rows(data):
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=6))
    axis = data.draw(st.integers(0, len(shape) - 1))
    rows_per_lut = data.draw(st.none() | st.integers(1, 4))
    weight = data.draw(hnp.arrays(np.float32, shape, elements=st.floats(-8, 8, width=16)))
    made = palettize(weight, 2, rows_per_lut, axis)
    moved, decoded = np.moveaxis(weight, axis, 0), np.moveaxis(made.dequantize(), axis, 0)
    step = rows_per_lut or len(moved)
    for group, start in enumerate(range(0, len(moved), step)):
        lut = fit_lut(moved[start : start + step], 2)
        np.testing.assert_array_equal(made.lut[group, : len(lut)], lut)
        assert (made.lut[group, len(lut) :] == lut[-1]).all()
        expected = lut[assign(moved[start : start + step], lut)]
        np.testing.assert_array_equal(decoded[start : start + step], expected)


def test_palettize_hands_weights_to_each_group():
    weight = np.array([[0, 1, 5], [0, 1, 5]], np.float32)
    made = palettize(weight, 1, rows_per_lut=1, importance=np.array([[0, 1, 1], [1, 1, 0]]))
    assert made.lut.tolist() == [[1, 5], [0, 1]]


@pytest.mark.parametrize(
    ("weight", "entries"),
    [
        (np.full((3, 4), -0.25, np.float32), 1),
        (np.float32([[-3.0]]), 1),
        (np.array(2.0, np.float32), 1),
        (-np.arange(1, 17, dtype=np.float32), 16),
        (np.array([0.0, -0.0], np.float32), 1),
    ],
)
def test_constant_single_scalar_and_negative_weights_are_exact(weight, entries):
    made = palettize(weight, 4)
    assert made.lut.shape == (1, entries)
    np.testing.assert_array_equal(made.dequantize(), weight)


def test_a_weight_without_elements_has_a_palette_without_entries():
    made = palettize(np.zeros((0, 3), np.float32), 2)
    assert made.lut.shape == (1, 0)
    assert made.dequantize().shape == (0, 3)


def test_the_weight_is_not_written_to():
    weight = heavy_tailed(500)
    before = weight.copy()
    weight.setflags(write=False)
    palettize(weight, 2)
    np.testing.assert_array_equal(weight, before)


NAN = np.array([1, np.nan, np.inf], np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_lut(np.zeros(2, np.float32), 9), r"bits must be in \[1, 8\], got 9\."),
        (lambda: palettize(np.zeros(2, np.float32), 0), r"bits must be in \[1, 8\], got 0\."),
        (
            lambda: fit_lut(np.zeros(2), 2),
            r"Weights to palettize must be float32, float16 or bfloat16, got float64\.",
        ),
        (lambda: fit_lut(NAN, 2), r"Weights to palettize must be finite, got 2 NaN or Inf among 3\."),
        (lambda: palettize(NAN, 2), r"Weights to palettize must be finite, got 2 NaN or Inf among 3\."),
        (
            lambda: palettize(np.zeros((2, 2), np.float32), 2, rows_per_lut=0),
            r"rows_per_lut must be at least 1, got 0\.",
        ),
        (
            lambda: fit_lut(np.zeros(2, np.float32), 2, np.ones(3)),
            r"importance must have the shape of the values, \(2,\), got \(3,\)\.",
        ),
        (
            lambda: palettize(np.zeros((2, 3), np.float32), 2, importance=np.ones((3, 2))),
            r"importance must have the shape of the values, \(2, 3\), got \(3, 2\)\.",
        ),
        (
            lambda: fit_lut(np.zeros(2, np.float32), 2, np.array([1, np.nan])),
            r"importance must be finite and not negative, got a NaN, an Inf or a negative number\.",
        ),
        (
            lambda: fit_lut(np.zeros(2, np.float32), 2, np.array([1, -1])),
            r"importance must be finite and not negative, got a NaN, an Inf or a negative number\.",
        ),
        (
            lambda: assign(np.zeros(2, np.float32), np.zeros(0, np.float32)),
            r"lut must be \[K\] with 1 to 256 entries, got shape \(0,\)\.",
        ),
    ],
)
def test_what_cannot_be_palettized_is_refused(call, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        call()


# --- palettes of int8 entries


def weight_error(weight, artifact):
    return float(((artifact.dequantize().astype(np.float64) - weight) ** 2).sum())


def unequal_channels(shape=(24, 40), seed=0):
    """Output channels from small to a hundred times as large."""
    body = heavy_tailed(int(np.prod(shape)), seed).reshape(shape)
    return (body * np.logspace(-2, 0, shape[0]).reshape(-1, *[1] * (len(shape) - 1))).astype(np.float32)


@given(
    st.lists(st.tuples(st.floats(-7, 7) | st.integers(-14, 14).map(lambda n: n / 2), st.floats(0.125, 8)), min_size=1),
    st.integers(1, 3),
)
def test_integers_are_the_best_there_are(values, k):
    points, masses = np.array(values, np.float64).T
    chosen = best_integers(points, masses, k, 7)
    assert len(chosen) == k
    assert (np.diff(chosen) > 0).all()
    error = sum(m * min((v - c) ** 2 for c in chosen.tolist()) for v, m in values)
    assert error == pytest.approx(best_integer_error(points.tolist(), masses.tolist(), k, 7), rel=1e-9, abs=1e-9)


@st.composite
def int8_cases(draw):
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    random = np.random.default_rng(draw(st.integers(0, 999)))
    weight = random.standard_normal(shape) * np.exp(random.standard_normal(shape[0])).reshape(
        -1, *[1] * (len(shape) - 1)
    )
    options = {
        "bits": draw(st.integers(1, 8)),
        "rows_per_lut": draw(st.none() | st.integers(1, 4)),
        "axis": draw(st.integers(0, len(shape) - 1)),
        "reduce_range": draw(st.booleans()),
        "per_channel": draw(st.booleans()),
    }
    return weight.astype(np.float32), options


@given(int8_cases())
def test_an_int8_palette_is_integers_times_a_scale_and_its_codes_are_the_nearest(case):
    weight, options = case
    got = palettize_int8(weight, **options)
    largest = 63 if options["reduce_range"] else 127
    assert got.lut.dtype == np.int8
    assert np.abs(got.lut.astype(int)).max() <= largest
    assert got.lut.shape[1] <= 1 << options["bits"]
    assert got.scale.shape == ((weight.shape[options["axis"]],) if options["per_channel"] else ())
    assert got.integers() is not None
    scale = got.scale if options["per_channel"] else np.full(weight.shape[options["axis"]], got.scale)
    for index in np.ndindex(weight.shape):
        channel = index[options["axis"]]
        lut = got.lut[0 if options["rows_per_lut"] is None else channel // options["rows_per_lut"]].tolist()
        near = nearest(float(weight[index]) / float(scale[channel]), lut)
        assert lut[got.codes[index]] == lut[near]


@pytest.mark.parametrize("reduce_range", [False, True])
def test_at_eight_bits_it_is_no_worse_than_every_integer(reduce_range):
    weight = unequal_channels()
    got = palettize_int8(weight, 8, reduce_range=reduce_range)
    assert weight_error(weight, got) <= weight_error(weight, round_to_nearest(weight, 8, reduce_range=reduce_range))


@pytest.mark.parametrize("bits", range(2, 7))
def test_it_beats_one_palette_of_floats_and_a_uniform_grid_where_channels_are_unequal(bits):
    weight = unequal_channels()
    error = weight_error(weight, palettize_int8(weight, bits))
    assert error < weight_error(weight, palettize(weight, bits))
    assert error <= weight_error(weight, round_to_nearest(weight, bits))


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_it_is_no_worse_than_k_means_with_entries_rounded(bits):
    weight = unequal_channels()
    got = palettize_int8(weight, bits)
    steps = weight / got.scale[:, None]
    rounded = np.unique(np.rint(fit_lut(steps, bits, np.broadcast_to(got.scale[:, None] ** 2, steps.shape))))
    again = rounded[assign(steps, rounded.astype(np.float32))] * got.scale[:, None]
    assert weight_error(weight, got) <= ((again.astype(np.float64) - weight) ** 2).sum() * (1 + 1e-6)


def test_few_values_are_kept_and_channels_of_zeros_are_zeros():
    weight = np.array([[-3.0, 0.0, 3.0], [0.0, 0.0, 0.0], [5.0, -5.0, 5.0]], np.float32)
    got = palettize_int8(weight, 4)
    assert got.lut.tolist() == [[-127, 0, 127]]
    np.testing.assert_allclose(got.dequantize(), weight, rtol=1e-6)
    assert palettize_int8(np.zeros((2, 0), np.float32), 2).lut.shape == (1, 0)


def test_an_int8_palette_of_what_is_not_finite_is_refused():
    with pytest.raises(ConfigError, match=r"^Weights to palettize must be finite, got 1 NaN or Inf among 2\.$"):
        palettize_int8(np.array([1, np.inf], np.float32), 2)
    with pytest.raises(ConfigError, match=r"^bits must be in \[1, 8\], got 9\.$"):
        palettize_int8(np.zeros(3, np.float32), 9)


@pytest.mark.parametrize("exponent", [-100, -30, -7, 0, 14, 100])
@pytest.mark.parametrize("rows_per_lut", [None, 4])
def test_entries_of_float16_are_what_codes_are_nearest_to(rows_per_lut, exponent):
    weight = np.ldexp(np.random.default_rng(0).uniform(-1, 1, (10, 200)).astype(np.float32), exponent)
    plain, made = (palettize(weight, 4, rows_per_lut, lut_dtype=dtype) for dtype in ("float32", "float16"))
    assert made.lut.dtype == np.float16
    assert (made.scale is None) == (-8 < exponent <= 15)
    assert made.nbytes == plain.nbytes - plain.lut.nbytes // 2 + (0 if made.scale is None else 4)
    errors = [np.square(m.dequantize().astype(np.float64) - weight).sum() for m in (plain, made)]
    assert errors[1] <= 1.001 * errors[0]
    for row, codes, table in zip(
        weight, made.codes, np.repeat(made.lut, 4 if rows_per_lut else 10, axis=0), strict=False
    ):
        entries = table.astype(np.float32) * (1 if made.scale is None else made.scale)
        np.testing.assert_array_equal(entries[assign(row, entries)], entries[codes])


def test_palettes_of_int8_are_made_elsewhere():
    message = r"^lut_dtype must be float32 or float16, got 'int8'; palettize_int8 makes int8 palettes\.$"
    with pytest.raises(ConfigError, match=message):
        palettize(np.ones(4, np.float32), 2, lut_dtype="int8")
