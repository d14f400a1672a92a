"""What `export` tells: tables, words and JSON."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.table import Table

from qcompress.artifacts.size import format_size
from qcompress.plan.plan import ResolvedPlan, Settings
from qcompress.sources.base import WEIGHT_KINDS, Source
from qcompress_cli.commands.compute_report import ComputeReport
from qcompress_cli.terminal.console import new_table
from qcompress_cli.terminal.numbers import counted, shape_text
from qcompress_cli.terminal.text import printable

if TYPE_CHECKING:
    from qcompress.compressed.model import CompressedModel
    from qcompress_exporters.report import ExportReport

# What calibration data buys at 2 bits, measured on ResNet-20 (float: 86.3 %), by whether inputs were synthesised.
_BOUGHT: Final = {True: "85.1 % against 84.1 % on synthesised inputs", False: "85.1 % against 21.3 % without any"}
_WIDE: Final = 5  # bits at which it buys next to nothing


def size_table(report: "ExportReport") -> Table:
    """Bytes of the original, of what compression made, and of the file."""
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
    """How a file's size compares with its original's.

    >>> _times(3.5), _times(0.8)
    ('3.50x smaller', '1.25x larger')
    """
    return f"{ratio:.2f}x smaller" if ratio >= 1 else f"{1 / ratio:.2f}x larger"


def gain_table(small: "CompressedModel") -> list[Table]:
    """What solving gained, layer by layer; nothing where none was solved."""
    if not small.gains:
        return []
    table = new_table("layer, SQNR dB at its output", ["nearest", "solved"])
    for gain in small.gains:
        table.add_row(printable(gain.weight), _db(gain.nearest_db), _db(gain.solved_db))
    return [table]


def _db(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f}"


def words(
    report: "ExportReport",
    parity: dict[str, Any] | None,
    computed: ComputeReport,
    small: "CompressedModel",
    output: Path,
    dry_run: bool,
) -> list[str]:
    """What was done, where it went, and whether it was proven."""
    weights = [t for t in report.tensors if t.artifact != "float"]
    widths = Counter(t.bits for t in weights)
    by_width = ", ".join(f"{n} at {bits} bits" for bits, n in sorted(widths.items()))
    lines = [f"{counted(len(weights), 'weight')} compressed" + (f" ({by_width})." if by_width else ".")]
    reasons: dict[str, list[Any]] = {}
    for tensor in report.left_in_float:
        is_bias = tensor.encoding == "int32"
        reasons.setdefault("biases as int32" if is_bias else f"left in float, {tensor.why}", []).append(tensor)
    for reason, tensors in reasons.items():
        names = ", ".join(printable(t.name) for t in tensors[:3]) + (" …" if len(tensors) > 3 else "")
        nbytes = sum(t.nbytes for t in tensors)
        lines.append(f"{reason}: {counted(len(tensors), 'tensor')}, {format_size(nbytes)} ({names})")
    noisy = [gain for gain in small.gains if gain.solved_db is not None]
    if noisy:
        worst = min(noisy, key=lambda gain: gain.solved_db or 0.0)
        lines.append(
            f"{counted(len(small.gains), 'layer')} solved on {printable(small.solved_on)}; the noisiest, "
            f"{printable(worst.weight)}, from {_db(worst.nearest_db)} to {_db(worst.solved_db)} dB SQNR at its output"
        )
    lines += computed.words()
    if parity is not None:
        decoded = counted(parity["tensors"], "tensor")
        lines.append(f"parity: onnxruntime {parity['onnxruntime']} decodes {decoded} bit for bit")
    where = f"nothing written (--dry-run); the file would be {output}" if dry_run else f"written: {output}"
    opset = "" if report.opset is None else f"opset {report.opset}, "
    lines.append(f"{where} ({opset}runs on {report.runs_on})")
    return lines


def what_data_buys(report: "ExportReport", small: "CompressedModel", arguments: Sequence[str]) -> list[str]:
    """What calibration data would do for a model compressed without, and the command; nothing at wide codes.

    Args:
        report: what was written.
        small: the compressed model.
        arguments: of the command line that made it.
    """
    widths = [t.bits for t in report.tensors if t.artifact != "float"]
    if not widths or min(widths) >= _WIDE:
        return []
    command = ["qcompress", *(word for word in arguments if word != "--no-synthetic"), "--calibration", "inputs.npz"]
    if report.path is not None and "--force" not in arguments:
        command.append("--force")
    return [
        f"unlabelled real inputs buy most at 2 bits (ResNet-20: {_BOUGHT[bool(small.solved_on)]}): "
        f"{shlex.join(command)}"
    ]


def explanation(report: "ExportReport") -> Table:
    """How each tensor is written, and why."""
    table = new_table("tensor", ["shape", "bits", "encoding", "bytes", "why"], left=["encoding", "why"])
    for t in report.tensors:
        table.add_row(printable(t.name), shape_text(t.shape), str(t.bits), t.encoding, f"{t.nbytes:,}", t.why)
    return table


def plan_table(resolved: ResolvedPlan) -> Table:
    """What is planned for each weight, and what said so."""
    said = {"bits", "scheme", "rows_per_lut"}.union(*(t.origins for t in resolved.compressed)) - {"skip"}
    columns = [field.name for field in fields(Settings) if field.name in said]
    table = new_table("tensor", ["kind", *columns, "set by"], left=["kind", "scheme", "set by"])
    for t in resolved.tensors:
        if t.kind not in WEIGHT_KINDS:
            continue
        if t.settings is None:
            table.add_row(printable(t.name), t.kind, "float", *[""] * (len(columns) - 1), t.reason or "")
        else:
            given = t.settings.given()
            origins = ", ".join(f"{f}: {where}" for f, where in t.origins.items() if f in columns)
            table.add_row(printable(t.name), t.kind, *(str(given.get(f, "–")) for f in columns), origins)
    return table


def as_dict(
    source: Source,
    report: "ExportReport",
    resolved: ResolvedPlan | None,
    parity: dict[str, Any] | None,
    computed: ComputeReport,
    small: "CompressedModel",
) -> dict[str, Any]:
    """The same for --json; docs/json.md says what each entry is."""
    size = report.size
    return {
        "format_version": 1,
        "model": source.label,
        "file": None if report.path is None else str(report.path),
        "target": report.target,
        "opset": report.opset,
        "bytes": {
            "original": size.original,
            "ideal": size.ideal,
            "payload": size.payload,
            "file": size.file,
        },
        "ratio": size.ratio,
        "bits_per_weight": size.bits_per_weight,
        "parity": parity,
        **computed.as_dict(),
        "tensors": [asdict(t) for t in report.tensors],
        "solved_on": small.solved_on or None,
        "solved": [asdict(gain) for gain in small.gains],
        "plan": None
        if resolved is None
        else [
            {
                "name": t.name,
                "kind": t.kind,
                "settings": None if t.settings is None else t.settings.given(),
                "reason": t.reason,
                "set_by": dict(t.origins),
            }
            for t in resolved.tensors
        ],
        "notes": list(report.notes),
    }
