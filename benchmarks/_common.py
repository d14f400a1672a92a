"""Limits for figures, silencing of other tools' output, fresh processes and their memory; shared by the benchmarks."""

import contextlib
import io
import logging
import resource
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Bar:
    """A figure with its lower or upper limit."""

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def verdict(self) -> str:
        """Return `pass` or `FAIL`."""
        return "pass" if (self.value >= self.limit if self.at_least else self.value <= self.limit) else "FAIL"

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{self.verdict:5} {self.what}: {self.value:.7g} {sign} {self.limit:g}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress output, logs and warnings of other tools."""
    logging.disable(logging.CRITICAL)
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Return a function's result from a process that has done nothing before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *args).result()


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_resident() -> int:
    """Return the largest resident memory of this process in bytes since `restart_peak`, or since it began."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def restart_peak() -> None:
    """Forget the largest resident memory so far."""
    Path("/proc/self/clear_refs").write_text("5")
