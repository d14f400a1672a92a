"""`qcompress analyze MODEL`: statistics of all tensors, and the bytes at each width."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from rich.console import RenderableType
from rich.table import Table

from qcompress.analysis import WIDTHS, AnalysisReport, TensorReport, Totals, report_of, totals_of, walk
from qcompress.artifacts.size import format_size
from qcompress_cli.inputs import options
from qcompress_cli.inputs.open_model import open_model
from qcompress_cli.inputs.project import run_options
from qcompress_cli.terminal.console import Ui, new_table
from qcompress_cli.terminal.numbers import counted, number, shape_text, share
from qcompress_cli.terminal.text import printable


@dataclass(frozen=True, slots=True)
class _Column:
    header: str
    cell: Callable[[TensorReport], str]
    total: Callable[[Totals], str] = lambda totals: ""


def _bytes_column(bits: int) -> _Column:
    return _Column(f"{bits} bits", lambda t: format_size(t.nbytes_at[bits]), lambda s: format_size(s.nbytes_at[bits]))


# Columns that stay together; sections share one table where the terminal is wide enough.
_SECTIONS: Final[tuple[tuple[_Column, ...], ...]] = (
    (
        _Column("shape", lambda t: shape_text(t.shape)),
        _Column("count", lambda t: f"{t.statistics.count:,}", lambda s: f"{s.count:,}"),
        _Column("min", lambda t: number(t.statistics.min)),
        _Column("max", lambda t: number(t.statistics.max)),
        _Column("mean", lambda t: number(t.statistics.mean)),
        _Column("std", lambda t: number(t.statistics.std)),
    ),
    (
        _Column("range", lambda t: number(t.statistics.range)),
        _Column("kurtosis", lambda t: number(t.statistics.kurtosis)),
        _Column(">3σ %", lambda t: share(t.statistics.beyond_3_sigma)),
        _Column(">6σ %", lambda t: share(t.statistics.beyond_6_sigma)),
        _Column("NaN/Inf", lambda t: f"{t.statistics.non_finite:,}", lambda s: f"{s.non_finite:,}"),
    ),
    (
        _Column("now", lambda t: format_size(t.nbytes), lambda s: format_size(s.nbytes)),
        *(_bytes_column(bits) for bits in WIDTHS),
    ),
)


@options.command("analyze")
@options.model_argument
@options.arch_options
@options.common_options
def command(json: bool, quiet: bool, **params: Any) -> None:
    """Show what is in MODEL: statistics and outliers of every tensor, and the bytes it would take at 2, 3, 4 and 8
    bits.

    This runs no code from MODEL, so it is safe for files that you do not trust. Your own code runs only if --arch is
    on the command line (an arch in the project's config is ignored); it tells which tensors of a state dict are
    weights. Without it, names and shapes tell: tensors that count along two or more axes are weights, except those from
    which export computes another one.
    """
    ui = Ui(json=json, quiet=quiet)
    source = open_model(replace(run_options(params), arch=params["arch"]), ui)
    report = report_of(source, ui.track(walk(source), "reading tensors"))
    ui.emit(report.as_dict())
    ui.show(*_tables(ui, report), _summary(report))
    if report.totals.non_finite:
        bad = [t.name for t in report.tensors if t.statistics.non_finite]
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        ui.note(f"warning: NaN or infinite values in {', '.join(bad[:5])}{more}; other commands reject such a model.")


def _tables(ui: Ui, report: AnalysisReport) -> list[RenderableType]:
    """Return one table where the terminal is wide enough, else several that all list the weights.

    Of several tables only the first lists the tensors that are not weights.
    """
    done: list[RenderableType] = []
    sections = list(_SECTIONS)
    while sections:
        taken = len(sections)
        while taken > 1 and not ui.fits(_table(report, sections[:taken], others=not done)):
            taken -= 1
        table = _table(report, sections[:taken], others=not done)
        if not ui.fits(table):
            table.padding = (0, 0)
        done += [table, ""]
        del sections[:taken]
    return done


def _table(report: AnalysisReport, sections: Sequence[Sequence[_Column]], *, others: bool) -> Table:
    """Return a table of the weights, then of the other tensors or only their sum, then the total."""
    columns = [column for section in sections for column in section]
    table = new_table("tensor", [column.header for column in columns])

    def add(tensors: Sequence[TensorReport]) -> None:
        for tensor in tensors:
            table.add_row(printable(tensor.name), *(column.cell(tensor) for column in columns))
        table.add_section()

    weights = [tensor for tensor in report.tensors if tensor.stays is None]
    rest = [tensor for tensor in report.tensors if tensor.stays is not None]
    add(weights)
    if others:
        add(rest)
    elif rest:
        table.add_row(counted(len(rest), "other"), *(column.total(totals_of(rest)) for column in columns))
        table.add_section()
    table.add_row("total", *(column.total(report.totals) for column in columns), style="bold")
    return table


def _summary(report: AnalysisReport) -> str:
    totals = report.totals
    tied = sum(len(t.aliases) for t in report.tensors)
    lines = [
        f"{counted(totals.weights, 'weight')} to compress; the other {totals.tensors - totals.weights} tensors stay as "
        "they are (not weights, or too small).",
        f"{format_size(totals.nbytes)} now; "
        + ", ".join(f"{format_size(totals.nbytes_at[bits])} at {bits}" for bits in WIDTHS)
        + " bits.",
    ]
    if tied:
        lines.append(f"Tied names, counted once: {tied}.")
    return "\n".join(lines)
