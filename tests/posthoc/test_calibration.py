"""Activation grids from observations: each method against the slow way on the samples themselves."""

import math
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompress.errors import ConfigError, DataError
from qcompress.posthoc import calibration
from qcompress.posthoc.calibration import METHODS, choose_grid, saturation, sqnr_db
from qcompress.posthoc.histogram import Observer
from tests.helpers.reference import affine_error, best_affine_error, entropy_divergences

BITS = (1, 2, 3, 4, 8)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
ARRAYS = hnp.arrays(np.float32, st.integers(1, 200), elements=FINITE | st.floats(-2, 2, width=32) | st.just(0.0))


def samples(kind, count=4000, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=count)
    return {
        "relu": np.maximum(x, 0),
        "gelu": x * (1 + np.tanh(0.8 * x * (1 + 0.045 * x * x))) / 2,
        "normal": x,
        "shifted": 2 * x + 1,
        "negative": -np.abs(x) - 0.25,
        "heavy": generator.standard_t(3, size=count),
        "outlier": np.append(x[1:], 50.0),
        "uniform": generator.uniform(-1, 3, size=count),
    }[kind].astype(np.float32)


KINDS = ("relu", "gelu", "normal", "shifted", "negative", "heavy", "outlier", "uniform")


def seen(*batches):
    observer = Observer("x")
    for batch in batches:
        observer.observe(np.asarray(batch))
    return observer


def grid(observer, bits, method="mse", percentile=99.99):
    return choose_grid(observer, bits, method, percentile)


def floats(chosen):
    scale, zero_point = chosen
    return float(scale), zero_point


def resolution(values):
    """How far a value may be from where its bin says that it is, root of the sum of squares."""
    magnitudes = np.abs(values.astype(np.float64))
    return float(np.sqrt((np.maximum(magnitudes * 2.0**-10, magnitudes.max() * 2.0**-19) ** 2).sum()))


@pytest.mark.parametrize("kind", KINDS)
def test_an_observer_knows_the_exact_extremes_and_counts(kind):
    values = samples(kind)
    observer = seen(*np.array_split(values, 7))
    assert (observer.min, observer.max) == (values.min(), values.max())
    assert (observer.count, observer.zeros) == (values.size, np.count_nonzero(values == 0))


@pytest.mark.parametrize("kind", KINDS)
def test_the_histogram_counts_and_sums_the_samples(kind):
    values = samples(kind)
    histogram = seen(values).histogram()
    for side, magnitudes in ((histogram.positive, values[values > 0]), (histogram.negative, -values[values < 0])):
        assert side.counts.sum() == magnitudes.size
        assert (side.left < side.right).all()
        assert (side.right[1:-1] <= side.left[2:]).all()
        np.testing.assert_allclose(side.totals[1], magnitudes.astype(np.float64).sum(), rtol=1e-3)
        for limit in side.left:
            assert side.below(np.array([limit]))[0][0] == np.count_nonzero(magnitudes < limit)


