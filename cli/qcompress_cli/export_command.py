"""`qcompress export MODEL`: compress a model and write it as ONNX."""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from rich.table import Table

from qcompress.artifacts import PalettizedWeight
from qcompress.errors import ConfigError, OutputError
from qcompress.files import check_writable, write_whole
from qcompress.plan import Plan, ResolvedPlan, load_plan
from qcompress.size import format_size
from qcompress.sources.base import WEIGHT_KINDS, Source
from qcompress_cli import options
from qcompress_cli.console import Ui, new_table
from qcompress_cli.exits import CHECK_FAILED
from qcompress_cli.numbers import counted, shape_text
from qcompress_cli.open_model import open_model
from qcompress_cli.program import open_program
from qcompress_cli.project import OWN_FILE, PYPROJECT, Settings, settings
from qcompress_cli.text import printable

if TYPE_CHECKING:
    from qcompress.compressed import CompressedModel
    from qcompress_exporters.onnx_file import ExportReport


def _rows_per_lut(text: str) -> int | str:
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"must be auto or a number of output channels, at least 1, got {text!r}.")
    return int(text)


_NOT_FOR_COMPRESSED: Final = ("bits", "rows_per_lut", "plan", "input_names", "output_names", "dynamic", "input_shape")


@options.command("export")
@options.model_argument
@click.option("--bits", type=click.IntRange(1, 8), help="Bits per code of every weight, 1 to 8.")
@click.option(
    "--rows-per-lut",
    type=options.Parsed("n", _rows_per_lut),
    metavar="N|auto",
    help="Output channels that share a palette.",
)
@click.option("--plan", type=options.PATH, metavar="FILE", help="A plan in TOML; flags replace its [default].")
@click.option("--save-plan", type=options.PATH, metavar="FILE", help="Write the plan, as resolved, to FILE.")
@click.option("--save-compressed", type=options.PATH, metavar="DIR", help="Save the compressed model, to export again.")
@click.option("--dry-run", is_flag=True, help="Show the resolved plan and the sizes to the byte; write nothing.")
@click.option("--explain", is_flag=True, help="Show how each tensor is written, and why.")
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

    Needs no training and no labels. Without -o the file is named after MODEL: model.w2.onnx.
    """
    ui = Ui(json=json, quiet=quiet)
    given = settings(flags)
    source = open_model(given, ui)
    inputs = _input_files(source, given)
    if not dry_run:
        _check_outputs(given, save_plan, save_compressed, inputs)

    from qcompress_exporters.onnx_file import build
    from qcompress_exporters.targets import DEFAULT_TARGET

    def output_for(widths: Collection[int]) -> Path:
        path = given.output or _default_output(source, widths)
        if not dry_run:
            check_writable(path, force=given.force, inputs=inputs)
        return path

    small, resolved, output = _compressed(source, given, flags, ui, output_for)
    built = build(small, target=given.target or DEFAULT_TARGET, float_leftovers=float_leftovers)
    parity = _decodes(built.data)
    report = built.report
    if not dry_run:
        report = built.write(output, force=given.force, inputs=inputs)
        ui.wrote(output)
        if save_compressed is not None:
            small.save(save_compressed)
            ui.wrote(save_compressed)
        if save_plan is not None:
            write_whole(save_plan, small.plan.to_toml().encode())
            ui.wrote(save_plan)

    ui.emit(_as_dict(source, report, resolved, parity))
    if dry_run and resolved is not None:
        ui.show(_plan_table(resolved))
    if explain:
        ui.show(_explanation(report))
    ui.show(_size_table(report))
    ui.show(*_words(report, parity, output, dry_run))
    for note in report.notes:
        if note not in small.program.notes:
            ui.note(note)
    if not report.shrank:
        ui.note("warning: no tensor got smaller.")
        if strict:
            click.get_current_context().exit(CHECK_FAILED)


def _compressed(
    source: Source, given: Settings, flags: dict[str, Any], ui: Ui, output_for: Callable[[Collection[int]], Path]
) -> "tuple[CompressedModel, ResolvedPlan | None, Path]":
    """The compressed model that MODEL is, or that the plan makes of it; its plan; where the file goes.

    The output is settled before the long work begins.
    """
    from qcompress.posthoc.compress import compress_program, resolved_plan
    from qcompress.sources.compressed_folder import CompressedSource

    if isinstance(source, CompressedSource):
        said = [f for f in _NOT_FOR_COMPRESSED if flags.get(f)]
        if said:
            raise ConfigError(
                f"{source.label} is compressed already: --{said[0].replace('_', '-')} must be left out, or name the "
                "original model."
            )
        small = source.model()
        return small, None, output_for({a.bits for a in small.artifacts.values() if isinstance(a, PalettizedWeight)})
    plan = load_plan(given.plan) if given.plan else Plan()
    plan = plan.with_flags(bits=given.bits, rows_per_lut=flags["rows_per_lut"])
    program = open_program(source, given, ui)
    resolved = resolved_plan(program, plan)
    output = output_for({tensor.bits for tensor in resolved.compressed})
    small = compress_program(
        program,
        plan,
        source_digest=source.sha256[:11],
        track=lambda names: ui.track(names, "compressing", total=len(program.state())),
    )
    return small, resolved, output


def _input_files(source: Source, given: Settings) -> list[Path]:
    """Files of the user's that this command reads and must never replace; those of a folder one by one."""
    named = [given.data, given.calibration, given.arch, given.transform]
    files = [Path(text.rpartition(":")[0] or text) for text in named if text] + [Path(t) for t in named if t]
    found = [p for p in (source.path, given.plan, Path(OWN_FILE), Path(PYPROJECT), *files) if p and p.exists()]
    return [inner for p in found for inner in (sorted(p.iterdir()) if p.is_dir() else [p])]


