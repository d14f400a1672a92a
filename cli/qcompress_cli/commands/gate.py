"""`qcompress gate FILE…`: fails the build when a file outgrows its budget or no longer agrees with the original."""

import glob
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from rich.text import Text

from qcompress.errors import ConfigError, SourceError
from qcompress.gate.verdicts import (
    Measurements,
    Verdict,
    judge,
    parse_fraction,
    parse_max_size,
    parse_min_agreement,
    parse_min_ratio,
    percent,
    require_a_limit,
)
from qcompress_cli.inputs import options
from qcompress_cli.inputs.project import load_config_file, load_project, read_gate
from qcompress_cli.terminal.console import Ui, new_table
from qcompress_cli.terminal.exits import CHECK_FAILED
from qcompress_cli.terminal.text import printable

if TYPE_CHECKING:
    from qcompress.gate.validation import Validation
    from qcompress_exporters.formats import DeployedFile

_COMPARED: Final = {"max_size": "≤", "min_ratio": "≥", "max_drop": "≤", "min_agreement": "≥"}
_MAGIC: Final = "*?["


@options.command("gate")
@click.argument("files", nargs=-1, metavar="FILE…")
@click.option("--max-size", type=options.Parsed("size", parse_max_size), help="Most bytes of the file: 150kB, 1.5MiB.")
@click.option(
    "--min-ratio",
    type=options.Parsed("ratio", parse_min_ratio),
    help="Least original / file size: 8.",
)
@click.option(
    "--max-drop",
    type=options.Parsed("drop", parse_fraction),
    help="By how much the metric may get worse, in its own unit: 0.01, or 1% for 0.01.",
)
@click.option(
    "--min-agreement",
    type=options.Parsed("fraction", parse_min_agreement),
    help="Smallest share of samples on which file and original agree: 0.98 or 98%.",
)
@click.option("--original", type=options.PATH, help="Compare with the bytes of this file.")
@click.option("--config", type=options.PATH, help="Read limits from this config instead of that of the working folder.")
@options.common_options
def command(
    files: tuple[str, ...], original: Path | None, config: Path | None, json: bool, quiet: bool, **params: Any
) -> None:
    """Exit with 1 when a FILE breaks a limit. FILE may be a glob.

    Limits are options, or max_size, min_ratio, max_drop, min_agreement (and files) in [tool.qcompress.gate] of
    pyproject.toml or [gate] of qcompress.toml; options win. Limits on accuracy need the measurements of
    `qcompress validate`.
    """
    project, where = load_project() if config is None else load_config_file(config)
    limits, own = read_gate(project, where)
    limits = replace(limits, **{name: params[name] for name in _COMPARED if params[name] is not None})
    require_a_limit(limits)
    from qcompress_exporters import formats  # imports onnx, so it comes after what can fail without it

    original_bytes = None if original is None else _nbytes_of(original)
    accuracy = limits.max_drop is not None or limits.min_agreement is not None
    measured = []
    for path in _expand(files or own):
        _, file = formats.read(path)
        measured.append(
            Measurements(
                file=str(path),
                nbytes=file.whole_nbytes,
                is_ours=file.is_ours,
                original_bytes=file.original_bytes if original_bytes is None else original_bytes,
                validation=_validation(file, needed=accuracy),
            )
        )
    verdicts = judge(measured, limits)
    ok = all(verdict.ok for verdict in verdicts)
    ui = Ui(json=json, quiet=quiet)
    ui.emit({"format_version": 1, "ok": ok, "verdicts": [_as_dict(verdict) for verdict in verdicts]})
    _show(ui, verdicts)
    if not ok:
        click.get_current_context().exit(CHECK_FAILED)


def _expand(patterns: Sequence[str]) -> list[Path]:
    """Return the files in the order given, those of one glob sorted, each once."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        is_glob = any(c in pattern for c in _MAGIC) and not Path(pattern).exists()
        matches = sorted(glob.glob(pattern, recursive=True)) if is_glob else [pattern]
        if not matches:
            raise ConfigError(f"gate: no file matches {pattern}; export it first, or check the folder.")
        found.update(dict.fromkeys(Path(match) for match in matches))
    return list(found)


def _nbytes_of(original: Path) -> int:
    """Return the bytes of the original, whatever kind of file it is, its external data included."""
    from qcompress_exporters import formats

    if not original.is_file():
        raise SourceError(f"--original {original}: there is no such file.")
    try:
        return formats.read(original)[1].whole_nbytes
    except SourceError:
        return original.stat().st_size


def _validation(file: "DeployedFile", *, needed: bool) -> "Validation | None":
    """Return the measurements of a file; those of another file are ignored where no limit needs them."""
    try:
        return file.validation()
    except SourceError:
        if needed:
            raise
        return None


def _as_dict(verdict: Verdict) -> dict[str, Any]:
    fields = asdict(verdict)
    return fields if math.isfinite(verdict.measured) else {**fields, "measured": None}


def _show(ui: Ui, verdicts: Sequence[Verdict]) -> None:
    table = new_table("file", ["limit", "allowed", "measured", "verdict"], left=["limit", "verdict"])
    for position, verdict in enumerate(verdicts):
        if position and verdict.file != verdicts[position - 1].file:
            table.add_section()
        allowed, measured = _values(verdict)
        word = Text("ok", "green") if verdict.ok else Text("FAIL", "bold red")
        table.add_row(
            printable(verdict.file), verdict.limit, f"{_COMPARED.get(verdict.limit, '<')} {allowed}", measured, word
        )
    ui.show(table, "")
    for verdict in verdicts:
        if verdict.note is not None:
            ui.show(f"{verdict.file}: {verdict.limit}: {verdict.note}")
    failed = len([verdict for verdict in verdicts if not verdict.ok])
    ui.show(f"{failed} of {len(verdicts)} checks failed" if failed else f"all {len(verdicts)} checks passed")


def _values(verdict: Verdict) -> tuple[str, str]:
    """Return limit and measurement as text, with enough digits to tell them apart."""
    for digits in (4, 6, 9, 17):
        allowed, measured = (_text(value, verdict.unit, digits) for value in (verdict.allowed, verdict.measured))
        if allowed != measured or verdict.ok:
            break
    return allowed, measured


def _text(value: float, unit: str, digits: int) -> str:
    match unit:
        case "bytes":
            return f"{value:,} B"
        case "fraction":
            return percent(value, digits)
        case _:
            return f"{value:.{digits}g}"
