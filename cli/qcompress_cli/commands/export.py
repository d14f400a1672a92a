"""`qcompress export MODEL`: compress a model and write it as ONNX."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompress.compressed.source import CompressedSource
from qcompress.deployment import Compute, Deployment
from qcompress.errors import ConfigError
from qcompress.files import write_whole
from qcompress.plan import combinations
from qcompress.plan.plan import Plan, load_plan
from qcompress.plan.resolve import ResolvedPlan, resolve
from qcompress.plan.settings import Settings
from qcompress.sources.base import Source
from qcompress_cli.commands.compute_report import ComputeReport
from qcompress_cli.commands.export_report import Export
from qcompress_cli.inputs import options
from qcompress_cli.inputs.data import load_inputs
from qcompress_cli.inputs.export_options import ExportOptions, export_options
from qcompress_cli.inputs.open_model import open_model
from qcompress_cli.inputs.outputs import Outputs, default_file, input_files
from qcompress_cli.inputs.program import device, open_program
from qcompress_cli.inputs.project import RunOptions, run_options
from qcompress_cli.terminal.console import Ui
from qcompress_cli.terminal.exits import CHECK_FAILED
from qcompress_exporters import formats
from qcompress_exporters.options import BuildOptions

if TYPE_CHECKING:
    from qcompress.compressed.model import CompressedModel
    from qcompress.data.dataset import Dataset
    from qcompress_exporters.auto_compute import AutoCompute
    from qcompress_exporters.report import Built, ExportReport


def export_command(settings: type[Settings] = Settings) -> click.Command:
    """Return the command `export`.

    Args:
        settings: the class of the plan's settings, whose fields become options.
    """

    @options.command("export")
    @options.model_argument
    @export_options(settings.fields)
    @options.source_options
    @options.input_options
    @options.output_options
    @options.common_options
    def export(json: bool, quiet: bool, **params: Any) -> None:
        """Compress the weights of MODEL to 1 to 8 bits and write an ONNX file that is really that small.

        This needs no training and no labels. Without -o the file is named after MODEL: model.w2.onnx, or
        model.w4a8.onnx with --activation-bits 8. docs/plan.md and docs/combinations.md say which options can be
        combined.
        """
        _export(ExportOptions.of(params, settings), run_options(params), Ui(json=json, quiet=quiet))

    return export


command = export_command()


@dataclass(frozen=True, slots=True)
class _Job:
    """An export whose options are checked, before the long work.

    Args:
        resolved: the plan for this model.
        compute: what layers compute in.
        work: makes the compressed model.
        auto: what --compute auto measured; None with other compute.
    """

    resolved: ResolvedPlan
    compute: Compute
    work: "Callable[[], CompressedModel]"
    auto: "AutoCompute | None" = None


def _export(wanted: ExportOptions, given: RunOptions, ui: Ui) -> None:
    source = open_model(given, ui)
    outputs = Outputs(
        file=given.output,
        plan=wanted.save_plan,
        compressed=wanted.save_compressed,
        force=given.force,
        inputs=input_files(source, given),
    )
    if not wanted.dry_run:
        outputs.check()

    format, way = formats.choose(wanted.format)
    wanted = replace(wanted, format=way)
    target = format.target(given.target)  # a wrong one is an error before the long work

    def check_file(resolved: ResolvedPlan, compute: Compute) -> Path:
        file = given.output or default_file(source, resolved, compute, format.suffix)
        if not wanted.dry_run:
            outputs.check_file(file)
        return file

    if isinstance(source, CompressedSource):
        job = _from_folder(source, wanted, given, ui)
    else:
        job = _from_model(source, wanted, given, target, ui, check_file)
    file = check_file(job.resolved, job.compute)

    small = job.work()
    built = format.build(small, target, BuildOptions(way=way, float_leftovers=wanted.float_leftovers))
    written_as = (way or next(iter(format.ways), None)) if small.compute == "int8" else None
    done = Export(
        source=source,
        resolved=job.resolved,
        small=small,
        report=built.report,
        decoded=format.proof(built.data),
        computed=ComputeReport.of(small, built.report, job.resolved, written_as, job.auto),
    )
    if not wanted.dry_run:
        done = replace(done, report=_write(built, small, replace(outputs, file=file), ui))

    ui.emit(done.as_dict())
    ui.show(*done.tables(dry_run=wanted.dry_run, explain=wanted.explain), *done.summary(file))
    for note in done.notes():
        ui.note(note)
    if not done.from_folder and given.calibration is None and wanted.effort != "fast":
        for note in done.what_calibration_gains(click.get_current_context().find_root().obj):
            ui.note(note)
    if not done.report.shrank:
        ui.note("warning: no tensor got smaller.")
        if wanted.strict:
            click.get_current_context().exit(CHECK_FAILED)


def _from_folder(source: CompressedSource, wanted: ExportOptions, given: RunOptions, ui: Ui) -> _Job:
    """Check an export of a compressed folder."""
    from qcompress.graph.tensors import program_tensors

    small = source.model()
    wanted.check_for_compressed(source.label, small.compute)
    combinations.check_file(small.compute, wanted.format)
    resolved = resolve(small.plan, program_tensors(small.program))
    return _Job(resolved, small.compute, lambda: _snapped(small, given, ui) if wanted.offsets == "snap" else small)


def _snapped(small: "CompressedModel", given: RunOptions, ui: Ui) -> "CompressedModel":
    """Return the model without offsets that would keep layers in float."""
    from qcompress.posthoc.offsets import snap_offsets
    from qcompress_exporters import build
    from qcompress_exporters.onnx_format.file import unfolded

    data = _calibration(given, ui)
    if data is None:
        raise ConfigError("--offsets snap needs calibration data to correct the biases; add --calibration inputs.npz.")
    sites = unfolded(small, build(small).report)
    if not sites:
        ui.note("no offset was moved: each is a zero point already, or folds into a bias.")
    return snap_offsets(small, data, sites)


def _from_model(
    source: Source,
    wanted: ExportOptions,
    given: RunOptions,
    target: Deployment,
    ui: Ui,
    check_file: "Callable[[ResolvedPlan, Compute], Any]",
) -> _Job:
    """Check an export of a float model; with --compute auto, measure what its layers shall compute in."""
    wanted.check_for_float_model(calibrated=given.calibration is not None)
    wanted = wanted.settled(planned=given.plan is not None)
    plan = _plan(wanted, given)
    settings = wanted.posthoc

    from qcompress.posthoc.compress import compress_program, resolved_compute, resolved_plan
    from qcompress.posthoc.settings import check_effort
    from qcompress.progress import Execution

    program = open_program(source, given, ui)
    resolved = resolved_plan(program, plan)
    compute = resolved_compute(resolved, wanted.compute)
    execution = Execution(device=device(given), track=ui.track)
    check_effort(wanted.effort, compute)
    combinations.check_file(compute, wanted.format)
    wanted.check_compute(compute)
    calibration = cache(lambda: _calibration(given, ui))  # read once, and late
    auto = None
    if wanted.measures:
        from qcompress_exporters.auto_compute import choose

        combinations.check_calibration(compute, given.calibration is not None)
        check_file(resolved, compute)
        data = calibration()
        assert data is not None
        auto = choose(program, resolved, settings, data, target, execution)
        resolved, compute = auto.settle(resolved), auto.compute
        settings = replace(settings, compute=compute)

    def work() -> "CompressedModel":
        return compress_program(
            program,
            resolved,
            settings,
            calibration=calibration(),
            source_digest=source.sha256[:11],
            deployment=target,
            execution=execution,
        )

    return _Job(resolved, compute, work, auto)


def _plan(wanted: ExportOptions, given: RunOptions) -> Plan:
    """Return the plan; where it treats all weights alike, check it before MODEL is traced."""
    plan = load_plan(given.plan, wanted.settings) if given.plan else Plan(default=wanted.settings())
    plan = plan.with_flags(**{**wanted.plan_fields, "bits": given.bits})
    if not (plan.kind or plan.name):
        origins = {field: plan.where(("default", field)) for field in plan.default.given()}
        compute = combinations.check(plan.default, origins, compute=wanted.compute, format=wanted.format)
        combinations.check_calibration(compute, given.calibration is not None)
        wanted.check_compute(compute)
    return plan


def _calibration(given: RunOptions, ui: Ui) -> "Dataset | None":
    return None if given.calibration is None else load_inputs(given.calibration, given, ui, "--calibration")


def _write(built: "Built", small: "CompressedModel", outputs: Outputs, ui: Ui) -> "ExportReport":
    """Write all files and return the report, which then names the ONNX file."""
    assert outputs.file is not None
    report = built.write(outputs.file, force=outputs.force, inputs=outputs.inputs)
    ui.wrote(outputs.file)
    if outputs.compressed is not None:
        small.save(outputs.compressed)
        ui.wrote(outputs.compressed)
    if outputs.plan is not None:
        write_whole(outputs.plan, small.plan.to_toml().encode())
        ui.wrote(outputs.plan)
    return report
