"""Fits the names of a checkpoint to those of an architecture: trainers and wrappers put prefixes in front of them."""

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Final, NamedTuple

WRAPPERS: Final = ("module.", "_orig_mod.")  # of DataParallel, AveragedModel and torch.compile
_WITHIN: Final = re.compile(rf"(?<![^.])(?:{'|'.join(map(re.escape, WRAPPERS))})")
_SHOWN: Final = 3


class Fit(NamedTuple):
    """How names of a checkpoint fit an architecture.

    Args:
        names: the architecture's name by that in the file.
        note: what was left out, for the user; empty where all names are the architecture's own.
    """

    names: dict[str, str]
    note: str = ""


def fit(given: Collection[str], needed: Collection[Collection[str]]) -> Fit:
    """Return the names of an architecture that names of a checkpoint stand for.

    Args:
        given: names in the file.
        needed: the names of each tensor that the file must have: one, or several if it is tied.

    Returns:
        The names as they are if they do not fit without a prefix either.

    >>> fit(["model.fc.weight", "loss.weight"], [["fc.weight"]])
    Fit(names={'model.fc.weight': 'fc.weight'}, note="The prefix 'model.' is left out; not read: loss.weight.")
    >>> fit(["stem._orig_mod.weight"], [["stem.weight"]]).names
    {'stem._orig_mod.weight': 'stem.weight'}
    """
    as_given = {name: name for name in given}
    if not needed or _has_all(as_given, needed):
        return Fit(as_given)
    for bare in (as_given, {name: _WITHIN.sub("", name) for name in given}):
        for prefix in _prefixes(bare.values(), needed):
            names = {old: new.removeprefix(prefix) for old, new in bare.items() if new.startswith(prefix)}
            if len({*names.values()}) == len(names) and _has_all(names, needed):
                others = [name for name in given if name not in names]
                return Fit(names, _note(prefix, is_bare=bare is not as_given, others=others))
    return Fit(as_given)


def _has_all(names: dict[str, str], needed: Iterable[Collection[str]]) -> bool:
    found = {*names.values()}
    return all(any(name in found for name in tied) for tied in needed)


def _prefixes(names: Iterable[str], needed: Iterable[Collection[str]]) -> Iterator[str]:
    """Yield what stands in front of a needed name, each once, in the order of the file; nothing at all first.

    The longest name is taken, which few others end with.
    """
    longest = max(needed, key=lambda tied: min(map(len, tied)))
    ends = (name.removesuffix(own) for name in names for own in longest if name.endswith(own))
    yield from dict.fromkeys(["", *(end for end in ends if end.endswith("."))])


def _note(prefix: str, *, is_bare: bool, others: list[str]) -> str:
    left = [repr(prefix)] if prefix else []
    left += [f"{' and '.join(map(repr, WRAPPERS))} within names"] if is_bare else []
    what = f"The prefix {' and '.join(left)} is left out" if prefix else f"{left[0]} are left out"
    if not others:
        return f"{what}."
    more = ", …" if len(others) > _SHOWN else ""
    return f"{what}; not read: {', '.join(others[:_SHOWN])}{more}."