def _check_outputs(given: Settings, save_plan: Path | None, save_compressed: Path | None, inputs: list[Path]) -> None:
    """Refuse what cannot be written before the long work begins."""
    files = [path for path in (given.output, save_plan) if path is not None]
    for path in files:
        check_writable(path, force=given.force, inputs=inputs)
    if save_compressed is not None:
        if save_compressed.exists():
            raise OutputError(f"{save_compressed} exists: name another folder, or remove it first.")
        check_writable(save_compressed)
        files.append(save_compressed)
    if len({path.absolute() for path in files}) < len(files):
        raise ConfigError("-o, --save-plan and --save-compressed must name different files.")


def _default_output(source: Source, widths: Collection[int]) -> Path:
    stem = source.path.stem if source.path is not None else "model"
    return Path(f"{stem}.w{next(iter(widths))}.onnx" if len(widths) == 1 else f"{stem}.mixed.onnx")


def _decodes(data: bytes) -> dict[str, Any] | None:
    """Whether onnxruntime loads the file and decodes every tensor to what was compressed; None without onnxruntime."""
    try:
        import onnxruntime
    except ImportError:
        return None
    import onnx

    from qcompress_exporters.decode import decoded, mismatches
    from qcompress_exporters.sessions import session

    session(data, "deployed")  # the whole file loads
    model = onnx.load_from_string(data)
    values = decoded(model)
    wrong = mismatches(model, values)
    if wrong:
        raise AssertionError(f"onnxruntime {onnxruntime.__version__} decodes {wrong[0]} to other values than we wrote")
    return {"onnxruntime": onnxruntime.__version__, "tensors": len(values), "ok": True}


def _size_table(report: "ExportReport") -> Table:
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


def _words(report: "ExportReport", parity: dict[str, Any] | None, output: Path, dry_run: bool) -> list[str]:
    weights = [t for t in report.tensors if t.artifact != "float"]
    widths = Counter(t.bits for t in weights)
    by_width = ", ".join(f"{n} at {bits} bits" for bits, n in sorted(widths.items()))
    lines = [f"{counted(len(weights), 'weight')} compressed" + (f" ({by_width})." if by_width else ".")]
    reasons: dict[str, list[Any]] = {}
    for tensor in report.left_in_float:
        reasons.setdefault(tensor.why, []).append(tensor)
    for reason, tensors in reasons.items():
        names = ", ".join(printable(t.name) for t in tensors[:3]) + (" …" if len(tensors) > 3 else "")
        nbytes = sum(t.nbytes for t in tensors)
        lines.append(f"left in float, {reason}: {counted(len(tensors), 'tensor')}, {format_size(nbytes)} ({names})")
    if parity is not None:
        decoded = counted(parity["tensors"], "tensor")
        lines.append(f"parity: onnxruntime {parity['onnxruntime']} decodes {decoded} bit for bit")
    where = f"nothing written (--dry-run); the file would be {output}" if dry_run else f"written: {output}"
    lines.append(f"{where} (opset {report.opset}, runs on {report.target} and later)")
    return lines


def _explanation(report: "ExportReport") -> Table:
    table = new_table("tensor", ["shape", "bits", "encoding", "bytes", "why"], left=["encoding", "why"])
    for t in report.tensors:
        table.add_row(printable(t.name), shape_text(t.shape), str(t.bits), t.encoding, f"{t.nbytes:,}", t.why)
    return table


def _plan_table(resolved: ResolvedPlan) -> Table:
    table = new_table("tensor", ["kind", "bits", "rows_per_lut", "set by"], left=["kind", "set by"])
    for t in resolved.tensors:
        if t.kind not in WEIGHT_KINDS:
            continue
        if t.settings is None:
            table.add_row(printable(t.name), t.kind, "float", "", t.reason or "")
        else:
            origins = ", ".join(f"{f}: {where}" for f, where in t.origins.items() if f in ("bits", "rows_per_lut"))
            table.add_row(printable(t.name), t.kind, str(t.bits), str(t.settings.rows_per_lut), origins)
    return table


def _as_dict(
    source: Source, report: "ExportReport", resolved: ResolvedPlan | None, parity: dict[str, Any] | None
) -> dict[str, Any]:
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
        "tensors": [asdict(t) for t in report.tensors],
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
