"""Where long work runs, and who watches it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar, final

T = TypeVar("T")


class Track(Protocol):
    """Passes items on, and may show how far they are; `what` names the work, such as "solving"."""

    def __call__(self, items: Iterable[T], what: str) -> Iterable[T]:
        """Return the same items, one after another."""


def untracked(items: Iterable[T], what: str) -> Iterable[T]:
    """Return the items; show nothing.

    >>> list(untracked(range(3), "counting"))
    [0, 1, 2]
    """
    return items


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """Where long work runs, and what shows its progress.

    Args:
        device: torch's name of the device.
        track: passes on what the work goes through: a progress bar.
    """

    device: str = "cpu"
    track: Track = untracked


ON_CPU: Final = Execution()
