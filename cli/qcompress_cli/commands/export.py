"""`qcompress export MODEL`: compress a model and write it as ONNX."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from qcompress.compressed.source import CompressedSource
from qcompress.errors import ConfigError, OutputError
from qcompress.files import check_writable, write_whole
from qcompress.plan import combinations
from qcompress.plan.combinations import FORMATS, MEMORIES, QDQ
from qcompress.plan.plan import Plan, ResolvedPlan, load_plan
from qcompress.posthoc.calibration import METHODS
from qcompress.sources.base import Source
from qcompress_cli.commands.compute_report import ComputeReport
from qcompress_cli.commands.export_report import (
    as_dict,
    explanation,
    gain_table,
    plan_table,
    size_table,
    what_data_buys,
    words,
)
from qcompress_cli.inputs import options
from qcompress_cli.inputs.open_model import open_model
from qcompress_cli.inputs.program import device, open_program
from qcompress_cli.inputs.project import OWN_FILE, PYPROJECT, Settings, settings
from qcompress_cli.terminal.console import Ui
from qcompress_cli.terminal.exits import CHECK_FAILED

if TYPE_CHECKING:
    from qcompress.compressed.model import CompressedModel
    from qcompress.data.dataset import Dataset
    from qcompress.deployment import Compute


def _rows_per_lut(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"must be auto or a number of output channels, at least 1, got {text!r}.")
    return int(text)


# What a compressed folder has settled already.
_NOT_FOR_COMPRESSED: Final = (
    "bits", "scheme", "rows_per_lut", "vector_dim", "lut_dtype", "block_size", "plan", "activation_bits",
    "compute", "calibration_method", "percentile", "placement", "reduce_range", "effort", "no_synthetic",
    "input_names", "output_names", "dynamic", "input_shape",
)  # fmt: skip
# What is about the grids of int8 compute.
_FOR_GRIDS: Final = ("calibration_method", "percentile", "placement")
# Options that are fields of PosthocSettings.
_SETTINGS: Final = (*_FOR_GRIDS, "reduce_range", "effort")


@options.command("export")
@options.model_argument
@click.option("--bits", type=click.IntRange(1, 8), help="Bits per code of every weight, 1 to 8.")
@click.option(
    "--rows-per-lut",
    type=options.Parsed("n", _rows_per_lut),
    metavar="N|auto",
    help="Output channels that share a palette.",
)
@click.option(
    "--scheme",
    type=click.Choice(["palette", "uniform", "auto"]),
    help="What codes of weights stand for: entries of a table (default), steps of an even grid, or, weight by weight, "
    "whichever takes fewer bytes for the same error.",
)
@click.option(
    "--vector-dim",
    type=click.Choice(["1", "2", "4", "8"]),
    help="Consecutive weights that share a code of a palette; default: 1. Bits per weight: bits / vector-dim.",
)
@click.option(
    "--lut-dtype",
    type=click.Choice(["float32", "float16", "int8"]),
    help="Type of a palette's entries; default: float32, and int8 where layers compute in int8. int8 entries are times "
    "a float32 scale.",
)
@click.option(
    "--block-size",
    type=click.IntRange(2),
    metavar="N",
    help="Consecutive inputs that share a scale of an even grid, of matrix products and embeddings; default: all.",
)
@click.option(
    "--activation-bits",
    type=click.IntRange(1, 8),
    help="Bits per code of what layers take, 1 to 8: they compute in int8. Needs --calibration.",
)
@click.option(
    "--compute",
    type=click.Choice(["float", "int8", "dynamic8"]),
    help="What layers compute in; default: int8 with --activation-bits, else float. dynamic8: matrix products in int8, "
    "their inputs quantized at run time, no calibration.",
)
@click.option(
    "--format",
    type=click.Choice(FORMATS),
    help="How int8 compute is written: quantizers around float operators, which onnxruntime fuses (default), or "
    "integer operators.",
)
@click.option(
    "--memory",
    type=click.Choice(MEMORIES),
    default=MEMORIES[0],
    show_default=True,
    help="How weights lie in memory at run time; packed comes later.",
)
@click.option(
    "--calibration-method",
    type=click.Choice(tuple(METHODS)),
    help="How the grids of activations are found; default: mse.",
)
@click.option(
    "--percentile",
    type=click.FloatRange(50, 100, min_open=True),
    help="For --calibration-method percentile; default: 99.99.",
)
@click.option(
    "--placement",
    type=click.Choice(["deploy", "paper"]),
    help="Which activations are quantized: all that onnxruntime fuses (default), or inputs of layers alone.",
)
@click.option(
    "--reduce-range",
    is_flag=True,
    help="8-bit weights keep to 7 bits, for CPUs without VNNI, where sums of products can saturate.",
)
@click.option(
    "--offsets",
    type=click.Choice(["exact", "snap"]),
    help="Of a compressed folder, where a learned offset fits into no bias: exact adds it in float, as the layer then "
    "computes (default); snap moves it onto its grid and corrects biases, by --calibration.",
)
@click.option(
    "--effort",
    type=click.Choice(["fast", "balanced", "best"]),
    help="fast: each weight to its nearest level. balanced (default): weights and biases solved layer after layer on "
    "--calibration, or on inputs synthesised from BatchNorm statistics. best: then all layers tuned together.",
)
@click.option(
    "--no-synthetic",
    is_flag=True,
    help="Without --calibration: solve nothing on synthesised inputs; each weight goes to its nearest level.",
)
@click.option("--plan", type=options.PATH, metavar="FILE", help="A plan in TOML; flags replace its [default].")
@click.option("--save-plan", type=options.PATH, metavar="FILE", help="Write the plan, as resolved, to FILE.")
@click.option("--save-compressed", type=options.PATH, metavar="DIR", help="Save the compressed model, to export again.")
@click.option("--dry-run", is_flag=True, help="Show the resolved plan and the sizes to the byte; write nothing.")
@click.option(
    "--explain",
    is_flag=True,
    help="Show how each tensor is written, and why; how each layer computes, and what each grid of activations clips.",
)
@click.option(
    "--float-leftovers",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Type on disk of what stays float.",
)
@click.option("--strict", is_flag=True, help="Exit with 1 if no tensor got smaller.")
@options.source_options
@options.input_options
@options.output_options
@options.common_options
def command(
    json: bool,
    quiet: bool,
    save_plan: Path | None,
    save_compressed: Path | None,
    dry_run: bool,
    explain: bool,
    float_leftovers: Any,
    strict: bool,
    **flags: Any,
) -> None:
    """Make the weights of MODEL 1 to 8 bits wide and write an ONNX file that is really that small.

    Needs no training and no labels. Without -o the file is named after MODEL: model.w2.onnx, or model.w4a8.onnx with
    --activation-bits 8. Which words go together: docs/combinations.md.
    """
    ui = Ui(json=json, quiet=quiet)
    given = settings(flags)
    source = open_model(given, ui)
    inputs = _input_files(source, given)
    if not dry_run:
        _check_outputs(given, save_plan, save_compressed, inputs)

    from qcompress_exporters.onnx_format.file import build
    from qcompress_exporters.onnx_format.targets import DEFAULT_TARGET, Target

    target = Target.parse(given.target or DEFAULT_TARGET).text  # refused before the long work begins

    def output_for(resolved: ResolvedPlan, compute: "Compute") -> Path:
        path = given.output or _default_output(source, resolved, compute)
        if not dry_run:
            check_writable(path, force=given.force, inputs=inputs)
        return path

    if isinstance(source, CompressedSource):
        small, resolved, output = _loaded(source, given, flags, ui, output_for)
    else:
        small, resolved, output = _compressed(source, given, flags, ui, output_for)
    format = (flags["format"] or QDQ) if small.compute == "int8" else None
    built = build(small, target=target, format=format, float_leftovers=float_leftovers)
    parity = _decodes(built.data)
    report = built.report
    computed = ComputeReport.of(small, report, resolved, format)
    if not dry_run:
        report = built.write(output, force=given.force, inputs=inputs)
        ui.wrote(output)
        if save_compressed is not None:
            small.save(save_compressed)
            ui.wrote(save_compressed)
        if save_plan is not None:
            write_whole(save_plan, small.plan.to_toml().encode())
            ui.wrote(save_plan)

    is_plan_of_model = not isinstance(source, CompressedSource)
    ui.emit(as_dict(source, report, resolved if is_plan_of_model else None, parity, computed, small))
    if dry_run and is_plan_of_model:
        ui.show(plan_table(resolved))
    if explain:
        ui.show(explanation(report), *computed.tables(), *gain_table(small))
    ui.show(size_table(report))
    ui.show(*words(report, parity, computed, small, output, dry_run))
    for note in report.notes:
        if note not in small.program.notes:
            ui.note(note)
    if is_plan_of_model and given.calibration is None and flags["effort"] != "fast":
        for note in what_data_buys(report, small, click.get_current_context().find_root().obj):
            ui.note(note)
    if not report.shrank:
        ui.note("warning: no tensor got smaller.")
        if strict:
            click.get_current_context().exit(CHECK_FAILED)


OutputFor = Callable[[ResolvedPlan, "Compute"], Path]
Compressed = tuple["CompressedModel", ResolvedPlan, Path]


def _loaded(
    source: CompressedSource, given: Settings, flags: dict[str, Any], ui: Ui, output_for: OutputFor
) -> Compressed:
    """The compressed model that MODEL is, the plan that made it, and where the file goes."""
    said = [f for f in _NOT_FOR_COMPRESSED if flags.get(f)]
    if flags["offsets"] != "snap" and flags["calibration"]:
        said.append("calibration")
    if said:
        raise ConfigError(
            f"{source.label} is compressed already: {_flag(said[0])} must be left out, or name the original model."
        )
    from qcompress.graph.program_tensors import program_tensors
    from qcompress.plan.plan import resolve

    small = source.model()
    combinations.check_file(small.compute, flags["format"], flags["memory"])
    if flags["offsets"] is not None and small.compute != "int8":
        raise ConfigError(
            f"--offsets is about the grids of activations, and compute {small.compute} stores none: leave it out."
        )
    resolved = resolve(small.plan, program_tensors(small.program))
    output = output_for(resolved, small.compute)
    return _snapped(small, given, ui) if flags["offsets"] == "snap" else small, resolved, output


def _snapped(small: "CompressedModel", given: Settings, ui: Ui) -> "CompressedModel":
    """A model without offsets that would keep layers in float."""
    from qcompress.posthoc.offsets import snap_offsets
    from qcompress_exporters.onnx_format.file import build, unfolded

    data = _calibration(given, ui)
    if data is None:
        raise ConfigError(
            "--offsets snap must have calibration data to correct the biases by: give --calibration inputs.npz."
        )
    sites = unfolded(small, build(small).report)
    if not sites:
        ui.note("no offset had to move: each is a zero point already, or folds into a bias.")
    return snap_offsets(small, data, sites)


def _compressed(source: Source, given: Settings, flags: dict[str, Any], ui: Ui, output_for: OutputFor) -> Compressed:
    """What the plan makes of MODEL, the plan as resolved, and where the file goes.

    Words that do not go together are refused, and the output is settled, before the long work begins.
    """
    if flags["offsets"] is not None:
        raise ConfigError(
            "--offsets is about learned offsets, and those that export finds are zero points: leave it out, or name a "
            "compressed folder."
        )
    plan = _plan(given, flags)

    if flags["no_synthetic"] and given.calibration is not None:
        raise ConfigError("--no-synthetic is about exports without calibration data: leave out it or --calibration.")

    from qcompress.posthoc.compress import compress_program, resolved_compute, resolved_plan
    from qcompress.posthoc.settings import PosthocSettings, check_effort
    from qcompress.progress import Execution

    program = open_program(source, given, ui)
    resolved = resolved_plan(program, plan)
    compute = resolved_compute(resolved, flags["compute"])
    check_effort(flags["effort"], compute)
    combinations.check_file(compute, flags["format"], flags["memory"])
    _check_grid_flags(flags, compute)
    output = output_for(resolved, compute)
    small = compress_program(
        program,
        plan,
        PosthocSettings(
            compute=compute,
            synthetic=not flags["no_synthetic"],
            **{field: flags[field] for field in _SETTINGS if flags[field] is not None},
        ),
        calibration=_calibration(given, ui),
        source_digest=source.sha256[:11],
        execution=Execution(device=device(given), track=ui.track),
    )
    return small, resolved, output


def _plan(given: Settings, flags: dict[str, Any]) -> Plan:
    """The plan; where it says the same of every weight, what does not go together is refused before MODEL is traced."""
    plan = load_plan(given.plan) if given.plan else Plan()
    plan = plan.with_flags(
        bits=given.bits,
        rows_per_lut=flags["rows_per_lut"],
        scheme=flags["scheme"],
        activation_bits=flags["activation_bits"],
        vector_dim=None if flags["vector_dim"] is None else int(flags["vector_dim"]),
        block_size=flags["block_size"],
        lut_dtype=flags["lut_dtype"],
    )
    if not (plan.kind or plan.name):
        default = plan.default
        compute = combinations.check(
            compute=flags["compute"],
            format=flags["format"],
            memory=flags["memory"],
            scheme=default.scheme,
            bits=default.bits,
            activation_bits=default.activation_bits,
            rows_per_lut=None if default.rows_per_lut == "auto" else default.rows_per_lut,
            vector_dim=default.vector_dim or 1,
            block_size=default.block_size,
            lut_dtype=default.lut_dtype,
            origins={field: plan.where(("default", field)) for field in default.given()},
        )
        combinations.check_calibration(compute, given.calibration is not None)
        _check_grid_flags(flags, compute)
    return plan


def _check_grid_flags(flags: dict[str, Any], compute: "Compute") -> None:
    """Flags that would change nothing are a mistake."""
    for name in _FOR_GRIDS:
        if flags[name] is not None and compute != "int8":
            raise ConfigError(
                f"{_flag(name)} is about the grids of activations, and compute {compute} stores none: leave it out, or "
                "give --activation-bits."
            )
    if flags["percentile"] is not None and flags["calibration_method"] != "percentile":
        raise ConfigError("--percentile is about --calibration-method percentile: give both, or leave it out.")
    if flags["reduce_range"] and compute == "float":
        raise ConfigError(
            "--reduce-range is about sums of integers, and compute float has none: leave it out, or give "
            "--activation-bits or --compute dynamic8."
        )


def _calibration(given: Settings, ui: Ui) -> "Dataset | None":
    from qcompress.data.dataset import load_data

    if given.calibration is None:
        return None
    data = load_data(given.calibration, transform=given.transform, what="--calibration")
    for note in data.notes:
        ui.note(note)
    return data


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _input_files(source: Source, given: Settings) -> list[Path]:
    """Files of the user's that this command reads and must never replace; those of a folder one by one."""
    named = [given.data, given.calibration, given.arch, given.transform]
    files = [Path(text.rpartition(":")[0] or text) for text in named if text] + [Path(t) for t in named if t]
    found = [p for p in (source.path, given.plan, Path(OWN_FILE), Path(PYPROJECT), *files) if p and p.exists()]
    return [inner for p in found for inner in (sorted(p.iterdir()) if p.is_dir() else [p])]