@given(st.lists(ARRAYS, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_neither_order_nor_batching_matters(batches, random):
    whole = np.concatenate(batches)
    shuffled = list(whole)
    random.shuffle(shuffled)
    wanted = seen(whole).histogram()
    for observer in (seen(*batches), seen(*reversed(batches)), seen(np.array(shuffled).reshape(-1, 1))):
        got = observer.histogram()
        assert (got.count, got.range) == (wanted.count, wanted.range)
        for a, b in ((got.positive, wanted.positive), (got.negative, wanted.negative)):
            for field in ("left", "right", "counts"):
                np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


def test_large_batches_are_counted_in_chunks_of_any_layout():
    values = np.random.default_rng(0).normal(size=(3, 7, 10007)).astype(np.float32)
    before = values.copy()
    wanted = seen(*values.reshape(-1, 7)).histogram()
    for layout in (values, values.T, np.repeat(values, 2, axis=2)[:, :, ::2], np.asfortranarray(values)):
        np.testing.assert_array_equal(seen(layout).histogram().positive.counts, wanted.positive.counts)
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_other_float_dtypes_count_as_float32(dtype):
    values = samples("normal").astype(dtype)
    assert grid(seen(values), 8) == grid(seen(values.astype(np.float32)), 8)


def test_negative_zero_is_zero():
    observer = seen(np.array([-0.0, 0.0, -1.0, 1.0], np.float32), np.array([-0.0, 1.0], np.float32))
    assert observer.zeros == 3
    assert observer.histogram().negative.totals[0] == 1


def test_values_of_more_octaves_than_there_are_bins_stay_counted():
    values = np.float32(2.0) ** np.arange(-140, 120, dtype=np.float32)
    for order in (values, values[::-1]):
        histogram = seen(*order).histogram()
        assert histogram.positive.totals[0] == values.size
        assert histogram.negative.totals[0] == 0
        assert histogram.positive.left[1] == values.min()


def test_an_empty_batch_is_nothing():
    observer = seen(np.zeros((0, 3), np.float32), np.ones(2, np.float32))
    assert observer.count == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_and_leave_no_trace(bad):
    observer = seen(np.ones(3, np.float32))
    message = "^x must be finite in float32 on calibration data, but 2 of 5 values are not; remove the samples that .*$"
    with pytest.raises(DataError, match=message):
        observer.observe(np.array([1, bad, 2, bad, -1], np.float32))
    assert (observer.count, observer.min, observer.max) == (3, 1, 1)


def test_float64_beyond_float32_is_not_finite():
    with pytest.raises(DataError, match="but 1 of 2 values are not"):
        seen(np.array([1e39, 0]))


def test_nothing_observed_is_an_error():
    message = "^x was not observed: its grid needs calibration data.$"
    for ask in (grid, lambda o, b: saturation(o, 1, 0, b), lambda o, b: sqnr_db(o, 1, 0, b)):
        with pytest.raises(DataError, match=message):
            ask(seen(), 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 9}, "bits must be in [1, 8], got 9."),
        (
            {"bits": 8, "method": "msee"},
            "method must be one of minmax, percentile, entropy, mse, got 'msee'. Did you mean mse?",
        ),
        ({"bits": 8, "percentile": 50.0}, "percentile must be above 50 and at most 100, got 50.0."),
        ({"bits": 8, "percentile": 100.1}, "percentile must be above 50 and at most 100, got 100.1."),
        ({"bits": 8, "percentile": math.nan}, "percentile must be above 50 and at most 100, got nan."),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        grid(seen(np.ones(2, np.float32)), **arguments)


@pytest.mark.parametrize("method", METHODS)
@given(values=ARRAYS, bits=st.sampled_from(BITS))
def test_a_grid_is_always_usable(method, values, bits):
    scale, zero_point = grid(seen(values), bits, method)
    assert isinstance(scale, np.float32)
    assert isinstance(zero_point, int)
    assert np.finfo(np.float32).tiny <= scale <= np.finfo(np.float32).max
    assert 0 <= zero_point < 1 << bits
    if values.min() >= 0:
        assert zero_point == 0
    elif values.max() <= 0:
        assert zero_point == (1 << bits) - 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_minmax_is_the_exact_range(kind, bits):
    values = samples(kind)
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    levels = (1 << bits) - 1
    scale, zero_point = grid(seen(values), bits, "minmax")
    assert scale == np.float32((high - low) / levels)
    assert zero_point == np.rint(-low / ((high - low) / levels))
    worst = np.abs((np.clip(np.rint(values / scale) + zero_point, 0, levels) - zero_point) * scale - values).max()
    assert worst <= 0.5001 * scale


@pytest.mark.parametrize("upper", [55.0, 90.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_percentiles_are_numpys_to_within_a_bin(kind, upper):
    values = samples(kind)
    low, high = np.percentile(values.astype(np.float64), [100 - upper, upper])
    wanted = (min(low, 0.0), max(high, 0.0))
    got = calibration.percentile(seen(values).histogram(), 255, upper)
    np.testing.assert_allclose(got, wanted, rtol=2.0**-10, atol=float(np.abs(values).max()) * 2.0**-19)


def test_percentiles_that_leave_nothing_give_the_whole_range():
    values = np.zeros(10**5, np.float32)
    values[7], values[9] = -1, 3
    assert grid(seen(values), 8, "percentile") == grid(seen(values), 8, "minmax")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_entropy_is_the_loops(kind, bits, monkeypatch):
    monkeypatch.setattr(calibration, "_THRESHOLDS", 512)  # loops take 16 times as long over 2048
    # The largest magnitude being a power of two, the bins of equal width are unions of the observer's bins.
    values = samples(kind)
    values *= np.float32(2 / np.abs(values).max())
    values[np.abs(values).argmax()] = 2 * np.sign(values[np.abs(values).argmax()])
    divergences = entropy_divergences(values, 1 << bits, 512)
    threshold = min(divergences, key=divergences.__getitem__) / 256
    low, high = calibration.entropy(seen(values).histogram(), (1 << bits) - 1, 100)
    assert (low, high) == (max(min(values.min(), 0), -threshold), min(max(values.max(), 0), threshold))


@pytest.mark.parametrize("kind", ["relu", "shifted"])
def test_entropy_is_nearly_the_best_where_bins_are_cut(kind):
    values = samples(kind, 50_000)
    divergences = entropy_divergences(values, 16, 2048)
    low, high = calibration.entropy(seen(values).histogram(), 15, 100)
    i = round(max(-low, high) / np.abs(values).max() * 2048)
    assert divergences[i] <= 1.05 * min(divergences.values())


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_within_two_percent_of_brute_force(kind, bits):
    values, levels = samples(kind), (1 << bits) - 1
    error = affine_error(values, *floats(grid(seen(values), bits)), levels)
    assert error <= 1.02 * best_affine_error(values, levels, 60)


@pytest.mark.parametrize("bits", [2, 4, 8])
@given(values=ARRAYS)
def test_mse_is_never_worse_than_minmax(bits, values):
    observer, levels = seen(values), (1 << bits) - 1
    errors = {m: affine_error(values, *floats(grid(observer, bits, m)), levels) for m in ("mse", "minmax")}
    assert math.sqrt(errors["mse"]) <= math.sqrt(errors["minmax"]) * (1 + 1e-6) + 2 * resolution(values)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_magnitude_scales_the_grid_and_nothing_else(method, bits, magnitude):
    values = samples("gelu")
    factor = 2.0 ** round(math.log2(magnitude))
    scale, zero_point = grid(seen(values), bits, method)
    got_scale, got_zero_point = grid(seen(values.astype(np.float64) * factor), bits, method)
    assert got_zero_point == zero_point
    np.testing.assert_allclose(got_scale, float(scale) * factor, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("constant", [3.7, -0.01, 1e-30, -1e30, 2.0])
@pytest.mark.parametrize("count", [1, 1000])
def test_a_constant_is_a_level(method, bits, constant, count):
    values = np.full(count, constant, np.float32)
    scale, zero_point = grid(seen(values), bits, method)
    code = np.clip(np.rint(values[0] / scale) + zero_point, 0, (1 << bits) - 1)
    np.testing.assert_allclose((code - zero_point) * scale, values[0], rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("extreme", "limit"), [(3e38, np.finfo(np.float32).max), (1e-44, np.finfo(np.float32).tiny)])
def test_a_scale_is_normal_at_the_ends_of_float32(method, extreme, limit):
    chosen, _ = grid(seen(np.array([-extreme, extreme], np.float32)), 1, method)
    assert chosen == limit or (method == "mse" and 0 < chosen < limit)


@pytest.mark.parametrize("method", ["minmax", "mse"])  # entropy's groups are counted from the left
@given(values=ARRAYS.map(np.abs).filter(np.any), bits=st.sampled_from(BITS))
def test_mirrored_values_get_the_mirrored_grid(method, values, bits):
    scale, zero_point = grid(seen(values), bits, method)
    assert grid(seen(-values), bits, method) == (scale, (1 << bits) - 1 - zero_point)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_alone_get_scale_one(method):
    assert grid(seen(np.zeros(5, np.float32)), 4, method) == (np.float32(1), 0)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_saturation_and_sqnr_are_those_of_the_samples(kind, bits):
    values, levels = samples(kind), (1 << bits) - 1
    observer = seen(values)
    for method in METHODS:
        scale, zero_point = floats(grid(observer, bits, method))
        x = values.astype(np.float64)
        outside = (x > (levels - zero_point + 0.5) * scale) | (x < (-zero_point - 0.5) * scale)
        assert saturation(observer, scale, zero_point, bits) == pytest.approx(outside.mean(), abs=3.01 / values.size)
        wanted = 10 * math.log10(float((x**2).sum()) / affine_error(values, scale, zero_point, levels))
        assert sqnr_db(observer, scale, zero_point, bits) == pytest.approx(wanted, abs=0.1)


def test_zeros_alone_have_no_noise():
    observer = seen(np.zeros(5, np.float32))
    assert sqnr_db(observer, 1, 0, 8) == math.inf
    assert saturation(observer, 1, 0, 8) == 0


def test_every_method_but_minmax_clips_an_outlier():
    values = np.append(samples("normal", 50_000), np.float32(40))
    for method in METHODS:
        scale, zero_point = grid(seen(values), 4, method)
        assert ((15 - zero_point) * scale > 30) == (method == "minmax"), method
