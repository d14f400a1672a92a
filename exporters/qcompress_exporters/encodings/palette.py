"""A palettized weight as nodes that decode it: codes through one of the encodings, LUT, scale, shape."""

from typing import Final

import numpy as np

from qcompress import granularity
from qcompress.artifacts import Floats, PalettizedWeight, along_axis
from qcompress_exporters.encodings.base import Codes, Encoding, GraphWriter
from qcompress_exporters.encodings.native import Native
from qcompress_exporters.encodings.planes import Planes
from qcompress_exporters.encodings.words import Words

# In order of preference; a new encoding is a file and a line here. `planes` writes any width at any opset.
ENCODINGS: Final[tuple[Encoding, ...]] = (Native(), Words(), Planes())


def choose(bits: int, opset: int) -> Encoding:
    """The first encoding that can write `bits` at `opset`.

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
    if weight.vector_dim > 1:
        value = _one_lut(writer, weight, weight.codes, weight.shape, encoding)
    else:
        codes = np.moveaxis(weight.codes, weight.axis, 0) if weight.codes.ndim else weight.codes
        groups, channels = weight.lut.shape[0], codes.shape[0] if codes.ndim else 1
        if groups == 1:
            value = _one_lut(writer, weight, codes, codes.shape, encoding)
        elif channels == groups * (weight.rows_per_lut or channels):
            value = _equal_groups(writer, weight, codes, encoding)
        else:
            value = _any_groups(writer, weight, codes, encoding)
        if weight.scale is not None:
            value = writer.node("Mul", [value, writer.tensor(along_axis(weight.scale, codes.ndim, 0))])
        if weight.axis != 0:
            order = [*range(1, weight.axis + 1), 0, *range(weight.axis + 1, codes.ndim)]
            writer.node("Transpose", [value], perm=order)
    writer.name_last(name)


def _one_lut(
    writer: GraphWriter, weight: PalettizedWeight, codes: Codes, shape: tuple[int, ...], encoding: Encoding
) -> str:
    """One table for the whole tensor: the codes of a word are looked up at once."""
    lut = writer.tensor(_full_lut(weight.lut[0], weight.bits))
    value = encoding.lookup(writer, codes, weight.bits, lut)
    if encoding.exact(weight.bits) and weight.vector_dim == 1:
        return value
    padded = (codes.size + encoding.padding(codes.size, weight.bits)) * weight.vector_dim
    return _shaped(writer, value, padded, shape)


def _equal_groups(writer: GraphWriter, weight: PalettizedWeight, codes: Codes, encoding: Encoding) -> str:
    """One table per group of equally many channels: GatherElements, the fastest to load."""
    grouped = codes.reshape(weight.lut.shape[0], -1)
    value = _codes(writer, weight.bits, grouped, encoding)
    value = writer.node("GatherElements", [writer.tensor(weight.lut), value], axis=1)
    return _shaped(writer, value, grouped.size, codes.shape)


def _any_groups(writer: GraphWriter, weight: PalettizedWeight, codes: Codes, encoding: Encoding) -> str:
    """One table per group, the last group shorter: each channel's offset into the joined tables is added."""
    entries = weight.lut.shape[1]
    group_O = granularity.group_of_row(codes.shape[0], weight.rows_per_lut)
    offset = along_axis((group_O * entries).astype(np.int32), codes.ndim, 0)
    value = writer.node("Add", [_codes(writer, weight.bits, codes, encoding), writer.constant(offset)])
    return writer.node("Gather", [writer.tensor(weight.lut.ravel()), value])


def _codes(writer: GraphWriter, bits: int, codes: Codes, encoding: Encoding) -> str:
    """int32 codes in their own shape."""
    value = encoding.codes(writer, codes, bits)
    if encoding.exact(bits):
        return value
    return _shaped(writer, value, codes.size + encoding.padding(codes.size, bits), codes.shape)


def _shaped(writer: GraphWriter, value: str, count: int, shape: tuple[int, ...]) -> str:
    """The first elements of a value of `count` elements, in the given shape."""
    wanted = int(np.prod(shape))
    if count != wanted:
        value = writer.node("Reshape", [value, writer.shape([-1])])
        value = writer.node("Slice", [value, writer.shape([0]), writer.shape([wanted])])
    return writer.node("Reshape", [value, writer.shape(shape)])


def _full_lut(lut: Floats, bits: int) -> Floats:
    """The LUT with 2**bits entries: decode tables name every code, used or not."""
    missing = (1 << bits) - len(lut)
    return np.concatenate([lut, np.repeat(lut[-1:], missing, axis=0)]) if missing else lut
