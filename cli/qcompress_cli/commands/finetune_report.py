"""The report of `finetune`: a line per epoch, the table at the end, JSON, and the picture of the curves."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final, final

from rich.console import RenderableType

from qcompress.artifacts.size import format_size
from qcompress.metrics.intervals import of_runs
from qcompress.metrics.metric import unit_of
from qcompress.plan.training import Training
from qcompress_cli.terminal.console import new_table
from qcompress_cli.terminal.numbers import counted, number

if TYPE_CHECKING:
    from qcompress.finetune.history import EpochRow
    from qcompress.finetune.prepared import Prepared
    from qcompress.metrics.result import MetricResult

_SHOWN: Final = 12  # epochs in a table
_NAMED: Final = 3  # weights with the largest errors
_LONG_S: Final = 100
_LONG_MIN: Final = 120


def time_text(seconds: float) -> str:
    """Return a time in words.

    >>> time_text(42), time_text(600), time_text(7320)
    ('42 s', '10 min', '2 h 2 min')
    """
    if seconds < _LONG_S:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < _LONG_MIN else f"{minutes // 60} h {minutes % 60} min"


def epoch_line(row: "EpochRow", epochs: int, seconds: float, metric: str) -> str:
    """Return what is said of an epoch when it ends."""
    scored = "" if row.score is None else f", {metric} {_scored(metric, row.score)}"
    return f"epoch {row.epoch}/{epochs}: loss {number(row.loss)}{scored}, {time_text(seconds)}"


def dry_run(settings: Training, prepared: "Prepared", steps: int) -> list[RenderableType]:
    """Return what would be done."""
    table = new_table("setting", ["value"], left=["value"])
    for name, value in settings.given().items():
        table.add_row(name, str(value).lower() if isinstance(value, bool) else str(value))
    planned = prepared.parts.resolved.compressed
    widths = ", ".join(f"{count} at {bits} bits" for bits, count in sorted(Counter(t.bits for t in planned).items()))
    weights = f"{counted(len(planned), 'weight')}: {widths}" if planned else "all weights in float"
    return [
        table,
        f"{weights}; {counted(settings.epochs, 'epoch')} of {counted(steps, 'step')}",
        f"{format_size(prepared.finalize().nbytes)} of packed codes, tables and float leftovers",
    ]


@final
@dataclass(frozen=True, slots=True)
class Done:
    """A finished run, or a dry run, which has no history.

    Args:
        folder: of the run; None for a dry run.
        seed: of the run.
        settings: how it was trained.
        rows: the history.
        best_epoch: the one that was kept; None without validation data: the last.
        original: the metric of the float model; None without validation data.
        metric: its name.
        best: how the kept model compares with the float one; None without validation data.
        errors: of each weight: the relative distance of the stored one from the float one.
    """

    folder: Path | None
    seed: int
    settings: Training
    rows: "tuple[EpochRow, ...]"
    best_epoch: int | None
    original: float | None
    metric: str
    best: "MetricResult | None" = None
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def kept(self) -> "EpochRow":
        """The epoch whose weights are in the folder."""
        return self.rows[-1] if self.best_epoch is None else self.rows[self.best_epoch - 1]

    def tables(self) -> list[RenderableType]:
        """Return the epochs, the kept one marked; of many, some."""
        table = new_table("epoch", ["loss", "weights' error", *([self.metric] if self.original is not None else [])])
        spread = -(-len(self.rows) // _SHOWN)
        for row in self.rows:
            if row.epoch % spread and row not in (self.kept, self.rows[-1]):
                continue
            mark = " *" if row is self.kept and self.best_epoch is not None else ""
            score = [] if self.original is None else [_scored(self.metric, row.score)]
            table.add_row(f"{row.epoch}{mark}", number(row.loss), f"{100 * row.error:.2f} %", *score)
        return [table] if self.best is None else [table, self._compared(self.best)]

    def _compared(self, best: "MetricResult") -> RenderableType:
        """Return what training and storing cost, on the same samples."""
        table = new_table("model", [self.metric, "drop", "95 %"])
        table.add_row("float", _scored(self.metric, best.original), "", "")
        trained = self.kept.trained_score
        if trained is not None:
            sign = -1 if best.lower_is_better else 1
            table.add_row(
                "trained", *(_scored(self.metric, v) for v in (trained, sign * (best.original - trained))), ""
            )
        table.add_row("as stored", *self.compared())
        return table

    def compared(self) -> list[str]:
        """Return the metric of the kept model, its drop, and the drop's interval; empty without validation data."""
        if self.best is None:
            return []
        return [
            *(_scored(self.metric, v) for v in (self.best.compressed, self.best.drop)),
            _ends(self.metric, self.best.interval),
        ]

    def lines(self) -> list[str]:
        """Return the verdict and the next commands."""
        if self.best is None:
            said = f"trained {counted(len(self.rows), 'epoch')}, loss {number(self.rows[-1].loss)}: {self.folder}"
        else:
            said = (
                f"{self.metric} {_scored(self.metric, self.best.compressed)} with the weights of epoch "
                f"{self.kept.epoch} as stored, {_scored(self.metric, self.best.original)} in float: {self.folder}"
            )
        worst = sorted(self.errors, key=lambda name: -self.errors[name])[:_NAMED]
        listed = ", ".join(f"{name} {100 * self.errors[name]:.1f} %" for name in worst)
        largest = [f"largest errors: {listed}"] if worst else []
        return [*largest, said, self.next_command()]

    def next_command(self) -> str:
        """Return what to type next."""
        bits = " --bits 2" if self.settings.method == "none" else ""
        return f"Next: qcompress export {self.folder}{bits}"

    def as_dict(self) -> dict[str, Any]:
        """Return the document of --json; docs/json.md lists its keys."""
        return {
            "format_version": 1,
            "folder": None if self.folder is None else str(self.folder),
            "settings": self.settings.given(),
            "metric": None if self.original is None else self.metric,
            "original": self.original,
            "kept_epoch": self.kept.epoch if self.rows else None,
            "drop": None if self.best is None else self.best.drop,
            "drop_interval": None if self.best is None or self.best.interval is None else list(self.best.interval),
            "history": [asdict(row) for row in self.rows],
            "seeds": [],
        }


