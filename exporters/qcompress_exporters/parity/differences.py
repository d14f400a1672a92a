"""Outputs of files, and measures of the difference between two outputs."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompress.errors import DataError
from qcompress.metrics.similarity import is_constant, spread
from qcompress_exporters.parity.sessions import Mode, run, session

Arrays = dict[str, npt.NDArray[Any]]

EXPORTER_TOLERANCE: Final = 1e-4
# Correct ways to compute an output in float32 differ by a few units in the last place of its largest value. If the
# spread is small compared with that value, this is more than the tolerance.
ROUNDING: Final = 8 * float(np.finfo(np.float32).eps)


def outputs_of(model: bytes, batches: list[Arrays], mode: Mode, *, without: Sequence[str] = ()) -> Arrays:
    """Return all outputs of a file in one session."""
    active = session(model, mode, without=without)
    return concatenated([run(active, batch) for batch in batches])


def concatenated(parts: list[Arrays]) -> Arrays:
    """Return several batches of outputs as one batch."""
    return {n: np.concatenate([np.atleast_1d(p[n]) for p in parts]) for n in parts[0]}


def check_finite(outputs: Arrays, of: str) -> None:
    """Check that outputs are finite, so that they can be compared.

    Args:
        outputs: by name.
        of: the origin of the outputs, for the message.

    Raises:
        DataError: an output holds NaN or Inf.
    """
    for name, values in outputs.items():
        bad = values.size - int(np.isfinite(values).sum())
        if bad:
            raise DataError(
                f"Output {name} of {of} must be finite to be compared, {bad} of its {values.size} values on this data "
                "are NaN or Inf."
            )


def output_error(wanted: npt.NDArray[Any], got: npt.NDArray[Any]) -> float:
    """Return the error over the spread, or over the size of a constant output; infinity if it cannot be computed."""
    if wanted.shape != got.shape or not np.isfinite(got).all():
        return float("inf")
    error = error_over_spread(wanted, got)
    return relative_error(wanted, got) if error is None else error


def output_limit(wanted: npt.NDArray[Any], tolerance: float) -> float:
    """Return the largest error over the spread that passes: a tolerance, or float32's rounding if that is more.

    >>> output_limit(np.array([[-1.0], [1.0]]), 1e-4), round(output_limit(np.array([[100.0], [100.02]]), 1e-4), 4)
    (0.0001, 0.0095)
    """
    if is_constant(wanted):
        return tolerance
    return max(tolerance, ROUNDING * float(np.abs(wanted).max()) / spread(wanted))


def error_over_spread(wanted: npt.NDArray[Any], got: npt.NDArray[Any]) -> float | None:
    """Return the largest difference over the spread; None for constant outputs or infinite differences."""
    if wanted.shape != got.shape or not (np.isfinite(wanted).all() and np.isfinite(got).all()) or is_constant(wanted):
        return None
    return float(np.abs(wanted.astype(np.float64) - got).max() / spread(wanted))


def relative_error(wanted: npt.NDArray[Any], got: npt.NDArray[Any]) -> float:
    """Return the largest difference over the root mean square of the values."""
    size = float(np.sqrt(np.mean(np.square(wanted.astype(np.float64)))))
    return float(np.abs(wanted.astype(np.float64) - got).max()) / max(size, EXPORTER_TOLERANCE)


def same_bits(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    """Return whether two arrays have the same type and the same bytes."""
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def samples_in(batches: list[Arrays]) -> int:
    """Return the number of samples in batches."""
    return sum(len(next(iter(b.values()))) for b in batches)
