"""Measures of the distance between two models' outputs that need no labels. All sums are in float64."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompress.errors import DataError

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]

CONSTANT: Final = 1e-5  # outputs whose spread over root mean square is below this count as constant


def sqnr_db(reference: Array, value: Array) -> float | None:
    """Return signal over quantization noise in dB: 10 log10 of Σ (reference - mean)² over Σ (reference - value)².

    The mean is taken over the samples for each element: the signal is how much an output varies from sample to sample
    (see `spread`), so a constant output has no signal, however large it is. The noise is not centred, because an output
    that is off by a constant is wrong.

    Args:
        reference: outputs of the original, samples along the first axis.
        value: outputs of the other model, for the same samples.

    Returns:
        None if the two are equal (infinite dB); below -100 dB if the reference is constant.

    Raises:
        DataError: the shapes differ, there is no sample, or a value is NaN or Inf.

    >>> round(sqnr_db(np.array([13.0, -7.0]), np.array([13.0, -6.0])), 1), sqnr_db(np.ones(2), np.ones(2))
    (23.0, None)
    """
    _check_shapes("sqnr_db", reference, value)
    a, b = _rows("sqnr_db", reference), _rows("sqnr_db", value)
    if np.array_equal(a, b):
        return None
    largest = max(float(np.abs(a).max()), float(np.abs(b).max()))
    if not 1e-100 < largest < 1e100:  # beyond float32: squares would vanish or overflow
        a, b = a / largest, b / largest
    least = float(np.finfo(np.float64).tiny)
    return float(10 * (np.log10(max(_squares(a - a.mean(axis=0)), least)) - np.log10(max(_squares(a - b), least))))


def agreement(a: Array, b: Array) -> float:
    """Return the share of samples for which both models' largest output is the same; the first of equal outputs counts.

    Raises:
        DataError: the outputs are not both [samples, classes] with at least two classes, or hold NaN.

    >>> agreement(np.array([[1, 2], [3, 1]]), np.array([[0, 9], [1, 2]]))
    0.5
    """
    _check_shapes("agreement", a, b)
    left, right = np.asarray(a), np.asarray(b)
    if left.ndim != 2 or left.shape[1] < 2 or not len(left):
        raise DataError(f"agreement needs outputs of shape [samples, classes], got {list(left.shape)}.")
    if np.isnan(left).any() or np.isnan(right).any():
        raise DataError("agreement needs numbers, but the outputs hold NaN.")
    return float((left.argmax(axis=1) == right.argmax(axis=1)).mean())


def spread(y: Array) -> float:
    """Return how much outputs vary over samples: the root mean square of the elements' standard deviations (axis 0).

    The parity checks divide errors by it.

    Raises:
        DataError: there is no sample, or a value is NaN or Inf.

    >>> spread(np.array([[0.0, 5.0], [2.0, 5.0]]))
    0.7071067811865476
    """
    values = _rows("spread", y)
    return float(np.sqrt(values.var(axis=0).mean()))


def is_constant(y: Array) -> bool:
    """Return whether outputs are the same for all samples: a spread below 1e-5 of the root mean square of y.

    A collapsed model still varies by rounding: MobileNetV1 with 1-bit weights by 2.5e-5, with outputs up to 27.5. A
    single sample and outputs of zeros count as constant, because there is nothing to divide by.

    >>> is_constant(np.full((4, 3), 27.5) + 1e-5 * np.eye(4, 3)), is_constant(np.eye(4, 3))
    (True, False)
    """
    return spread(y) <= CONSTANT * float(np.sqrt(_squares(_rows("is_constant", y)) / np.size(y)))


def _check_shapes(who: str, a: Array, b: Array) -> None:
    if np.shape(a) != np.shape(b):
        raise DataError(f"{who} needs two arrays of one shape, got {list(np.shape(a))} and {list(np.shape(b))}.")


def _finite(who: str, y: Array) -> Doubles:
    values = np.asarray(y, np.float64)
    bad = values.size - int(np.isfinite(values).sum())
    if bad:
        raise DataError(f"{who} needs finite values, {bad} of {values.size} are NaN or Inf.")
    return values


def _rows(who: str, y: Array) -> Doubles:
    values = _finite(who, y)
    if values.ndim == 0 or values.size == 0:
        raise DataError(f"{who} needs samples along the first axis, got shape {list(values.shape)}.")
    return values


def _squares(values: Doubles) -> float:
    return float(np.square(values).sum())
