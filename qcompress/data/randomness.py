"""Random numbers that depend on a key of integers alone, so that nothing needs to be stored to resume."""

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Seeds = npt.NDArray[np.uint64]

# The first number of a key says what the numbers are for, so that no two uses share theirs.
ORDER: Final = 1
SAMPLES: Final = 2
AUGMENT: Final = 3

_WORD: Final = 1 << 32


def seeds_of(count: int, *key: int) -> Seeds:
    """Return seeds that depend on a key alone.

    Args:
        count: how many.
        key: integers; keys of one first number must have one length.

    >>> seeds_of(2, ORDER, 7, 0).tolist() == seeds_of(2, ORDER, 7, 0).tolist() != seeds_of(2, ORDER, 7, 1).tolist()
    True
    """
    words = [word for number in key for word in (number % _WORD, number // _WORD % _WORD)]
    return np.asarray(np.random.SeedSequence(words).generate_state(count, np.uint64), np.uint64)


@contextlib.contextmanager
def kept_states() -> Iterator[None]:
    """Restore the states of the global generators of Python, numpy and torch (CPU) after user code ran."""
    torch: Any = sys.modules.get("torch")
    ours, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002 - users' code draws from the global ones
    torchs = None if torch is None else torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)  # noqa: NPY002
        if torch is not None and torchs is not None:
            torch.default_generator.set_state(torchs)


def seed_globals(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch (CPU), from which users' datasets draw."""
    random.seed(seed)
    np.random.seed(seed % _WORD)  # noqa: NPY002
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.manual_seed(seed)