@final
@dataclass(frozen=True, slots=True)
class Seeds:
    """Finished runs that differ in their seeds.

    Args:
        folder: holds their folders.
        runs: the runs, two or more.
    """

    folder: Path
    runs: tuple[Done, ...]

    @property
    def best(self) -> Done:
        """The run with the best metric, or without validation data with the lowest loss."""
        return min(self.runs, key=lambda run: run.rows[-1].loss if run.best is None else run.best.drop)

    def _drops(self) -> list[float]:
        return [run.best.drop for run in self.runs if run.best is not None]

    def tables(self) -> list[RenderableType]:
        """Return a line per run, and the mean with its interval over the runs."""
        metric, is_scored = self.best.metric, self.best.best is not None
        table = new_table("seed", ["loss", *([metric, "drop", "95 %"] if is_scored else [])])
        for run in self.runs:
            mark = " *" if run is self.best else ""
            table.add_row(f"{run.seed}{mark}", number(run.rows[-1].loss), *run.compared())
        if is_scored:
            scores = [run.best.compressed for run in self.runs if run.best is not None]
            mean = (_scored(metric, mean) for mean in (fmean(scores), fmean(self._drops())))
            table.add_row("mean", "", *mean, _ends(metric, of_runs(self._drops())))
        return [table]

    def lines(self) -> list[str]:
        """Return the verdict and the next command."""
        best, metric = self.best, self.best.metric
        said = f"trained {len(self.runs)} times: {self.folder}; the lowest loss (*): {best.folder}"
        if best.best is not None:
            ends = _ends(metric, of_runs(self._drops()))
            scores = (run.best.compressed for run in self.runs if run.best is not None)
            said = (
                f"{metric} {_scored(metric, fmean(scores))} over {len(self.runs)} seeds, "
                f"{_scored(metric, best.original)} in float: a drop of {_scored(metric, fmean(self._drops()))} "
                f"(95 % {ends}); the best run (*): {best.folder}"
            )
        return [said, best.next_command()]

    def as_dict(self) -> dict[str, Any]:
        """Return the document of --json: that of the best run, with the drop over all runs."""
        drops = self._drops()
        interval = of_runs(drops)
        return self.best.as_dict() | {
            "drop": fmean(drops) if drops else None,
            "drop_interval": None if interval is None else list(interval),
            "seeds": [
                {
                    "seed": run.seed,
                    "folder": str(run.folder),
                    "loss": run.rows[-1].loss,
                    "score": None if run.best is None else run.best.compressed,
                    "drop": None if run.best is None else run.best.drop,
                }
                for run in self.runs
            ],
        }


def _ends(metric: str, interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else " to ".join(_scored(metric, end) for end in interval)


def _scored(metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.2f} %" if unit_of(metric) == "fraction" else number(value)


_WIDTH, _HEIGHT, _MARGIN = 640, 280, 56


def curves(done: Done) -> str:
    """Return an SVG of the loss over the epochs, and of the metric where there is one."""
    series = [("loss", [row.loss for row in done.rows])]
    if done.original is not None:
        series.append((done.metric, [row.score or 0.0 for row in done.rows]))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT * len(series)}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT * len(series)}" fill="white"/>',
    ]
    for i, (name, values) in enumerate(series):
        parts += _curve(name, values, i * _HEIGHT)
    return "\n".join([*parts, "</svg>", ""])


def _curve(name: str, values: Sequence[float], top: int) -> list[str]:
    low, high = min(values), max(values)
    spread = (high - low) or 1.0
    left, right, bottom = _MARGIN, _WIDTH - 20, top + _HEIGHT - 36

    def point(i: int, value: float) -> tuple[float, float]:
        x = left + (right - left) * (i / max(1, len(values) - 1))
        return x, bottom - (bottom - top - 40) * (value - low) / spread

    points = [point(i, value) for i, value in enumerate(values)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return [
        f'<text x="{left}" y="{top + 22}" font-weight="bold">{escape(name)}</text>',
        f'<line x1="{left}" y1="{bottom}" x2="{right}" y2="{bottom}" stroke="#999"/>',
        f'<text x="{left - 6}" y="{point(0, low)[1] + 4:.1f}" text-anchor="end">{number(low)}</text>',
        f'<text x="{left - 6}" y="{point(0, high)[1] + 4:.1f}" text-anchor="end">{number(high)}</text>',
        f'<polyline points="{path}" fill="none" stroke="#0969da" stroke-width="2"/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#0969da"/>' for x, y in points),
        f'<text x="{left}" y="{bottom + 20}">epoch 1</text>',
        f'<text x="{right}" y="{bottom + 20}" text-anchor="end">epoch {len(values)}</text>',
    ]
