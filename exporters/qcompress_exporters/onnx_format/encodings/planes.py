"""Words of several codes, spread over byte planes: for 3, 5, 6 and 7 bits, which do not divide a byte.

A word is 4 codes of 3 bits, or 2 codes of 5, 6 or 7 bits: 12, 10, 12 or 14 bits. Its low byte is in the first plane;
the rest is in planes of 4 and of 2 bits, packed into bytes, which tables unpack. One lookup yields all codes of a word.
Every runtime reads this. To multiply digits by their places and add them up would take fewer bytes, but MNN multiplies
integer matrices wrong.
"""

import math
from typing import ClassVar, Final, NamedTuple, final

import numpy as np
import onnx_ir as ir

from qcompress.artifacts.base import Int8s
from qcompress.artifacts.packing import Words, pack, to_planes
from qcompress_exporters.onnx_format.graph_writer import Codes, GraphWriter
from qcompress_exporters.onnx_format.opsets import BASE_OPSET


class _Plane(NamedTuple):
    """A plane beyond the low byte.

    Args:
        width: bits of a word in it.
        shift: place of the lowest of them in the word.
        per_byte: shape of the words that a byte of it belongs to.
    """

    width: int
    shift: int
    per_byte: tuple[int, ...]


class _Layout(NamedTuple):
    """How codes of one width are laid out.

    Args:
        codes: codes in a word.
        planes: beyond the low byte.
    """

    codes: int
    planes: tuple[_Plane, ...]

    @property
    def row(self) -> tuple[int, ...]:
        """Shape of the words that share a byte of the narrowest plane."""
        return self.planes[-1].per_byte


_LAYOUTS: Final = {
    3: _Layout(4, (_Plane(4, 8, (2,)),)),
    5: _Layout(2, (_Plane(2, 8, (4,)),)),
    6: _Layout(2, (_Plane(4, 8, (2,)),)),
    7: _Layout(2, (_Plane(4, 8, (2,)), _Plane(2, 12, (2, 2)))),
}


@final
class Planes:
    """See the module."""

    name: ClassVar[str] = "planes"
    why: ClassVar[str] = "codes do not pack evenly into bytes"

    def opset(self, bits: int) -> int | None:
        """Return the base opset for widths that do not divide a byte; None for others."""
        return BASE_OPSET if bits in _LAYOUTS else None

    def exact(self, bits: int) -> bool:
        """Return False: codes come back in rows of words."""
        return False

    def padding(self, count: int, bits: int) -> int:
        """Return how many codes fill the last row of words."""
        layout = _LAYOUTS[bits]
        return -count % (layout.codes * math.prod(layout.row))

    def codes(self, writer: GraphWriter, codes: Codes, bits: int) -> ir.Value:
        """Write codes; return them as int32."""
        return writer.node("Gather", [_table(writer, bits), self._words(writer, codes, bits)])

    def cast(self, writer: GraphWriter, codes: Codes | Int8s, bits: int, to: ir.DataType) -> ir.Value | None:
        """Return None: codes come from a lookup."""
        return None

    def lookup(self, writer: GraphWriter, codes: Codes, bits: int, lut: ir.Value) -> ir.Value:
        """Write codes; return lut[codes]."""
        expanded = writer.node("Gather", [lut, _table(writer, bits)])
        return writer.node("Gather", [expanded, self._words(writer, codes, bits)])

    def _words(self, writer: GraphWriter, codes: Codes, bits: int) -> ir.Value:
        """Write the words of codes; return them as int32, [rows, *layout.row]."""
        layout = _LAYOUTS[bits]
        words = _words(codes, bits, self.padding(codes.size, bits)).reshape(-1, *layout.row)
        low, *beyond = to_planes(words, (8, *(plane.width for plane in layout.planes)))
        value = writer.to_int(writer.tensor(low))
        for (width, shift, per_byte), digits in zip(layout.planes, beyond, strict=True):
            packed = pack(digits, width).reshape(words.shape[: words.ndim - len(per_byte)])
            table = writer.table(width, 256, per_byte, shift)
            value = writer.node("Add", [value, writer.node("Gather", [table, writer.to_int(writer.tensor(packed))])])
        return value


def _table(writer: GraphWriter, bits: int) -> ir.Value:
    """Return the table of all words: int32 [words, codes in each]."""
    return writer.table(bits, 1 << bits * _LAYOUTS[bits].codes, (_LAYOUTS[bits].codes,))


def _words(codes: Codes, bits: int, padding: int) -> Words:
    """Return codes put together into words, the first code in the lowest bits; zeros fill up the last row."""
    per_word = _LAYOUTS[bits].codes
    padded = np.zeros(codes.size + padding, np.uint16)
    padded[: codes.size] = codes.ravel()
    shifts = bits * np.arange(per_word, dtype=np.uint16)
    return np.asarray(np.bitwise_or.reduce(padded.reshape(-1, per_word) << shifts, axis=1))
