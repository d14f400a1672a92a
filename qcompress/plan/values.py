"""Sets of legal values: what a value must be, in words and in code, and how its text on the command line is read."""

import math
import re
from dataclasses import dataclass
from typing import Any, Final, Protocol, final

_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)


class Values(Protocol):
    """A set of legal values; `str` of it completes the sentence "must be …"."""

    def __contains__(self, value: object) -> bool: ...

    @property
    def metavar(self) -> str:
        """How `--help` shows the values."""

    def parse(self, text: str) -> Any:
        """Return the value that a text stands for, or the text where it stands for no legal value."""


@final
@dataclass(frozen=True, slots=True)
class Integer:
    """Integers in a range.

    Args:
        low: the smallest.
        high: the largest; None for no limit.
        word: a text that is legal beside the integers.

    >>> 8 in Integer(1, 8), True in Integer(1, 8), "auto" in Integer(1, word="auto")
    (True, False, True)
    >>> str(Integer(1, 8)), str(Integer(1, word="auto"))
    ('an integer in [1, 8]', "'auto' or an integer of at least 1")
    """

    low: int
    high: int | None = None
    word: str | None = None

    def __contains__(self, value: object) -> bool:
        if type(value) is not int:
            return isinstance(value, str) and value == self.word
        return self.low <= value and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        words = "" if self.word is None else f"{self.word!r} or "
        limits = f"of at least {self.low}" if self.high is None else f"in [{self.low}, {self.high}]"
        return f"{words}an integer {limits}"

    @property
    def metavar(self) -> str:
        integers = "N" if self.high is None else f"{self.low}-{self.high}"
        return integers if self.word is None else f"{integers}|{self.word}"

    def parse(self, text: str) -> int | str:
        return int(text) if _INTEGER.fullmatch(text) else text


@final
@dataclass(frozen=True, slots=True)
class OneOf:
    """A few values.

    >>> str(OneOf((1, 2, 4))), str(OneOf(("a", "b"))), str(OneOf((True, False)))
    ('1, 2 or 4', "'a' or 'b'", 'true or false')
    >>> 1 in OneOf((True, False)), OneOf((1, 2, 4)).parse("4"), OneOf((True, False)).metavar
    (False, 4, 'true|false')
    """

    values: tuple[str | int | bool, ...]

    def __contains__(self, value: object) -> bool:
        return any(type(value) is type(v) and value == v for v in self.values)

    def __str__(self) -> str:
        *words, last = [repr(v) if isinstance(v, str) else _spelled(v) for v in self.values]
        return f"{', '.join(words)} or {last}" if words else last

    @property
    def metavar(self) -> str:
        return "|".join(_spelled(v) for v in self.values)

    def parse(self, text: str) -> str | int | bool:
        return next((v for v in self.values if _spelled(v) == text), text)


@final
@dataclass(frozen=True, slots=True)
class Number:
    """Finite numbers in a range.

    Args:
        low: the smallest.
        high: the largest; None for no limit.

    >>> 0.5 in Number(0, 1), 2 in Number(0), True in Number(0, 1), float("nan") in Number(0)
    (True, True, False, False)
    >>> str(Number(0, 1)), str(Number(0)), Number(0).parse("1e-3"), Number(0).parse("much")
    ('a number in [0, 1]', 'a number of at least 0', 0.001, 'much')
    """

    low: float
    high: float | None = None

    def __contains__(self, value: object) -> bool:
        if type(value) not in (int, float):
            return False
        return self.low <= value < math.inf and (self.high is None or value <= self.high)  # type: ignore[operator]

    def __str__(self) -> str:
        return (
            f"a number of at least {self.low:g}" if self.high is None else f"a number in [{self.low:g}, {self.high:g}]"
        )

    @property
    def metavar(self) -> str:
        return "X"

    def parse(self, text: str) -> float | str:
        try:
            return float(text)
        except ValueError:
            return text


@final
@dataclass(frozen=True, slots=True)
class Text:
    """Some words, and other texts that a pattern describes.

    Args:
        words: the words.
        others: what else is legal: a name for it, such as `FILE`.

    >>> "self" in Text(("self", "none"), "FILE"), "" in Text((), "FILE"), str(Text(("self",), "FILE"))
    (True, False, "'self' or FILE")
    """

    words: tuple[str, ...]
    others: str

    def __contains__(self, value: object) -> bool:
        return isinstance(value, str) and bool(value.strip())

    def __str__(self) -> str:
        return " or ".join([*(f"{word!r}" for word in self.words), self.others])

    @property
    def metavar(self) -> str:
        return "|".join([*self.words, self.others])

    def parse(self, text: str) -> str:
        return text


def _spelled(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
