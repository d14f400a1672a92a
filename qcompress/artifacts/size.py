"""Sizes in bytes: parsing and formatting, the ideal size of a compressed weight, and the sizes of a file.

kB, MB and GB are powers of 1000; KiB, MiB and GiB are powers of 1024.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Final, Protocol, final

from qcompress.artifacts.packing import check_bits, packed_nbytes
from qcompress.errors import ConfigError

_UNITS: Final = {
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "kib": 1024,
    "mib": 1024**2,
    "gib": 1024**3,
}
_SIZE: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*")
_FLOAT32_NBYTES: Final = 4


def parse_size(text: str | int) -> int:
    """Return the bytes of a size as people write it; a fraction of a byte is dropped.

    Case does not matter where only bytes can be meant. `Mb` (bits by convention) and `150k` (1000 or 1024?) are
    refused, because they could make a limit wrong by a factor.

    Args:
        text: `150kB`, `1.5 MiB`, `1000`, or a whole number of bytes.

    Raises:
        ConfigError: the text is not a size, or negative, or its unit is ambiguous.

    >>> parse_size("150kB"), parse_size("1.5 MiB"), parse_size("1000"), parse_size(12)
    (150000, 1572864, 1000, 12)
    """
    if isinstance(text, int) and not isinstance(text, bool):
        if text < 0:
            raise ConfigError(f"A size must be at least 0 bytes, got {text!r}.")
        return text
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ConfigError(f"A size must read like 150kB, 1.5 MiB or 1000 (bytes), got {text!r}.")
    number, unit = match.groups()
    if unit.lower() in ("k", "m", "g"):
        raise ConfigError(
            f"The unit of {text!r} can mean 1000 or 1024; write {number}{_standard(unit + 'b')} "
            f"or {number}{_standard(unit + 'ib')}."
        )
    if unit.lower() not in _UNITS and unit:
        raise ConfigError(f"A size must be in B, kB, MB, GB, KiB, MiB or GiB, got {text!r}.")
    if unit.endswith("b") and not unit.islower():
        raise ConfigError(f"The unit of {text!r} reads as bits; write {number}{_standard(unit)} for bytes.")
    return int(Decimal(number) * _UNITS[unit.lower() or "b"])


def format_size(nbytes: int) -> str:
    """Return a size as text, in powers of 1000.

    >>> format_size(999), format_size(150_000), format_size(2_649_000)
    ('999 B', '150.0 kB', '2.65 MB')
    >>> format_size(999_960), format_size(1_234_000_000)
    ('1.00 MB', '1.23 GB')
    """
    if nbytes < 1000:
        return f"{nbytes} B"
    for unit, scale, digits in (("kB", 1000, 1), ("MB", 1000**2, 2)):
        text = f"{nbytes / scale:.{digits}f}"
        if float(text) < 1000:
            return f"{text} {unit}"
    return f"{nbytes / 1000**3:.2f} GB"


def palettized_nbytes(count: int, bits: int, *, groups: int = 1, vector_dim: int = 1, scales: int = 0) -> int:
    """Return the bytes of packed codes, float32 tables and float32 scales.

    A table has min(2**bits, number of its codes) entries, since more could not be used.

    Args:
        count: number of weights.
        bits: width of a code, 1 to 8.
        groups: number of tables.
        vector_dim: weights per code and floats per table entry.
        scales: number of per-channel scales.

    >>> palettized_nbytes(2304, 2), palettized_nbytes(10, 8), palettized_nbytes(0, 4)
    (592, 50, 0)
    """
    check_bits(bits)
    codes = -(-count // vector_dim)
    entries = min(1 << bits, -(-codes // groups))
    return packed_nbytes(codes, bits) + _FLOAT32_NBYTES * (groups * entries * vector_dim + scales)


def nbytes_at(count: int, bits: int, float_nbytes: int) -> int:
    """Return the bytes of a weight with one table for the whole tensor, or its float bytes if those are not more.

    >>> nbytes_at(2304, 2, 9216), nbytes_at(10, 8, 40)
    (592, 40)
    """
    return min(palettized_nbytes(count, bits), float_nbytes)


class _Stored(Protocol):
    @property
    def nbytes(self) -> int: ...


def ideal_nbytes(artifacts: Iterable[_Stored]) -> int:
    """Return the bytes of artifacts without any container: codes, tables, scales, biases and other float leftovers."""
    return sum(artifact.nbytes for artifact in artifacts)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SizeReport:
    """The sizes of a compressed file, in bytes.

    Args:
        ideal: codes, tables, scales and float leftovers, without any container.
        payload: all initializers of the file.
        file: the file.
        original: the stripped float file of the same graph.
        count: number of weights, including float leftovers.

    >>> report = SizeReport(ideal=700, payload=720, file=1000, original=8000, count=1920)
    >>> report.ratio, report.bits_per_weight, report.overhead
    (8.0, 3.0, 300)
    """

    ideal: int
    payload: int
    file: int
    original: int
    count: int

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than the original."""
        return self.original / max(1, self.file)

    @property
    def bits_per_weight(self) -> float:
        """Bits of payload per weight, including tables and scales."""
        return 8 * self.payload / max(1, self.count)

    @property
    def overhead(self) -> int:
        """Bytes that the file takes in addition to the ideal."""
        return self.file - self.ideal


def _standard(unit: str) -> str:
    """Return a unit in its standard spelling.

    >>> _standard("Kb"), _standard("mIb")
    ('kB', 'MiB')
    """
    lower = unit.lower()
    if lower == "b":
        return "B"
    return f"{lower[0].upper()}iB" if "i" in lower else f"{'k' if lower[0] == 'k' else lower[0].upper()}B"
