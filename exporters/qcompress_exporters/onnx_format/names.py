"""Short names for values that no one asks for by name: a name costs its length each time it stands in the file."""

from collections.abc import Iterable
from string import ascii_letters, digits
from typing import Final

ONE_CHARACTER: Final = digits + ascii_letters  # the shortest names


class ShortNames:
    """Names `0`, `1`, ... `Z`, `10`, ... that are not taken.

    >>> names = ShortNames(["1"])
    >>> names.new(), names.new()
    ('0', '2')
    """

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)
        self._next = 0

    def new(self) -> str:
        """The next free name."""
        while True:
            number, name = self._next, ""
            while True:
                number, digit = divmod(number, len(ONE_CHARACTER))
                name = ONE_CHARACTER[digit] + name
                if not number:
                    break
            self._next += 1
            if name not in self._taken:
                self._taken.add(name)
                return name
