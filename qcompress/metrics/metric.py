"""Metrics that score a model's outputs, and the comparison of a compressed model with its original.

Needs numpy only; all sums are in float64. Both models are scored on the same samples, so the result is a paired
difference with its 95 % interval.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, final

import numpy as np
import numpy.typing as npt

from qcompress.data.arrays import as_array
from qcompress.data.samples import find_function
from qcompress.errors import ConfigError, DataError, did_you_mean
from qcompress.metrics import intervals as _intervals
from qcompress.metrics import scores as _scores
from qcompress.metrics.intervals import RESAMPLES
from qcompress.metrics.result import MetricResult
from qcompress.metrics.scores import Floats, Outputs, Score
from qcompress.user_code import one_line

Array = npt.NDArray[Any]
Unit = Literal["fraction", "metric"]


@final
@dataclass(frozen=True, slots=True)
class Metric:
    """A function that scores outputs, with its name and direction.

    Args:
        name: the name that the user wrote, without absolute paths.
        fn: (outputs by name, labels or None) -> one score per sample, or one number over all samples.
        lower_is_better: whether a lower value is better, as for a loss.
        unit: `fraction` for a share of 1, which is shown in percent; `metric` for the metric's own unit.
    """

    name: str
    fn: Score
    lower_is_better: bool = False
    unit: Unit = "metric"

    def __call__(self, outputs: Outputs, y: Array | None) -> Floats | float:
        """Return float64 scores [samples], or one number.

        Raises:
            DataError: the outputs or labels do not fit the metric, or it fails or returns non-finite values.

        >>> load_metric("top1")({"output": np.array([[0.1, 0.9], [0.8, 0.2]])}, np.array([1, 1]))
        array([1., 0.])
        """
        value = self._scores(outputs, y)
        scores = np.atleast_1d(value)
        bad = len(scores) - int(np.isfinite(scores).sum())
        if bad:
            what = f"{bad} of {len(scores)} scores are" if np.ndim(value) else "its value is"
            raise DataError(f"Metric {self.name} must give finite numbers, {what} NaN or Inf.")
        return value

    def _scores(self, outputs: Outputs, y: Array | None) -> Floats | float:
        samples = _samples(outputs)
        try:
            result = self.fn(outputs, y)
        except DataError:
            raise
        except (Exception, SystemExit) as e:
            raise DataError(f"Metric {self.name} failed with {one_line(e)}.") from e
        scores = as_array(result)
        if scores.dtype.kind not in "biuf" or scores.shape not in ((), (samples,)):
            raise DataError(
                f"Metric {self.name} must give one number, or one for each of the {samples} samples, "
                f"got {type(result).__name__} of {scores.dtype}, shape {list(scores.shape)}."
            )
        return scores.astype(np.float64) if scores.ndim else float(scores)


# The table of metrics. To add one, write a function in `scores.py` and add a line here.
METRICS: Final[Mapping[str, Metric]] = {
    "top1": Metric("top1", _scores.top1, unit="fraction"),
    "top5": Metric("top5", _scores.top5, unit="fraction"),
    "auc": Metric("auc", _scores.auc, unit="fraction"),
    "mse": Metric("mse", _scores.mse, lower_is_better=True),
    "cosine": Metric("cosine", _scores.cosine),
}


def unit_of(name: str) -> Unit:
    """Return the unit of a metric by its name; `metric` for the user's own metrics.

    >>> unit_of("top1"), unit_of("mse"), unit_of("metrics.py:f1")
    ('fraction', 'metric', 'metric')
    """
    return METRICS[name].unit if name in METRICS else "metric"


def load_metric(spec: str, lower_is_better: bool = False) -> Metric:
    """Return the metric for a name in `METRICS`, `module:fn` or `path/file.py:fn`; the latter two run user code.

    The metrics in `METRICS` use the model's first output; `module:fn` gets all outputs.

    Args:
        spec: the value of `--metric`.
        lower_is_better: whether a lower value of `module:fn` is better; metrics in `METRICS` set this themselves.

    Raises:
        ConfigError: there is no such metric, or `lower_is_better` contradicts it.

    >>> load_metric("mse").lower_is_better, load_metric("auc").lower_is_better
    (True, False)
    """
    if spec in METRICS:
        metric = METRICS[spec]
        if lower_is_better and not metric.lower_is_better:
            raise ConfigError(f"Higher values of metric {spec} are better: leave --lower-is-better out.")
        return metric
    if ":" not in spec:
        raise ConfigError(
            f"Unknown metric {spec!r}; known: {', '.join(METRICS)}, or module:fn.{did_you_mean(spec, METRICS)}"
        )
    name, function = find_function(spec, "--metric")
    return Metric(name, function, lower_is_better)


def compare(
    metric: Metric,
    original_outputs: Outputs,
    compressed_outputs: Outputs,
    y: Array | None,
    seed: int = 0,
    *,
    resamples: int = RESAMPLES,
) -> MetricResult:
    """Return how much worse the compressed model scores on the same samples, with a 95 % interval.

    Scores per sample: the mean paired difference, with a normal approximation. 0/1 scores use the interval of Bonett
    and Price (2012) instead, which stays valid if few samples differ. If no sample differs, it is
    ± 2.8 / (samples + 2), close to the rule of three. Real-valued scores that differ by the same amount on every sample
    give an interval of width 0, because they do not show how far other samples could differ.
    One number over all samples: paired bootstrap with 1,000 resamples; the width is 0 if the number is the same for
    both models on every resample.

    Args:
        metric: from `load_metric`.
        original_outputs: the original's outputs by name, samples along the first axis.
        compressed_outputs: the compressed model's outputs, for the same samples in the same order.
        y: labels, or None if the metric needs no labels.
        seed: seed of the resampling.
        resamples: how many, for one number over all samples; with 0 it has no interval.

    Raises:
        DataError: the outputs and labels do not fit each other or the metric.

    >>> a, b = np.array([[0.9, 0.1]] * 200), np.array([[0.9, 0.1]] * 180 + [[0.1, 0.9]] * 20)
    >>> result = compare(METRICS["top1"], {"output": a}, {"output": b}, np.zeros(200, int))
    >>> result.original, result.compressed, round(result.drop, 3), [round(v, 3) for v in result.interval]
    (1.0, 0.9, 0.1, [0.056, 0.142])
    """
    n = _check_same(original_outputs, compressed_outputs, y)
    sign = -1.0 if metric.lower_is_better else 1.0
    a, b = metric(original_outputs, y), metric(compressed_outputs, y)
    if isinstance(a, float) or isinstance(b, float):
        if not (isinstance(a, float) and isinstance(b, float)):
            raise DataError(f"Metric {metric.name} gave one number for one model and scores per sample for the other.")
        drop = sign * (a - b)

        def worse(index: npt.NDArray[np.intp]) -> float:
            labels = None if y is None else np.asarray(y)[index]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a resample may be degenerate, which is no fault of the user's data
                values = [metric(_take(o, index), labels) for o in (original_outputs, compressed_outputs)]
            return sign * float(values[0] - values[1])

        interval = _intervals.of_number(worse, n, seed=seed, resamples=resamples) if resamples else None
        return MetricResult(metric.name, a, b, drop, interval, metric.lower_is_better, n)
    difference = sign * (a - b)
    zero_one = bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all())
    interval = _intervals.of_scores(difference, zero_one=zero_one)
    drop = float(difference.mean())
    return MetricResult(metric.name, float(a.mean()), float(b.mean()), drop, interval, metric.lower_is_better, n)


def _samples(outputs: Outputs) -> int:
    if not outputs or any(np.ndim(values) == 0 for values in outputs.values()):
        raise DataError("A metric needs outputs with samples along their first axis, got no output or a single number.")
    return len(next(iter(outputs.values())))


def _check_same(a: Outputs, b: Outputs, y: Array | None) -> int:
    if list(a) != list(b):
        raise DataError(
            f"Both models must have the same outputs, the original has {', '.join(a) or 'no output'}, "
            f"the compressed one {', '.join(b) or 'no output'}."
        )
    n, others = _samples(a), {_samples(b)} | {len(v) for o in (a, b) for v in o.values()}
    if y is not None:
        others.add(len(y) if np.ndim(y) else 0)
    if n == 0 or others != {n}:
        raise DataError(
            f"Outputs and labels must hold the same samples, at least one: the original has {n}, "
            f"the others {sorted(others)}."
        )
    return n


def _take(outputs: Outputs, index: npt.NDArray[np.intp]) -> dict[str, Array]:
    return {name: np.asarray(values)[index] for name, values in outputs.items()}
