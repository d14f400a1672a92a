"""The built-in metrics: each maps outputs and labels to one score per sample, or to one number over all samples.

Each uses the model's first output; for a metric over several outputs, the user writes a `module:fn`.

Shape suffixes: N = samples, C = classes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompress.errors import DataError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Outputs = Mapping[str, Array]
# (outputs by name, labels or None) -> scores [N], or one number.
Score = Callable[[Outputs, Array | None], object]


def top1(outputs: Outputs, y: Array | None) -> Floats:
    """Return 1 for each sample whose largest output is that of its label, else 0; the first of equal outputs counts.

    >>> top1({"output": np.array([[0.1, 0.9], [0.8, 0.2]])}, np.array([1, 1])).tolist()
    [1.0, 0.0]
    """
    logits_NC, label_N = _classes("top1", outputs, y)
    return np.asarray(logits_NC.argmax(axis=1) == label_N, np.float64)


def top5(outputs: Outputs, y: Array | None) -> Floats:
    """Return 1 for each sample whose label is among its five largest outputs, else 0; the first of equal outputs count.

    >>> top5({"output": np.arange(12.0).reshape(2, 6)}, np.array([0, 1])).tolist()
    [0.0, 1.0]
    """
    logits_NC, label_N = _classes("top5", outputs, y)
    classes = logits_NC.shape[1]
    if classes <= 5:
        raise DataError(f"Metric top5 needs more than 5 classes, got {classes}: it would be 1 everywhere. Use top1.")
    own_N1 = np.take_along_axis(logits_NC, label_N[:, None], axis=1)
    earlier_NC = np.arange(classes) < label_N[:, None]
    before_N = ((logits_NC > own_N1) | ((logits_NC == own_N1) & earlier_NC)).sum(axis=1)
    return np.asarray(before_N < 5, np.float64)


def auc(outputs: Outputs, y: Array | None) -> float:
    """Return the area under the ROC curve of a two-class model, by ranks; equal scores count half.

    The score is the single output, or the second of two outputs minus the first (logits or probabilities).

    >>> auc({"output": np.array([0.1, 0.4, 0.35, 0.8])}, np.array([0, 0, 1, 1]))
    0.75
    """
    name, values = _first("auc", outputs)
    if values.ndim == 2 and values.shape[1] == 2:
        score_N = values[:, 1].astype(np.float64) - values[:, 0]
    elif values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 1):
        score_N = values.reshape(-1).astype(np.float64)
    else:
        raise DataError(
            f"Metric auc needs an output of shape [N], [N, 1] or [N, 2], {name!r} is {list(values.shape)}: "
            "it applies to two classes only; use top1 for more."
        )
    label_N = _labels("auc", y, len(values))
    positive_N = label_N == 1
    positives, negatives = int(positive_N.sum()), int((label_N == 0).sum())
    if positives + negatives < len(label_N):
        raise DataError(f"Metric auc needs labels 0 and 1, got {sorted(set(label_N.tolist()))[:5]}.")
    if not positives or not negatives:
        raise DataError(f"Metric auc needs labels of both classes, got only {label_N[0]}: use data that holds both.")
    _, place_N, counts = np.unique(score_N, return_inverse=True, return_counts=True)
    middle_rank = counts.cumsum() - (counts - 1) / 2
    rank_sum = float(middle_rank[place_N.reshape(-1)][positive_N].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def mse(outputs: Outputs, y: Array | None) -> Floats:
    """Return the mean squared difference between output and label, per sample.

    >>> mse({"output": np.array([[1.0], [2.0]])}, np.array([1.0, 4.0])).tolist()
    [0.0, 4.0]
    """
    difference = np.subtract(*_alike("mse", outputs, y))
    return np.asarray((difference**2).mean(axis=1))


def cosine(outputs: Outputs, y: Array | None) -> Floats:
    """Return the cosine of the angle between output and label, per sample; 0 if one of them is all zeros.

    >>> cosine({"output": np.array([[3.0, 4.0], [0.0, 0.0]])}, np.array([[6.0, 8.0], [1.0, 0.0]])).round(12).tolist()
    [1.0, 0.0]
    """
    a, b = (_unit(v) for v in _alike("cosine", outputs, y))
    return np.asarray((a * b).sum(axis=1).clip(-1, 1))


def _unit(values: Floats) -> Floats:
    """Return rows scaled to length 1; rows of zeros stay. Prescaled, so that no square overflows or underflows."""
    largest = np.abs(values).max(axis=1, keepdims=True)
    scaled = values / np.where(largest > 0, largest, 1)
    length = np.sqrt((scaled**2).sum(axis=1, keepdims=True))
    return np.asarray(scaled / np.where(length > 0, length, 1))


def _first(metric: str, outputs: Outputs) -> tuple[str, Array]:
    if not outputs:
        raise DataError(f"Metric {metric} needs an output, but the model has no outputs.")
    name, values = next(iter(outputs.items()))
    values = np.asarray(values)
    bad = int(np.isnan(values).sum()) if values.dtype.kind == "f" else 0
    if bad:
        raise DataError(f"Metric {metric} needs numbers, {bad} of {values.size} values of output {name!r} are NaN.")
    return name, values


def _classes(metric: str, outputs: Outputs, y: Array | None) -> tuple[Array, npt.NDArray[np.int64]]:
    name, logits_NC = _first(metric, outputs)
    if logits_NC.ndim != 2 or logits_NC.shape[1] < 2:
        raise DataError(
            f"Metric {metric} needs an output of shape [N, classes], {name!r} is {list(logits_NC.shape)}: "
            "choose a metric that fits the model, or pass your own as module:fn."
        )
    label_N = _labels(metric, y, len(logits_NC))
    classes = logits_NC.shape[1]
    if ((label_N < 0) | (label_N >= classes)).any():
        raise DataError(
            f"Metric {metric} needs labels from 0 to {classes - 1} for the {classes} classes of {name!r}, "
            f"got labels from {label_N.min()} to {label_N.max()}."
        )
    return logits_NC, label_N


def _labels(metric: str, y: Array | None, samples: int) -> npt.NDArray[np.int64]:
    labels = _given(metric, y, samples)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "biu":
        raise DataError(
            f"Metric {metric} needs one integer label per sample, got {labels.dtype} of shape {list(labels.shape)}: "
            "store class indices as int64."
        )
    return labels.astype(np.int64)


def _given(metric: str, y: Array | None, samples: int) -> Array:
    if y is None:
        raise DataError(
            f"Metric {metric} needs labels, but the data has no labels: add an array y, or name its key "
            "(FILE.npz:x_key,y_key)."
        )
    labels = np.asarray(y)
    if labels.ndim == 0 or len(labels) != samples:
        came = "a single number" if labels.ndim == 0 else str(len(labels))
        raise DataError(f"Metric {metric} needs one label per sample: {samples} outputs, labels: {came}.")
    return labels


def _alike(metric: str, outputs: Outputs, y: Array | None) -> tuple[Floats, Floats]:
    """Return the first output and the labels as [N, elements], in float64."""
    name, values = _first(metric, outputs)
    if values.ndim == 0:
        raise DataError(f"Metric {metric} needs an output with one row per sample, {name!r} is a single number.")
    labels = _given(metric, y, len(values))
    if labels.dtype.kind not in "biuf" or _trailing(values) != _trailing(labels):
        raise DataError(
            f"Metric {metric} needs labels shaped like the output {name!r}, {list(values.shape)}, "
            f"got {labels.dtype} of shape {list(labels.shape)}: for class indices use top1."
        )
    flat = (len(values), -1)
    return values.astype(np.float64).reshape(flat), labels.astype(np.float64).reshape(flat)


def _trailing(values: Array) -> tuple[int, ...]:
    """Return the shape of one sample; [N] and [N, 1] count as the same."""
    return () if values.shape[1:] == (1,) else values.shape[1:]
