"""`qcompress validate MODEL FILE`: is the compressed file still right?"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from qcompress.errors import ConfigError, SourceError
from qcompress.files import check_writable, write_whole
from qcompress.sources.base import Source
from qcompress_cli.commands import validate_report
from qcompress_cli.inputs import options
from qcompress_cli.inputs.data import load_inputs
from qcompress_cli.inputs.open_model import open_model
from qcompress_cli.inputs.program import device, open_program
from qcompress_cli.inputs.project import RunOptions, load_project, read_gate, run_options
from qcompress_cli.terminal.console import Ui, json_text
from qcompress_cli.terminal.exits import CHECK_FAILED

if TYPE_CHECKING:
    from qcompress.data.dataset import Dataset
    from qcompress.graph.program import FloatProgram
    from qcompress.metrics.metric import Metric
    from qcompress_exporters.formats import DeployedFile

_TIMING_S: Final = 1.0


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
    data = load_inputs(given.data, given, ui, "--data")
    metric = _metric(given, data)
    result_path, largest = validation_path(file), _largest() if write else None
    check_writable(result_path, force=True, flag=None)
    source = open_model(given, ui)
    if source.path is not None and source.path.exists() and source.path.samefile(file):
        raise SourceError(f"{file} is MODEL itself; pass the original model first, then the file that export wrote.")
    report = validate(
        _program(source, compressed, given, ui),
        file,
        data,
        metric=metric,
        source_digest=_digest(source),
        seed=seed,
        device=device(given),
        timing=0.0 if no_timing else _TIMING_S,
        track=ui.track,
    )

    document = report.as_dict()
    where = str(result_path)
    if write:
        data_with, document = compressed.with_validation(document)
        write_whole(file, data_with)
        ui.wrote(file)
        where += f" and into {file}"
        added = f"{len(data_with) - compressed.nbytes:+,} B of measurements"
        ui.warn(f"{file}: {added}, it now takes {len(data_with):,} B{_against(largest, len(data_with))}")
    write_whole(result_path, (json_text(document) + "\n").encode())
    ui.wrote(result_path)
    ui.emit(document)
    ui.show(validate_report.check_table(report))
    if report.layers:
        ui.show(validate_report.layer_table(report.layers))
    ui.show(*validate_report.lines(report, compressed.compute))
    ui.note(f"measurements written to {where}")
    if not report.ok:
        failed = ", ".join(f"{c.name} ({c.session})" for c in report.checks if not c.ok)
        ui.note(f"FAILED: {failed}")
        click.get_current_context().exit(CHECK_FAILED)


def _largest() -> tuple[int, str] | None:
    """Return max_size of the project's gate, and where it stands; None without a limit."""
    project, where = load_project()
    limits, _ = read_gate(project, where)
    return None if limits.max_size is None else (limits.max_size, where)


def _against(largest: tuple[int, str] | None, nbytes: int) -> str:
    """Return what the size of a file breaks, for a message; empty if it breaks nothing."""
    if largest is None or nbytes <= largest[0]:
        return ""
    limit, where = largest
    return f": more than max_size of the gate in {where} allows ({limit:,} B), so that the gate will fail"


def _metric(given: RunOptions, data: "Dataset") -> "Metric | None":
    """Return the metric to measure; None where the data has no labels."""
    from qcompress.metrics.metric import load_metric

    if data.labels is not None:
        return load_metric(given.metric or "top1", lower_is_better=given.lower_is_better)
    if given.metric is not None:
        raise ConfigError(f"--metric {given.metric} needs labels, but {given.data} has no array y.")
    return None


def _program(source: Source, file: "DeployedFile", given: RunOptions, ui: Ui) -> "FloatProgram":
    """Return the program of MODEL with the names and dynamic axes of the file."""
    try:
        return open_program(source, given, ui, file.options)
    except ConfigError:
        if given.input_names or given.output_names or given.dynamic or given.fixed_batch:
            raise
        return open_program(source, given, ui)  # the file's names are wrong then, and `validate` says which


def _digest(source: Source) -> str:
    """Return the digest by which a file knows its source; a compressed folder passes on that of the original."""
    from qcompress.compressed.source import CompressedSource

    return source.model().source_digest if isinstance(source, CompressedSource) else source.sha256[:11]
