"""95 % intervals for a mean difference between two models that saw the same samples.

Source: normal approximation for paired real-valued scores. For 0/1 scores the adjusted Wald interval of D. G. Bonett
and R. M. Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired data",
Journal of Educational and Behavioral Statistics 37 (2012): one sample is added to each kind of disagreement. For one
number over all samples the percentile bootstrap of B. Efron, "Bootstrap methods: another look at the jackknife", Annals
of Statistics 7 (1979), both models on the same resamples. For independent runs Student's t.
Code: written from the formulas; no code copied.
Deviations: the interval for 0/1 scores is widened to contain the measured difference if rounding would exclude it.
"""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from qcompress.errors import DataError

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]

Z95: Final = 1.959963984540054  # 97.5 % quantile of the normal distribution
RESAMPLES: Final = 1000


def of_scores(worse: Floats, *, zero_one: bool) -> Interval | None:
    """Return the 95 % interval of the mean of paired differences.

    Real-valued scores: mean ± 1.96 standard errors, with width 0 if all differences are equal. Two models whose 0/1
    scores agree on all N samples may still differ on other samples: their interval is ± 2.8 / (N + 2), close to the
    rule of three (3 / N).

    Args:
        worse: how much worse the second model is, per sample.
        zero_one: whether all scores of both models are 0 or 1.

    Returns:
        (low, high); None for a single real-valued score, because the spread is unknown.

    >>> [round(end, 3) for end in of_scores(np.array([0.0, 1.0, 0.0, 1.0]), zero_one=False)]
    [-0.066, 1.066]
    >>> [round(end, 5) for end in of_scores(np.zeros(998), zero_one=True)]
    [-0.00277, 0.00277]
    """
    n, mean = len(worse), float(worse.mean())
    if zero_one:
        lost, won = (float((worse == sign).sum()) for sign in (1, -1))
        p, q = (lost + 1) / (n + 2), (won + 1) / (n + 2)
        half = Z95 * float(np.sqrt((p + q - (p - q) ** 2) / (n + 2)))
        return max(-1.0, min(p - q - half, mean)), min(1.0, max(p - q + half, mean))
    if n < 2:
        return None
    if (worse == worse[0]).all():
        return float(worse[0]), float(worse[0])
    half = Z95 * float(worse.std(ddof=1)) / n**0.5
    return mean - half, mean + half


def of_runs(values: Sequence[float]) -> Interval | None:
    """Return the 95 % interval of the mean of independent runs, such as trainings with several seeds.

    Args:
        values: one per run.

    Returns:
        (low, high) by Student's t; None for a single run.

    >>> [round(end, 3) for end in of_runs([0.0, 1.0, 2.0])]
    [-1.484, 3.484]
    """
    from scipy.special import stdtrit

    n = len(values)
    if n < 2:
        return None
    mean = float(np.mean(values))
    half = float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1)) / n**0.5
    return mean - half, mean + half


def of_number(
    worse: Callable[[npt.NDArray[np.intp]], float], n: int, *, seed: int, resamples: int = RESAMPLES
) -> Interval | None:
    """Return the 95 % interval of one number over all samples, by paired bootstrap.

    Args:
        worse: returns how much worse the second model is on the samples with these indices. If it raises DataError or
            returns NaN (such as AUC on samples of one class), other samples are drawn instead.
        n: number of samples.
        seed: seed of the resampling.
        resamples: number of resamples.

    Returns:
        (low, high); None if there is a single sample, or if the number is undefined for most resamples.

    >>> values = np.arange(100.0)
    >>> [round(end) for end in of_number(lambda index: float(values[index].mean()), 100, seed=0)]
    [44, 55]
    """
    if n < 2:
        return None
    rng = np.random.default_rng(seed)
    found: list[float] = []
    for _ in range(2 * resamples):
        try:
            value = worse(rng.integers(0, n, n))
        except DataError:
            continue
        if np.isfinite(value):
            found.append(value)
        if len(found) == resamples:
            break
    if len(found) < resamples:
        return None
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)
