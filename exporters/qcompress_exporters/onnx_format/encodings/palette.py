"""A palettized weight as nodes that decode it: codes through one of the encodings, LUT, scale, shape."""

from typing import final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompress.artifacts import PalettizedWeight, granularity
from qcompress.artifacts.base import Floats, Halves, Int8s, along_axis, broadcast_scale
from qcompress_exporters.onnx_format.encodings.base import Encoding, looked_up, shaped
from qcompress_exporters.onnx_format.encodings.codes import choose
from qcompress_exporters.onnx_format.encodings.formats import Written
from qcompress_exporters.onnx_format.graph_writer import Codes, GraphWriter


@final
class Palette:
    """Writes palettized weights."""

    def write(self, writer: GraphWriter, weight: PalettizedWeight, opset: int) -> Written:
        """Write a weight; see `WeightFormat`."""
        encoding = choose(weight.bits, opset)
        return Written(write_palette(writer, weight, encoding), encoding.name)

    def write_int8(self, writer: GraphWriter, weight: PalettizedWeight, opset: int) -> Written:
        """Write what a weight's codes point to in tables of integers; see `WeightFormat`."""
        encoding, found = choose(weight.bits, opset), weight.integer_lut()
        assert found is not None
        if weight.bits == 8 and weight.vector_dim == 1:  # the integers take no more than the codes, and need no table
            value = writer.tensor(weight.looked_up(found[0]))
        else:
            value = _in_own_order(writer, weight, _lookups(writer, weight, found[0], encoding))
        return Written(value, encoding.name)


def write_palette(writer: GraphWriter, weight: PalettizedWeight, encoding: Encoding) -> ir.Value:
    """Write what decodes a weight.

    Args:
        writer: of the graph.
        weight: any palettized weight.
        encoding: can write `weight.bits`.
    """
    value = _lookups(writer, weight, weight.lut, encoding, widen=weight.lut.dtype != np.float32)
    if weight.scale is not None:
        axis = weight.axis if weight.vector_dim > 1 else 0
        value = writer.node("Mul", [value, writer.tensor(broadcast_scale(weight.scale, weight.shape, axis))])
    return _in_own_order(writer, weight, value)


def _lookups(
    writer: GraphWriter,
    weight: PalettizedWeight,
    lut: Floats | Halves | Int8s,
    encoding: Encoding,
    *,
    widen: bool = False,
) -> ir.Value:
    """Write what the codes point to, output channels first unless they are vectors; `widen`: as float32."""

    def table(values: Floats | Halves | Int8s) -> ir.Value:
        written = writer.tensor(values)
        return writer.node("Cast", [written], to=ir.DataType.FLOAT) if widen else written

    codes = weight.codes
    if weight.vector_dim > 1:
        full = table(_full_lut(lut[0], weight.bits))
        return looked_up(writer, encoding, codes, weight.bits, full, weight.shape, weight.vector_dim)
    if codes.ndim:
        codes = np.moveaxis(codes, weight.axis, 0)
    groups, channels = lut.shape[0], codes.shape[0] if codes.ndim else 1
    if groups == 1:  # one table for the whole tensor: the codes of a word are looked up at once
        return looked_up(writer, encoding, codes, weight.bits, table(_full_lut(lut[0], weight.bits)), codes.shape)
    if channels == groups * (weight.rows_per_lut or channels):
        return _equal_groups(writer, table(lut), groups, codes, weight.bits, encoding)
    group_O = granularity.group_of_row(channels, weight.rows_per_lut)
    offset_O = (group_O * lut.shape[1]).astype(np.int32)
    return _any_groups(writer, table(lut.ravel()), offset_O, codes, weight.bits, encoding)


def _in_own_order(writer: GraphWriter, weight: PalettizedWeight, value: ir.Value) -> ir.Value:
    """Write a value whose output channels come first in the weight's own order of axes."""
    if weight.vector_dim > 1 or weight.axis == 0:
        return value
    order = [*range(1, weight.axis + 1), 0, *range(weight.axis + 1, weight.codes.ndim)]
    return writer.node("Transpose", [value], perm=order)


def _equal_groups(
    writer: GraphWriter, lut: ir.Value, groups: int, codes: Codes, bits: int, encoding: Encoding
) -> ir.Value:
    """Write lookups in one table per group of equally many channels: GatherElements, the fastest to load."""
    value = _codes(writer, bits, codes.reshape(groups, -1), encoding)
    return shaped(writer, writer.node("GatherElements", [lut, value], axis=1), codes.size, codes.shape)


def _any_groups(
    writer: GraphWriter, luts: ir.Value, offset_O: npt.NDArray[np.int32], codes: Codes, bits: int, encoding: Encoding
) -> ir.Value:
    """Write lookups in one table per group, the last group shorter: each channel adds its offset into all tables."""
    offset = writer.constant(along_axis(offset_O, codes.ndim, 0))
    return writer.node("Gather", [luts, writer.node("Add", [_codes(writer, bits, codes, encoding), offset])])


def _codes(writer: GraphWriter, bits: int, codes: Codes, encoding: Encoding) -> ir.Value:
    """Write codes; return them as int32 in their own shape."""
    value = encoding.codes(writer, codes, bits)
    if encoding.exact(bits):
        return value
    return shaped(writer, value, codes.size + encoding.padding(codes.size, bits), codes.shape)


def _full_lut(lut: Floats | Halves | Int8s, bits: int) -> Floats | Halves | Int8s:
    """Return the LUT with 2**bits entries: decode tables name every code, used or not."""
    missing = (1 << bits) - len(lut)
    return np.concatenate([lut, np.repeat(lut[-1:], missing, axis=0)]) if missing else lut