def _check_outputs(given: Settings, save_plan: Path | None, save_compressed: Path | None, inputs: list[Path]) -> None:
    """Refuse what cannot be written before the long work begins."""
    named = (("-o", given.output), ("--save-plan", save_plan))
    files = [path for _, path in named if path is not None]
    for flag, path in named:
        if path is not None:
            check_writable(path, force=given.force, inputs=inputs, flag=flag)
    if save_compressed is not None:
        if save_compressed.exists():
            raise OutputError(f"{save_compressed} exists: name another folder, or remove it first.")
        check_writable(save_compressed, flag="--save-compressed")
        files.append(save_compressed)
    if len({path.absolute() for path in files}) < len(files):
        raise ConfigError("-o, --save-plan and --save-compressed must name different files.")


def _default_output(source: Source, resolved: ResolvedPlan, compute: "Compute") -> Path:
    stem = source.path.stem if source.path is not None else "model"
    widths = {(t.bits, t.activation_bits) for t in resolved.compressed}
    if len(widths) != 1:
        return Path(f"{stem}.mixed.onnx")
    bits, activation_bits = widths.pop()
    activations = "d8" if compute == "dynamic8" else "" if activation_bits is None else f"a{activation_bits}"
    return Path(f"{stem}.w{bits}{activations}.onnx")


def _decodes(data: bytes) -> dict[str, Any] | None:
    """Whether onnxruntime loads the file and decodes every tensor to what was compressed; None without onnxruntime."""
    try:
        import onnxruntime
    except ImportError:
        return None
    import onnx

    from qcompress_exporters.parity.decode import decoded, mismatches
    from qcompress_exporters.parity.sessions import session

    session(data, "deployed")  # the whole file loads
    model = onnx.load_from_string(data)
    values = decoded(model)
    wrong = mismatches(model, values)
    if wrong:
        raise AssertionError(f"onnxruntime {onnxruntime.__version__} decodes {wrong[0]} to other values than we wrote")
    return {"onnxruntime": onnxruntime.__version__, "tensors": len(values), "ok": True}
