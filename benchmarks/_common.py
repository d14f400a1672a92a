"""What benchmarks against other tools share: bars, and silence."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """What a figure is held to: at least, or at most."""

    what: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def verdict(self) -> str:
        """`pass` or `FAIL`."""
        return "pass" if (self.value >= self.limit if self.at_least else self.value <= self.limit) else "FAIL"

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{self.verdict:5} {self.what}: {self.value:.7g} {sign} {self.limit:g}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what peers print, log and warn."""
    logging.disable(logging.CRITICAL)
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)
