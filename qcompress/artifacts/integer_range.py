"""The range of codes of a width."""

from dataclasses import dataclass

from qcompress.artifacts.packing import check_bits


@dataclass(frozen=True, slots=True)
class IntegerRange:
    """The codes [n, p] of a `bits`-wide grid, signed or not.

    >>> IntegerRange(4, signed=True).n, IntegerRange(4, signed=True).p
    (-8, 7)
    >>> IntegerRange(2, signed=False).p
    3
    """

    bits: int
    signed: bool

    def __post_init__(self) -> None:
        check_bits(self.bits)

    @property
    def n(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def p(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1
