"""The results of `analyze`, as frozen records and as JSON; docs/json.md describes the JSON."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final, final

from qcompress.analysis.moments import TensorStatistics

# The widths, in bits, for which a report gives bytes.
WIDTHS: Final = (2, 3, 4, 8)

FORMAT_VERSION: Final = 1


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReport:
    """The report on one tensor.

    Args:
        name: qualified name.
        kind: kind of the layer that uses it as its weight, according to the source.
        shape: its shape.
        dtype: numpy name of its dtype.
        nbytes: its current size in bytes.
        nbytes_at: bytes at each of WIDTHS: packed codes and one float32 table, or `nbytes` if that is not larger; 0 for
            a part of a weight that export computes.
        stays: why it is not compressed at any width; None for a weight that is compressed.
        aliases: further names of the same tensor.
        statistics: statistics of its finite values.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    nbytes_at: dict[int, int]
    stays: str | None
    aliases: tuple[str, ...]
    statistics: TensorStatistics


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over the tensors of a report.

    Args:
        tensors: number of tensors.
        weights: number of tensors that are compressed.
        count: number of elements.
        non_finite: number of NaN and infinite elements.
        nbytes: current size in bytes.
        nbytes_at: size in bytes at each of WIDTHS, uncompressed tensors included.
    """

    tensors: int
    weights: int
    count: int
    non_finite: int
    nbytes: int
    nbytes_at: dict[int, int]


def totals_of(tensors: Iterable[TensorReport]) -> Totals:
    """Return the sums over tensor reports."""
    tensors = tuple(tensors)
    return Totals(
        tensors=len(tensors),
        weights=sum(t.stays is None for t in tensors),
        count=sum(t.statistics.count for t in tensors),
        non_finite=sum(t.statistics.non_finite for t in tensors),
        nbytes=sum(t.nbytes for t in tensors),
        nbytes_at={bits: sum(t.nbytes_at[bits] for t in tensors) for bits in WIDTHS},
    )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AnalysisReport:
    """The report on a model.

    Args:
        model: the user's name for it: a path or a class.
        original_bytes: size in bytes of its file, or of its tensors.
        sha256: digest of its file, or of its tensors.
        tensors: every tensor once, in the source's order.
    """

    model: str
    original_bytes: int
    sha256: str
    tensors: tuple[TensorReport, ...]

    @property
    def totals(self) -> Totals:
        """The sums over all tensors."""
        return totals_of(self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form; docs/json.md lists its keys."""
        return {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "original_bytes": self.original_bytes,
            "sha256": self.sha256,
            "tensors": [_tensor_dict(tensor) for tensor in self.tensors],
            "totals": _with_text_keys(asdict(self.totals)),
        }


def _tensor_dict(tensor: TensorReport) -> dict[str, Any]:
    fields = asdict(tensor)
    numbers = fields.pop("statistics")
    return {**_with_text_keys(fields), **numbers, "range": tensor.statistics.range}


def _with_text_keys(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "nbytes_at": {str(bits): nbytes for bits, nbytes in fields["nbytes_at"].items()}}
