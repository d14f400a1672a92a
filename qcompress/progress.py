"""Long work that lets somebody watch: items pass through a function that may show how far they are."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """Passes items on; `what` is a word for the work on them, such as "solving"."""

    def __call__(self, items: Iterable[T], what: str) -> Iterable[T]:
        """The same items, one after another."""


def untracked(items: Iterable[T], what: str) -> Iterable[T]:
    """Nobody watches.

    >>> list(untracked(range(3), "counting"))
    [0, 1, 2]
    """
    return items
