import ml_dtypes
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompress.analysis import TensorStatistics
from qcompress.analysis import statistics as of
from qcompress.analysis.moments import _CHUNK
from tests.helpers.examples import examples

FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


def reference(values):
    """Moments in extended precision, by the textbook's two passes."""
    x = values.astype(np.float64).ravel().astype(np.longdouble)
    x = x[np.isfinite(x)]
    d = x - x.mean()
    variance = (d**2).mean()
    return float(x.mean()), float(np.sqrt(variance)), float((d**4).mean() / variance**2), np.abs(d) / np.sqrt(variance)


def check(values):
    s = of(values)
    mean, std, kurtosis, sigmas = reference(values)
    spread = s.max - s.min
    assert s.mean == pytest.approx(mean, rel=1e-12, abs=1e-12 * spread)
    assert s.std == pytest.approx(std, rel=1e-9)
    assert s.kurtosis == pytest.approx(kurtosis, rel=1e-8)
    for share, k in ((s.beyond_3_sigma, 3), (s.beyond_6_sigma, 6)):
        surely, perhaps = (np.count_nonzero(sigmas > k * f) / sigmas.size for f in (1 + 1e-9, 1 - 1e-9))
        assert surely <= share <= perhaps


moderate = st.floats(-1e6, 1e6, allow_subnormal=False)


@given(hnp.arrays(np.float64, hnp.array_shapes(max_dims=3, max_side=20), elements=moderate))
def test_moments_against_extended_precision(values):
    if np.ptp(values) > 1e-6 * np.abs(values).max():
        check(values)
    assert of(values).min == values.min()
    assert of(values).max == values.max()
    assert of(values).count == values.size


@given(st.integers(0, 2**32 - 1), st.floats(-1e4, 1e4), st.sampled_from([1e-3, 1.0, 1e3]), st.sampled_from(FLOATS[:2]))
@examples(40)
def test_a_mean_that_is_large_against_the_spread(seed, mean, std, dtype):
    values = (mean + std * np.random.default_rng(seed).standard_normal(5000)).astype(dtype)
    if np.ptp(values):
        check(values)


def test_mean_1e4_and_std_1e_minus_3():
    noise = np.random.default_rng(0).standard_normal(400_000)
    s = of(1e4 + 1e-3 * noise)
    assert s.std == pytest.approx(1e-3 * noise.std(), rel=1e-6)  # 1e4 itself carries 1e-12 of noise
    assert s.kurtosis == pytest.approx(scipy.stats.kurtosis(noise, fisher=False), rel=1e-6)


def test_against_scipy_on_a_weight_with_outliers():
    values = np.random.default_rng(1).standard_t(4, (64, 33, 3, 3)).astype(np.float32)
    s = of(values)
    x = values.astype(np.float64)
    assert s.kurtosis == pytest.approx(scipy.stats.kurtosis(x, axis=None, fisher=False), rel=1e-12)
    assert s.std == pytest.approx(x.std(), rel=1e-13)
    far = np.abs(x - x.mean()) / x.std()
    assert (s.beyond_3_sigma, s.beyond_6_sigma) == ((far > 3).mean(), (far > 6).mean())
    assert s.beyond_6_sigma > 0
    assert s.range == float(values.max()) - float(values.min())


@pytest.mark.parametrize("dtype", [*FLOATS, np.int8, np.uint8, np.int64, np.bool_, ml_dtypes.float8_e4m3fn])
def test_every_dtype(dtype):
    values = np.random.default_rng(2).integers(0, 2, 1000).astype(dtype)
    check(values)


def test_more_than_one_chunk_and_every_layout():
    values = np.random.default_rng(3).standard_normal((3, _CHUNK // 2 + 7)).astype(np.float32)
    expected = of(values)
    for other in (values.T, np.asfortranarray(values), np.repeat(values, 2, axis=1)[:, ::2], values.reshape(-1)):
        s = of(other)
        assert s.std == pytest.approx(expected.std, rel=1e-14)
        assert s.kurtosis == pytest.approx(expected.kurtosis, rel=1e-13)
        assert (s.min, s.max, s.count) == (expected.min, expected.max, expected.count)


def test_memory_stays_bounded():
    import tracemalloc

    values = np.zeros(8 * _CHUNK, np.float32)
    values[::2] = 1
    tracemalloc.start()
    of(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * _CHUNK * 8  # less than one float64 copy of the tensor


def test_non_finite_values_are_counted_and_left_out():
    values = np.array([1, np.nan, 3, np.inf, -np.inf, np.nan], np.float32)
    s = of(values)
    assert (s.count, s.non_finite, s.min, s.max, s.mean, s.std) == (6, 4, 1, 3, 2, 1)
    signalling = np.array([0x7F800001, 0x3F800000], np.uint32).view(np.float32)
    assert of(signalling).non_finite == 1


def test_nothing_finite_and_empty():
    assert of(np.full(3, np.nan)) == TensorStatistics(count=3, non_finite=3)
    assert of(np.zeros((0, 4), np.float32)) == TensorStatistics(count=0, non_finite=0)
    assert of(np.zeros(0)).range is None


@pytest.mark.parametrize("value", [0.0, -3.5, 1e4 + 0.1, 1e300])
def test_constant_and_one_element(value):
    for values in (np.array(value), np.full((7, 5), value)):
        s = of(values)
        assert (s.min, s.max, s.mean, s.std, s.range) == (value, value, value, 0, 0)
        assert s.kurtosis is None
        assert (s.beyond_3_sigma, s.beyond_6_sigma) == (0, 0)


def test_complex_values_get_only_their_counts():
    assert of(np.array([1j, np.nan])) == TensorStatistics(count=2, non_finite=1)


def test_a_value_at_exactly_3_sigma_is_not_beyond():
    for scale in (1, 0.1, 7e-5):
        assert of(np.array([scale] + 9 * [0.0])).beyond_3_sigma == 0


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e150, 1e300])
def test_no_over_or_underflow_of_fourth_powers(scale):
    values = np.random.default_rng(4).uniform(-1, 1, 1000)
    s = of(values * scale)
    assert s.kurtosis == pytest.approx(of(values).kurtosis, rel=1e-9)
    assert s.std == pytest.approx(of(values).std * scale, rel=1e-9)
    assert of(np.array([-1.7e308, 1.7e308])).range is None
    assert of(np.array([5e-324, 0])).kurtosis == pytest.approx(1)


def test_values_are_not_modified():
    values = np.arange(6, dtype=np.float32)
    values.flags.writeable = False
    assert of(values).mean == 2.5
