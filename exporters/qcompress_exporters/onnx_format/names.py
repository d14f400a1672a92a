"""Names of values in a file: those that something looks up, and short ones for all others.

A name costs its length each time it stands in the file.
"""

import re
from collections.abc import Iterable
from string import ascii_letters, digits
from typing import Final

ONE_CHARACTER: Final = digits + ascii_letters  # the shortest names

_PART: Final = re.compile(r"(.+)\[((?::,)*)(\d{1,9})\]")


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
        """Return the next free name."""
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


def code_name(site: int) -> str:
    """Return the name of the codes of a site.

    >>> code_name(7)
    'q7'
    """
    return f"q{site}"


def code_scale_name(site: int) -> str:
    """Return the name of the scale of a site's codes, where no quantizer holds it or it is found at run time.

    >>> code_scale_name(7)
    's7'
    """
    return f"s{site}"


def code_zero_point_name(site: int) -> str:
    """Return the name of the zero point of a site's codes, where it is found at run time.

    >>> code_zero_point_name(7)
    'z7'
    """
    return f"z{site}"


def scale_name(weight: str) -> str:
    """Return what the scale of a weight's int8 codes is called when it is checked; in the file its name is short.

    >>> scale_name("fc.weight")
    'fc.weight_scale'
    """
    return f"{weight}_scale"


def bias_name(weight: str, site: int) -> str:
    """Return the name of the bias of a weight's layer behind one site, where the model's own bias has other users.

    >>> bias_name("fc.weight", 3)
    'fc.weight_bias3'
    """
    return f"{weight}_bias{site}"


def offset_name(weight: str, site: int) -> str:
    """Return the name of what a free offset adds to a product, where it is added behind the product.

    >>> offset_name("fc.weight", 3)
    'fc.weight_offset3'
    """
    return f"{weight}_offset{site}"


def part_name(weight: str, axis: int, part: int) -> str:
    """Return the name of a part of a weight that is written in parts.

    >>> part_name("fc.weight", 0, 2), part_name("fc.weight", 1, 2)
    ('fc.weight[2]', 'fc.weight[:,2]')
    """
    return f"{weight}[{':,' * axis}{part}]"


def part_of(name: str) -> tuple[str, int, int] | None:
    """Return what a name was made of by `part_name`; None for other names.

    >>> part_of("fc.weight[:,2]"), part_of("fc.weight")
    (('fc.weight', 1, 2), None)
    """
    found = _PART.fullmatch(name)
    return (found[1], found[2].count(":"), int(found[3])) if found else None


def reserved_names(weights: Iterable[str], sites: int) -> set[str]:
    """Return every name that a file for integer compute may look up, so that no short name takes one.

    >>> sorted(reserved_names(["w"], 1))
    ['q0', 's0', 'w_bias0', 'w_offset0', 'z0']
    """
    names = {text(site) for text in (code_name, code_scale_name, code_zero_point_name) for site in range(sites)}
    for weight in weights:
        names |= {text(weight, i) for text in (bias_name, offset_name) for i in range(sites)}
    return names
