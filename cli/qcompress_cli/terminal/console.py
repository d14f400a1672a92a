"""The two streams of a command: results on stdout, progress and notes on stderr.

With --json stdout is one JSON document. Text is never cut or wrapped in a pipe or a file; on a terminal long names are
folded, never shortened.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, TypeVar, final

import click
from rich import box
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from qcompress.errors import OutputError
from qcompress_cli.terminal.text import printable

T = TypeVar("T")

_UNBOUNDED: Final = 100_000
_NAME_MIN_WIDTH: Final = 16


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to `main`, which ends silently with an exit code of its own."""
        raise BrokenPipeError


@final
class Ui:
    """The two streams of one command.

    Args:
        json: stdout is one JSON document, written by `emit`; `show` writes nothing, and what the user's own code
            prints until the command ends goes to stderr.
        quiet: no progress and no notes.
        silent: no results either: another process reports.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False, silent: bool = False) -> None:
        self.json = json or silent
        self.quiet, self._silent = quiet, silent
        self.out = _console(sys.stdout)
        self.err = _console(sys.stderr)
        self._written: list[Path] = []
        if json:
            click.get_current_context().with_resource(contextlib.redirect_stdout(sys.stderr))

    @property
    def width(self) -> int:
        """Columns of stdout; a very large number where it is not a terminal."""
        return self.out.width

    def show(self, *results: RenderableType) -> None:
        """Write results to stdout, unless --json claims it."""
        if not self.json:
            with self._to_stdout():
                for result in results:
                    self.out.print(printable(result) if isinstance(result, str) else result)

    def emit(self, report: Mapping[str, Any]) -> None:
        """Write the JSON document to stdout, if --json asks for it."""
        if self.json and not self._silent:
            with self._to_stdout():
                # Line by line: a single write of more than a pipe holds does not report that its reader is gone.
                self.out.file.writelines(json_text(report).splitlines(keepends=True))
                self.out.file.write("\n")

    def wrote(self, path: Path) -> None:
        """Remember a file that was written: if stdout fails later, the error names it."""
        self._written.append(path)

    def note(self, text: str) -> None:
        """Write a note to stderr, unless --quiet."""
        if not self.quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Write to stderr, with --quiet too."""
        self.err.print(printable(text))

    def track(self, items: Iterable[T], what: str) -> Iterator[T]:
        """Pass items on, with a progress bar on stderr where that is a terminal."""
        if self.quiet or not self.err.is_terminal:
            yield from items
            return
        with Progress(console=self.err, transient=True) as bar:
            yield from bar.track(items, description=what)

    @contextlib.contextmanager
    def bar(self, done: int, total: int) -> Iterator[Callable[[int, int, str], None]]:
        """Show a progress bar on stderr where that is a terminal.

        Args:
            done: what is done already.
            total: what there is to do.

        Yields:
            A function that is called with what is done, the total, and a text.
        """
        if self.quiet or not self.err.is_terminal:
            yield lambda done, total, text: None
            return
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.err, transient=True) as shown:
            task = shown.add_task("training", total=total, completed=done)
            yield lambda done, total, text: shown.update(task, completed=done, total=total, description=text)

    @contextlib.contextmanager
    def _to_stdout(self) -> Iterator[None]:
        try:
            yield
            self.out.file.flush()
        except BrokenPipeError:  # the reader is gone, which is not an error
            raise
        except OSError as e:
            kept = f" These files were written: {', '.join(map(str, self._written))}." if self._written else ""
            raise OutputError(f"stdout cannot be written: {e.strerror}.{kept}") from e

    def fits(self, table: Table) -> bool:
        """Return whether a table fits stdout without folding."""
        if self.width >= _UNBOUNDED:
            return True
        return Measurement.get(self.out, self.out.options.update(width=_UNBOUNDED), table).maximum <= self.width


def json_text(document: Mapping[str, Any]) -> str:
    """Return a JSON document as all commands write it."""
    return json.dumps(document, indent=2, allow_nan=False)


def new_table(name: str, columns: Sequence[str], *, title: str | None = None, left: Iterable[str] = ()) -> Table:
    """Return a table that fits a narrow terminal: names fold, words wrap, numbers stay whole.

    Args:
        name: header of the first column, which holds names.
        columns: headers of the others.
        title: a line above the table.
        left: those of the others that hold words, not numbers.
    """
    table = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False, show_edge=False
    )
    table.padding = (0, 1, 0, 0)
    words = set(left)
    # Columns of words share the width of the terminal; rich cuts what a minimum width pushes over the edge.
    table.add_column(name, overflow="fold", min_width=None if words else _NAME_MIN_WIDTH)
    for header in columns:
        is_words = header in words
        table.add_column(header, justify="left" if is_words else "right", no_wrap=not is_words, overflow="fold")
    return table


def _console(stream: IO[str]) -> Console:
    terminal = stream.isatty()
    return _Console(
        file=stream,
        width=None if terminal else _UNBOUNDED,
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=not terminal,
    )
