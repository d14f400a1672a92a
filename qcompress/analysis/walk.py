"""Analyzes a model's tensors one after the other, so that only one of them is in memory at a time."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, Final

import ml_dtypes  # noqa: F401  (numpy learns bfloat16 and float8 by name)
import numpy as np

from qcompress.analysis.moments import statistics
from qcompress.analysis.report import WIDTHS, AnalysisReport, TensorReport
from qcompress.artifacts.size import nbytes_at
from qcompress.errors import SourceError
from qcompress.kinds import UNKNOWN, WEIGHT_KINDS
from qcompress.sources.base import Source, SourceTensor
from qcompress.sources.state_names import Shapes, is_weight_by_name, shapes_by_name, weight_computed_from

_FLOATS: Final = ("float64", "float32", "float16", "bfloat16")


def analyze(model: Any) -> AnalysisReport:
    """Return a report on a model's tensors, and on its size in bytes at each width.

    No code in a file is run, and no model is changed. The forward of a module in memory is run on symbols without
    values, to find out which of its tensors are weights.

    Args:
        model: a path, a Source, a torch module, or a state dict (of torch tensors or numpy arrays).

    Raises:
        SourceError: the model holds no tensor, or is of another type.

    >>> report = analyze({"fc.weight": np.zeros((16, 64), np.float32), "fc.bias": np.ones(16, np.float32)})
    >>> report.totals.nbytes, report.totals.nbytes_at[2]
    (4160, 336)
    """
    from qcompress.openers import load_source

    source = load_source(model)
    return report_of(source, walk(source))


def walk(source: Source) -> Iterator[TensorReport]:
    """Yield a report on each tensor of a source, in its order."""
    tensors = list(source.tensors())  # their values are read one at a time
    shapes = shapes_by_name(tensors)
    return (_report(tensor, shapes) for tensor in tensors)


def report_of(source: Source, tensors: Iterable[TensorReport]) -> AnalysisReport:
    """Return the report on a source, from the reports on its tensors.

    Raises:
        SourceError: there is no tensor.
    """
    found = tuple(tensors)
    if not found:
        raise SourceError(f"No tensor found in {source.label}: a model file holds at least one.")
    return AnalysisReport(model=source.label, original_bytes=source.original_bytes, sha256=source.sha256, tensors=found)


def _report(tensor: SourceTensor, shapes: Shapes) -> TensorReport:
    array = tensor.array
    count = math.prod(array.shape)
    # A 4-bit float takes a byte in numpy and half a byte in most files; sizes are those in numpy.
    nbytes = count * np.dtype(array.dtype).itemsize
    weight, stays = weight_computed_from(tensor.name, shapes), _stays(tensor, shapes)
    if weight is not None:
        at, stays = dict.fromkeys(WIDTHS, 0), f"export computes it into {weight}"
    else:
        at = {bits: nbytes if stays else nbytes_at(count, bits, nbytes) for bits in WIDTHS}
    if stays is None and min(at.values()) == nbytes:
        stays = "too small: codes and table would not save bytes"
    return TensorReport(
        name=tensor.name,
        kind=tensor.kind,
        shape=tuple(array.shape),
        dtype=array.dtype,
        nbytes=nbytes,
        nbytes_at=at,
        stays=stays,
        aliases=tensor.aliases,
        statistics=statistics(np.asarray(array)),
    )


def _stays(tensor: SourceTensor, shapes: Shapes) -> str | None:
    """Return why a tensor is not compressed at any width; None for a weight."""
    if tensor.array.dtype not in _FLOATS:
        return f"{tensor.array.dtype} is not compressed"
    is_weight = tensor.kind in WEIGHT_KINDS or (tensor.kind == UNKNOWN and is_weight_by_name(tensor.name, shapes))
    return None if is_weight else "not a weight"
