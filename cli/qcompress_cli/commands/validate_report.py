"""The report of `validate`: tables and sentences."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from rich.table import Table

from qcompress.artifacts.size import format_size
from qcompress_cli.terminal.console import new_table
from qcompress_cli.terminal.numbers import share, told_apart
from qcompress_cli.terminal.text import printable

if TYPE_CHECKING:
    from qcompress.metrics.result import MetricResult
    from qcompress_exporters.parity.noise import LayerNoise
    from qcompress_exporters.parity.report import ParityReport
    from qcompress_exporters.parity.timing import Timing

_SHOWN: Final = 3  # layers with the lowest SQNR, and layers with the largest fall, in the table


def check_table(report: "ParityReport") -> Table:
    """Return the verdict of each check."""
    table = new_table("check", ["session", "error", "limit", "verdict"], left=["session", "verdict"])
    for check in report.checks:
        verdict, style = ("ok", None) if check.ok else ("FAIL", "bold red")
        error, limit = told_apart(math.nan if check.error is None else check.error, check.limit)
        table.add_row(check.name, check.session, "-" if check.error is None else error, limit, verdict, style=style)
    return table


def layer_table(layers: "Sequence[LayerNoise]") -> Table:
    """Return where accuracy was lost: the layers with the lowest SQNR, and those where it fell most."""
    table = new_table("layer, the noisiest", ["SQNR dB", "change"])
    sqnr = [layer.sqnr_db for layer in layers]
    change = [None if a is None or b is None else b - a for a, b in pairwise([None, *sqnr])]
    lowest = sorted(range(len(layers)), key=lambda i: _or(sqnr[i], math.inf))[:_SHOWN]
    fell = sorted(range(len(layers)), key=lambda i: _or(change[i], 0.0))[:_SHOWN]
    for i in sorted({*lowest, *fell}) if len(layers) > 2 * _SHOWN else range(len(layers)):
        noise, by = sqnr[i], change[i]
        table.add_row(
            printable(layers[i].layer),
            "no noise" if noise is None else f"{noise:.1f}",
            "" if by is None else f"{by:+.1f}",
        )
    return table


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def lines(report: "ParityReport", compute: str) -> list[str]:
    """Return what was measured, in sentences.

    Args:
        report: the measurements.
        compute: what the layers of the file compute in.
    """
    told = {(check.name, check.detail) for check in report.checks}
    alike = {name for name, _ in told if [n for n, _ in told].count(name) == 1}
    found = list(
        dict.fromkeys(
            f"{check.name}{'' if check.name in alike else f' ({check.session})'}: {check.detail}"
            for check in report.checks
        )
    )
    for name, output in report.outputs.items():
        none = "constant, so it has no SQNR" if output.constant else "no noise at all"
        noise = none if output.sqnr_db is None else f"SQNR {output.sqnr_db:.1f} dB"
        agrees = "" if output.agreement is None else f", top-1 agreement {output.agreement:.2%}"
        found.append(f"output {name!r}: {noise}{agrees} against the original, {report.data['samples']:,} samples")
    if report.metric is not None:
        found.append(_metric(report.metric))
    found += _runtime(report.runtime)
    same = "the same operators as the float file's" if report.same_ops else "other operators than the float file's"
    found.append(f"onnxruntime's optimised graph holds {same}")
    if report.timing is not None:
        found += _timing(report.timing)
    if report.activation_bits:
        from qcompress.graph.widths import widths_text

        found.append(widths_text(report.activation_bits))
    if compute != "float":
        found.append(_cpu(report.cpu))
    return found + [f"note: {note}" for note in report.notes]


def _runtime(shares: Mapping[str, float]) -> list[str]:
    """Return how much of the noise onnxruntime makes by itself; nothing where it makes no noise."""
    own = shares.get("onnxruntime", 0.0)
    if own <= 0:
        return []
    by_name = "".join(f", {share(v)} % by {k}" for k, v in shares.items() if k != "onnxruntime" and v > 0)
    return [f"onnxruntime's own approximations make {share(own)} % of the noise at the outputs{by_name}"]


def _timing(timing: "Timing") -> list[str]:
    latency, ours, theirs = timing.latency, timing.ours, timing.original
    low, high = latency.spread
    judged = {"faster": "", "slower": "", "no difference": ": no difference beyond noise"}[latency.verdict]
    lines = [
        f"speed: {latency.ratio:.2f} x the float file's ({latency.ours_ms:.3g} ms against {latency.original_ms:.3g}, "
        f"one thread; the float file against itself {latency.control:.2f}, {low:.2f} to {high:.2f}){judged}",
        f"loading: {1e3 * ours.wall_s:.3g} ms, the float file {1e3 * theirs.wall_s:.3g} ms",
    ]
    if ours.resident_bytes is not None and theirs.resident_bytes is not None:
        lines.append(f"memory: {format_size(ours.resident_bytes)}, the float file {format_size(theirs.resident_bytes)}")
    return lines


def _cpu(features: Mapping[str, bool | None]) -> str:
    vnni = features["vnni"]
    if vnni is None:
        return "CPU: unknown whether it has VNNI, without which sums of u8 x s8 can saturate"
    if vnni:
        return "CPU: has VNNI; on CPUs without, sums of u8 x s8 can saturate (export --reduce-range avoids that)"
    return "CPU: no VNNI, so sums of u8 x s8 can saturate; export --reduce-range avoids that"


def _metric(result: "MetricResult") -> str:
    from qcompress.metrics.metric import unit_of

    text = "{:.2%}" if unit_of(result.name) == "fraction" else "{:.4g}"
    interval = ""
    if result.interval is not None:
        low, high = (text.format(end) for end in result.interval)
        interval = f" (95 % interval {low} to {high})"
    before, after, drop = (text.format(v) for v in (result.original, result.compressed, result.drop))
    return f"{result.name}: {before} -> {after}, a drop of {drop}{interval} on the same {result.samples:,} samples"
