"""`qcompress validate MODEL FILE`: is the compressed file still right?"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from rich.table import Table

from qcompress.artifacts.size import format_size
from qcompress.errors import ConfigError, SourceError
from qcompress.files import check_writable, write_whole
from qcompress_cli.inputs import options
from qcompress_cli.inputs.open_model import open_model
from qcompress_cli.inputs.program import device, open_program
from qcompress_cli.inputs.project import run_options
from qcompress_cli.terminal.console import Ui, new_table
from qcompress_cli.terminal.exits import CHECK_FAILED
from qcompress_cli.terminal.numbers import share, told_apart
from qcompress_cli.terminal.text import printable

if TYPE_CHECKING:
    from qcompress.metrics.result import MetricResult
    from qcompress_exporters.parity.noise import LayerNoise
    from qcompress_exporters.parity.report import ParityReport
    from qcompress_exporters.parity.timing import Timing


_TIMING_S: Final = 1.0
_SHOWN: Final = 3  # layers with the lowest SQNR, and layers with the largest fall, in the table


@options.command("validate")
@options.model_argument
@click.argument("file", required=False, type=options.PATH)
@click.option("--write", is_flag=True, help="Also write the measurements into the metadata of FILE.")
@click.option("--no-timing", is_flag=True, help="Skip speed, load time and memory, which take a few seconds.")
@options.source_options
@options.input_options
@options.metric_options
@options.common_options
def command(json: bool, quiet: bool, seed: int, file: Path | None, write: bool, no_timing: bool, **params: Any) -> None:
    """Compare FILE, which export wrote, with its original MODEL: weights and graph bit for bit, the exporter within
    1e-4, signal to noise layer by layer, agreement, the metric where the data has labels, speed, load time and memory.

    The measurements go to FILE.validation.json, where gate finds them. Where the config names MODEL, pass FILE only.
    """
    from qcompress.compressed.source import CompressedSource
    from qcompress.data.dataset import load_data
    from qcompress.metrics.metric import load_metric
    from qcompress_exporters import formats, validate
    from qcompress_exporters.onnx_format.metadata import validation_path

    ui = Ui(json=json, quiet=quiet)
    if file is None:  # one argument: the config names MODEL
        file, params["model"] = params["model"], None
    given = run_options(params)
    if file is None:
        raise ConfigError("validate needs the FILE to measure; type qcompress validate MODEL FILE --data X.npz")
    if given.data is None:
        raise ConfigError("validate needs inputs to measure on; add --data X.npz (x, and y where there are labels).")
    _, compressed = formats.read(file)
    data = load_data(given.data, transform=given.transform)
    for note in data.notes:
        ui.note(note)
    metric = None
    if data.labels is not None:
        metric = load_metric(given.metric or "top1", lower_is_better=given.lower_is_better)
    elif given.metric is not None:
        raise ConfigError(f"--metric {given.metric} needs labels, but {given.data} has no array y.")
    result_path = validation_path(file)
    check_writable(result_path, force=True, flag=None)
    source = open_model(given, ui)
    if source.path is not None and source.path.exists() and source.path.samefile(file):
        raise SourceError(f"{file} is MODEL itself; pass the original model first, then the file that export wrote.")
    try:
        program = open_program(source, given, ui, compressed.options)
    except ConfigError:
        if given.input_names or given.output_names or given.dynamic:
            raise
        program = open_program(source, given, ui)  # the file's names are wrong then, and validate says which
    made_from = source.model().source_digest if isinstance(source, CompressedSource) else source.sha256[:11]
    report = validate(
        program, file, data, metric=metric, source_digest=made_from, seed=seed, device=device(given),
        timing=0.0 if no_timing else _TIMING_S, track=ui.track,
    )  # fmt: skip

    document = report.as_dict()
    where = str(result_path)
    if write:
        data_with, document = compressed.with_validation(document)
        write_whole(file, data_with)
        ui.wrote(file)
        where += f" and into {file}: {len(data_with) - compressed.nbytes:+,} B, it now takes {len(data_with):,} B"
    write_whole(result_path, (_dumps(document) + "\n").encode())
    ui.wrote(result_path)
    ui.emit(document)
    ui.show(_check_table(report))
    if report.layers:
        ui.show(_layer_table(report.layers))
    ui.show(*_lines(report, compressed.compute))
    ui.note(f"measurements written to {where}")
    if not report.ok:
        failed = ", ".join(f"{c.name} ({c.session})" for c in report.checks if not c.ok)
        ui.note(f"FAILED: {failed}")
        click.get_current_context().exit(CHECK_FAILED)


def _dumps(document: dict[str, Any], indent: int | None = 2) -> str:
    import json

    return json.dumps(document, indent=indent, allow_nan=False)


def _check_table(report: "ParityReport") -> Table:
    table = new_table("check", ["session", "error", "limit", "verdict"], left=["session", "verdict"])
    for check in report.checks:
        verdict, style = ("ok", None) if check.ok else ("FAIL", "bold red")
        error, limit = told_apart(math.nan if check.error is None else check.error, check.limit)
        table.add_row(check.name, check.session, "-" if check.error is None else error, limit, verdict, style=style)
    return table


def _layer_table(layers: "Sequence[LayerNoise]") -> Table:
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


def _lines(report: "ParityReport", compute: str) -> list[str]:
    told = {(check.name, check.detail) for check in report.checks}
    alike = {name for name, _ in told if [n for n, _ in told].count(name) == 1}
    lines = list(
        dict.fromkeys(
            f"{check.name}{'' if check.name in alike else f' ({check.session})'}: {check.detail}"
            for check in report.checks
        )
    )
    for name, output in report.outputs.items():
        noise = "no noise at all" if output.sqnr_db is None else f"SQNR {output.sqnr_db:.1f} dB"
        agrees = "" if output.agreement is None else f", top-1 agreement {output.agreement:.2%}"
        lines.append(f"output {name!r}: {noise}{agrees} against the original, {report.data['samples']:,} samples")
    if report.metric is not None:
        lines.append(_metric(report.metric))
    lines += _runtime(report.runtime)
    same = "the same operators as the float file's" if report.same_ops else "other operators than the float file's"
    lines.append(f"onnxruntime's optimised graph holds {same}")
    if report.timing is not None:
        lines += _timing(report.timing)
    if compute != "float":
        lines.append(_cpu(report.cpu))
    return lines + [f"note: {note}" for note in report.notes]


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
