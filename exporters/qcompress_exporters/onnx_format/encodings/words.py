"""Words of whole codes, expanded through a table: Gather(LUT, table) -> Gather(that, word).

A word is a byte (1, 2, 4, 8 bits: any opset), or a byte and a second plane of UINT4 (3 bits: 4 codes in 12 bits;
6 bits: 2 in 12) or UINT2 (5 bits: 2 in 10). One lookup yields all codes of a word, so this loads fastest. Small tensors
have no second plane: their words are rows of UINT4 or UINT2 digits, put together by a MatMul, which takes 60 bytes less
of protobuf and, measured at 17 million weights, twice the time to load.
"""

from typing import ClassVar, Final, final

import numpy as np
import onnx_ir as ir

from qcompress.artifacts.base import Int8s
from qcompress_exporters.onnx_format.graph_writer import Codes, GraphWriter
from qcompress_exporters.onnx_format.targets import BASE_OPSET, UINT2_OPSET, UINT4_OPSET

# bits -> (codes in a word, bits of the word beyond the byte)
_LAYOUT: Final = {1: (8, 0), 2: (4, 0), 3: (4, 4), 4: (2, 0), 5: (2, 2), 6: (2, 4), 8: (1, 0)}
SMALL: Final = 1 << 20  # codes
_OPSET: Final = {0: BASE_OPSET, 2: UINT2_OPSET, 4: UINT4_OPSET}


@final
class Words:
    """Codes as words; see the module."""

    name: ClassVar[str] = "words"

    def opset(self, bits: int) -> int | None:
        """Return the lowest opset of all for whole bytes, else that of the second plane's type; None for 7 bits."""
        return _OPSET[_LAYOUT[bits][1]] if bits in _LAYOUT else None

    def exact(self, bits: int) -> bool:
        """Return whether a code is a byte."""
        return bits == 8

    def padding(self, count: int, bits: int) -> int:
        """Return how many elements the last word has beyond the codes."""
        return -count % _LAYOUT[bits][0]

    def codes(self, writer: GraphWriter, codes: Codes, bits: int) -> ir.Value:
        """Write codes; return them as int32."""
        word = self._word(writer, codes, bits)
        return word if bits == 8 else writer.node("Gather", [self._table(writer, bits), word])

    def cast(self, writer: GraphWriter, codes: Codes | Int8s, bits: int, to: ir.DataType) -> ir.Value | None:
        """Write bytes and return them as numbers of a type; None where words hold several codes."""
        if bits < 8:
            return None
        if to == ir.DataType.INT8:  # no byte is above 127
            return writer.tensor(codes.astype(np.int8))
        return writer.node("Cast", [writer.tensor(codes)], to=to)

    def lookup(self, writer: GraphWriter, codes: Codes, bits: int, lut: ir.Value) -> ir.Value:
        """Write codes; return lut[codes]."""
        word = self._word(writer, codes, bits)
        return writer.node(
            "Gather", [lut if bits == 8 else writer.node("Gather", [lut, self._table(writer, bits)]), word]
        )

    def _table(self, writer: GraphWriter, bits: int) -> ir.Value:
        per_word, beyond = _LAYOUT[bits]
        return writer.table(bits, 256 << beyond, per_word)

    def _word(self, writer: GraphWriter, codes: Codes, bits: int) -> ir.Value:
        if bits == 8:
            return writer.to_int(writer.tensor(codes))
        per_word, beyond = _LAYOUT[bits]
        padded = np.zeros(codes.size + self.padding(codes.size, bits), np.uint16)
        padded[: codes.size] = codes.ravel()
        shifts = bits * np.arange(per_word, dtype=np.uint16)
        words = np.bitwise_or.reduce(padded.reshape(-1, per_word) << shifts, axis=1)
        if not beyond:
            return writer.to_int(writer.tensor(words.astype(np.uint8)))
        if codes.size < SMALL:
            places = beyond * np.arange((8 + beyond) // beyond)
            digits = (words[:, None] >> places & (1 << beyond) - 1).astype(np.uint8)
            value = writer.to_int(writer.packed(digits, beyond, digits.shape))
            return writer.node("MatMul", [value, writer.constant((1 << places).astype(np.int32))])
        low = writer.to_int(writer.tensor((words & 0xFF).astype(np.uint8)))
        high = writer.to_int(writer.packed((words >> 8).astype(np.uint8), beyond, [words.size]))
        return writer.node("Add", [low, writer.node("Mul", [high, writer.constant(np.array(256, np.int32))])])
