"""How near a compressed model's outputs are to the original's, whatever they are used for. All sums are in float64."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompress.errors import DataError

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]

CONSTANT: Final = 1e-5  # spread over root mean square, below which outputs do not vary


def sqnr_db(reference: Array, value: Array) -> float | None:
    """Signal to quantization noise in dB: 10 log10 of sum of (reference - mean)², over sum of (reference - value)².

    The mean is each element's over the samples: what an output says is how it varies from sample to sample, the squares
    of `spread`; one that is always the same says nothing, however large it is. The noise is not centred, for an output
    that is off by a constant is wrong.

    Args:
        reference: outputs of the original, samples along the first axis.
        value: the other model's, for the same samples.

    Returns:
        None where the two are equal (infinitely many dB). A reference that does not vary has no signal: below -100 dB.

    Raises:
        DataError: the shapes differ, there is no sample, or NaN or Inf.

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
    """Share of samples on which two models' largest outputs are the same one; of equal outputs the first counts.

    Raises:
        DataError: not both [samples, classes] with two classes or more, or there is NaN.

    >>> agreement(np.array([[1, 2], [3, 1]]), np.array([[0, 9], [1, 2]]))
    0.5
    """
    _check_shapes("agreement", a, b)
    left, right = np.asarray(a), np.asarray(b)
    if left.ndim != 2 or left.shape[1] < 2 or not len(left):
        raise DataError(f"agreement needs outputs of shape [samples, classes], got {list(left.shape)}.")
    if np.isnan(left).any() or np.isnan(right).any():
        raise DataError("agreement needs numbers, there is NaN in the outputs.")
    return float((left.argmax(axis=1) == right.argmax(axis=1)).mean())


def spread(y: Array) -> float:
    """How far outputs vary over the samples: each element's standard deviation along axis 0, root mean square over all.

    What parity divides errors by.

    Raises:
        DataError: there is no sample, or NaN or Inf.

    >>> spread(np.array([[0.0, 5.0], [2.0, 5.0]]))
    0.7071067811865476
    """
    values = _rows("spread", y)
    return float(np.sqrt(values.var(axis=0).mean()))


def is_constant(y: Array) -> bool:
    """Whether a model says the same whatever it is shown: a spread below 1e-5 of the root mean square of y.

    A collapsed net still varies by rounding: MobileNetV1 with 1-bit weights by 2.5e-5 where the outputs reach 27.5. A
    single sample, and outputs of zeros, count as constant: there is nothing to divide by.

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
