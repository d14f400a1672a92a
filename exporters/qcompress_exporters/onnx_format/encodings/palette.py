"""A palettized weight as nodes that decode it: codes through one of the encodings, LUT, scale, shape."""

from typing import Final

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from qcompress.artifacts import PalettizedWeight, granularity
from qcompress.artifacts.base import Floats, Halves, Int8s, along_axis, broadcast_scale
from qcompress_exporters.onnx_format.encodings.base import Codes, Encoding, GraphWriter, looked_up, shaped
from qcompress_exporters.onnx_format.encodings.native import Native
from qcompress_exporters.onnx_format.encodings.planes import Planes
from qcompress_exporters.onnx_format.encodings.words import Words

# In order of preference; a new encoding is a file and a line here. `words` and `planes` write any width at any opset.
ENCODINGS: Final[tuple[Encoding, ...]] = (Native(), Words(), Planes())


def choose(bits: int, opset: int) -> Encoding:
    """Return the first encoding that can write `bits` at `opset`.

    >>> choose(4, 21).name, choose(4, 18).name, choose(3, 18).name, choose(7, 25).name
    ('native', 'words', 'planes', 'planes')
    """
    return next(e for e in ENCODINGS if (needs := e.opset(bits)) is not None and needs <= opset)


def write_palette(writer: GraphWriter, weight: PalettizedWeight, name: str, encoding: Encoding) -> None:
    """Write the nodes and initializers that decode a weight into the value `name`.

    Args:
        writer: takes them.
        weight: any palettized weight.
        name: what the decoded value is called.
        encoding: can write `weight.bits`.
    """
    value = _lookups(writer, weight, weight.lut, encoding, widen=weight.lut.dtype != np.float32)
    if weight.scale is not None:
        axis = weight.axis if weight.vector_dim > 1 else 0
        value = writer.node("Mul", [value, writer.tensor(broadcast_scale(weight.scale, weight.shape, axis))])
    _transposed(writer, weight, value)
    writer.name_last(name)


def write_int8_palette(
    writer: GraphWriter, weight: PalettizedWeight, lut: Int8s, name: str, encoding: Encoding
) -> None:
    """Write the nodes and initializers that look a weight up in int8 tables, as the int8 value `name`.

    Args:
        writer: takes them.
        weight: any palettized weight; its scale is left out.
        lut: int8, in the shape of its own.
        name: what the value is called.
        encoding: can write `weight.bits`.
    """
    _transposed(writer, weight, _lookups(writer, weight, lut, encoding))
    writer.name_last(name)


def _lookups(
    writer: GraphWriter,
    weight: PalettizedWeight,
    lut: Floats | Halves | Int8s,
    encoding: Encoding,
    *,
    widen: bool = False,
) -> str:
    """The entries that the codes point to, output channels first unless they are vectors; widened to float32."""

    def table(values: Floats | Halves | Int8s) -> str:
        written = writer.tensor(values)
        return writer.node("Cast", [written], to=TensorProto.FLOAT) if widen else written

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


def _transposed(writer: GraphWriter, weight: PalettizedWeight, value: str) -> None:
    """A value with the output channels first, in the weight's own order of axes."""
    if weight.vector_dim == 1 and weight.axis != 0:
        order = [*range(1, weight.axis + 1), 0, *range(weight.axis + 1, weight.codes.ndim)]
        writer.node("Transpose", [value], perm=order)


def _equal_groups(writer: GraphWriter, lut: str, groups: int, codes: Codes, bits: int, encoding: Encoding) -> str:
    """One table per group of equally many channels: GatherElements, the fastest to load."""
    value = _codes(writer, bits, codes.reshape(groups, -1), encoding)
    return shaped(writer, writer.node("GatherElements", [lut, value], axis=1), codes.size, codes.shape)


def _any_groups(
    writer: GraphWriter, luts: str, offset_O: npt.NDArray[np.int32], codes: Codes, bits: int, encoding: Encoding
) -> str:
    """One table per group, the last group shorter: each channel's offset into the joined tables is added."""
    offset = writer.constant(along_axis(offset_O, codes.ndim, 0))
    return writer.node("Gather", [luts, writer.node("Add", [_codes(writer, bits, codes, encoding), offset])])


def _codes(writer: GraphWriter, bits: int, codes: Codes, encoding: Encoding) -> str:
    """int32 codes in their own shape."""
    value = encoding.codes(writer, codes, bits)
    if encoding.exact(bits):
        return value
    return shaped(writer, value, codes.size + encoding.padding(codes.size, bits), codes.shape)


def _full_lut(lut: Floats | Halves | Int8s, bits: int) -> Floats | Halves | Int8s:
    """The LUT with 2**bits entries: decode tables name every code, used or not."""
    missing = (1 << bits) - len(lut)
    return np.concatenate([lut, np.repeat(lut[-1:], missing, axis=0)]) if missing else lut
