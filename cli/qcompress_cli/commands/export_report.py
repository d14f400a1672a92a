"""The report of `export`: tables, sentences and JSON."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from rich.console import RenderableType
from rich.table import Table

from qcompress.artifacts.size import format_size
from qcompress.compressed.source import CompressedSource
from qcompress.kinds import WEIGHT_KINDS
from qcompress.plan.resolve import ResolvedPlan
from qcompress.plan.settings import Settings
from qcompress.sources.base import Source
from qcompress_cli.commands.compute_report import ComputeReport
from qcompress_cli.terminal.console import new_table
from qcompress_cli.terminal.numbers import counted, shape_text
from qcompress_cli.terminal.text import printable

if TYPE_CHECKING:
    from qcompress.compressed.model import CompressedModel
    from qcompress_exporters.report import ExportReport, TensorReport

# What calibration data gains at 2 bits, measured on ResNet-20 (float: 86.3 %), by whether inputs were synthesised.
_GAINED: Final = {True: "85.1 % against 84.1 % on synthesised inputs", False: "85.1 % against 21.3 % without any"}
_WIDE: Final = 5  # bits at which it gains next to nothing
_LARGE: Final = 0.01  # share of the file from which a tensor that stays float is named
_MUCH: Final = 0.1  # share of the file from which the verdict says how much stays float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A finished export.

    Args:
        source: the opened MODEL.
        resolved: the plan for this model.
        small: the compressed model.
        report: what was written.
        decoded: what onnxruntime decodes from the file; None without onnxruntime.
        computed: how the layers compute.
    """

    source: Source
    resolved: ResolvedPlan
    small: "CompressedModel"
    report: "ExportReport"
    decoded: dict[str, Any] | None
    computed: ComputeReport

    @property
    def from_folder(self) -> bool:
        """Whether MODEL was compressed already, and its plan is not this command's."""
        return isinstance(self.source, CompressedSource)

    def tables(self, *, dry_run: bool, explain: bool) -> list[RenderableType]:
        """Return the tables to show: the plan of a dry run, details where they are wanted, sizes."""
        plan = [plan_table(self.resolved)] if dry_run and not self.from_folder else []
        details = [explanation(self.report), *self.computed.tables(), *gain_table(self.small)] if explain else []
        return [*plan, *details, size_table(self.report)]

    def summary(self, file: Path) -> list[str]:
        """Return what was done, where it went and whether it was proven, a line each.

        Args:
            file: where the file went, or would have gone.
        """
        report = self.report
        lines = [_widths(report), *_solved(self.small), *self.computed.lines()]
        if self.decoded is not None:
            tensors = counted(self.decoded["tensors"], "tensor")
            lines.append(f"parity: onnxruntime {self.decoded['onnxruntime']} decodes {tensors} bit for bit")
        where = f"nothing written (--dry-run); the file would be {file}" if report.path is None else f"written: {file}"
        opset = "" if report.opset is None else f"opset {report.opset}, "
        return [*lines, *_left_in_float(report), f"{where} ({opset}runs on {report.runs_on}){_float_share(report)}"]

    def notes(self) -> list[str]:
        """Return the notes of the export; those of tracing were shown already."""
        return [note for note in self.report.notes if note not in self.small.program.notes]

    def what_calibration_gains(self, arguments: Sequence[str]) -> list[str]:
        """Return what calibration data would gain, with the command to type; nothing where codes are wide.

        Args:
            arguments: the command line that made this export.
        """
        widths = [t.bits for t in self.report.tensors if t.artifact != "float"]
        if not widths or min(widths) >= _WIDE:
            return []
        kept = (argument for argument in arguments if argument != "--no-synthetic")
        command = ["qcompress", *kept, "--calibration", "inputs.npz"]
        if self.report.path is not None and "--force" not in arguments:
            command.append("--force")
        return [
            f"unlabelled real inputs gain most at 2 bits (ResNet-20: {_GAINED[bool(self.small.solved_on)]}): "
            f"{shlex.join(command)}"
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return the document of --json; docs/json.md lists its keys."""
        report, size = self.report, self.report.size
        return {
            "format_version": 1,
            "model": self.source.label,
            "file": None if report.path is None else str(report.path),
            "target": report.target,
            "opset": report.opset,
            "bytes": {"original": size.original, "ideal": size.ideal, "payload": size.payload, "file": size.file},
            "ratio": size.ratio,
            "bits_per_weight": size.bits_per_weight,
            "parity": self.decoded,
            **self.computed.as_dict(),
            "tensors": [asdict(t) for t in report.tensors],
            "solved_on": self.small.solved_on or None,
            "solved": [asdict(gain) for gain in self.small.gains],
            "plan": None if self.from_folder else _plan_entries(self.resolved),
            "notes": list(report.notes),
        }


def size_table(report: "ExportReport") -> Table:
    """Return the bytes of the original, of its compressed parts, and of the file."""
    size = report.size
    table = new_table("", ["bytes", "", ""], left=["", ""])
    rows = (
        ("original", size.original, "float ONNX file of the same graph, stripped"),
        ("ideal", size.ideal, "packed codes, tables and float leftovers"),
        ("payload", size.payload, "all initializers of the file"),
        ("file", size.file, f"{_times(size.ratio)}, {size.bits_per_weight:.2f} bits per weight"),
    )
    for name, nbytes, what in rows:
        table.add_row(name, f"{nbytes:,}", format_size(nbytes), what, style="bold" if name == "file" else None)
    return table


def _times(ratio: float) -> str:
    """Return how the size of a file compares with its original's.

    >>> _times(3.5), _times(0.8)
    ('3.50x smaller', '1.25x larger')
    """
    return f"{ratio:.2f}x smaller" if ratio >= 1 else f"{1 / ratio:.2f}x larger"


def gain_table(small: "CompressedModel") -> list[Table]:
    """Return what solving gained, layer by layer; nothing where no layer was solved."""
    if not small.gains:
        return []
    table = new_table("layer, SQNR dB at its output", ["nearest", "solved"])
    for gain in small.gains:
        table.add_row(printable(gain.weight), _db(gain.nearest_db), _db(gain.solved_db))
    return [table]


def _db(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f}"


def explanation(report: "ExportReport") -> Table:
    """Return how each tensor is written, and why."""
    table = new_table("tensor", ["shape", "bits", "encoding", "bytes", "why"], left=["encoding", "why"])
    for t in report.tensors:
        table.add_row(printable(t.name), shape_text(t.shape), str(t.bits), t.encoding, f"{t.nbytes:,}", t.why)
    return table


def plan_table(resolved: ResolvedPlan) -> Table:
    """Return the settings of each weight, and where they were set."""
    rows = next((t.settings.fields for t in resolved.tensors if t.settings is not None), Settings.fields)
    used = {"bits", "scheme", "rows_per_lut"}.union(*(t.origins for t in resolved.compressed)) - {"skip"}
    columns = [field.name for field in rows if field.name in used]
    table = new_table("tensor", ["kind", *columns, "set by"], left=["kind", "scheme", "set by"])
    for t in resolved.tensors:
        if t.kind not in WEIGHT_KINDS:
            continue
        if t.settings is None:
            stored = "float16" if t.float16 else "float"
            table.add_row(printable(t.name), t.kind, stored, *[""] * (len(columns) - 1), t.reason or "")
        else:
            given = t.settings.given()
            origins = ", ".join(f"{f}: {where}" for f, where in t.origins.items() if f in columns)
            table.add_row(printable(t.name), t.kind, *(str(given.get(f, "–")) for f in columns), origins)
    return table


def _widths(report: "ExportReport") -> str:
    weights = [t for t in report.tensors if t.artifact != "float"]
    widths = Counter(t.bits for t in weights)
    by_width = ", ".join(f"{n} at {bits} bits" for bits, n in sorted(widths.items()))
    return f"{counted(len(weights), 'weight')} compressed" + (f" ({by_width})." if by_width else ".")


def _left_in_float(report: "ExportReport") -> list[str]:
    """Return what stays float, by reason: the largest last, every tensor of more than 1 % of the file by name."""
    reasons: dict[str, list[TensorReport]] = {}
    for tensor in sorted(report.left_in_float, key=lambda tensor: -tensor.nbytes):
        is_bias = tensor.encoding == "int32"
        reasons.setdefault("biases as int32" if is_bias else f"left in float, {tensor.why}", []).append(tensor)
    lines = []
    for reason, tensors in sorted(reasons.items(), key=lambda item: sum(t.nbytes for t in item[1])):
        large = sum(t.nbytes > _LARGE * report.size.file for t in tensors)
        named = _named(tensors, max(3, large))
        nbytes = sum(t.nbytes for t in tensors)
        lines.append(f"{reason}: {counted(len(tensors), 'tensor')}, {format_size(nbytes)} ({named})")
    return lines


def _float_share(report: "ExportReport") -> str:
    """Return what the verdict says where much of the file stays float; else nothing."""
    floats = sorted((t for t in report.left_in_float if t.encoding != "int32"), key=lambda tensor: -tensor.nbytes)
    share = sum(t.nbytes for t in floats) / report.size.file
    return f"; {100 * share:.0f} % of its bytes stay float: {_named(floats, 3)}" if share > _MUCH else ""


def _named(tensors: "Sequence[TensorReport]", count: int) -> str:
    return ", ".join(printable(t.name) for t in tensors[:count]) + (" …" if len(tensors) > count else "")


def _solved(small: "CompressedModel") -> list[str]:
    noisy = [gain for gain in small.gains if gain.solved_db is not None]
    if not noisy:
        return []
    worst = min(noisy, key=lambda gain: gain.solved_db or 0.0)
    return [
        f"{counted(len(small.gains), 'layer')} solved on {printable(small.solved_on)}; the noisiest, "
        f"{printable(worst.weight)}, from {_db(worst.nearest_db)} to {_db(worst.solved_db)} dB SQNR at its output"
    ]


def _plan_entries(resolved: ResolvedPlan) -> list[dict[str, Any]]:
    return [
        {
            "name": t.name,
            "kind": t.kind,
            "settings": None if t.settings is None else t.settings.given(),
            "reason": t.reason,
            "set_by": dict(t.origins),
        }
        for t in resolved.tensors
    ]
