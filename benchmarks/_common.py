"""Limits for figures, and silencing of other tools' output; shared by the benchmarks."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass


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
