"""Codes of 1 to 8 bits to bytes and back, as exact inverse pairs.

The layout is LSB first: code i sits in bits [i*bits, (i+1)*bits) of the stream, and byte j holds bits [8j, 8j+8).
For 2 and 4 bits this is also the layout of ONNX's UINT2 and UINT4 tensors.

Codes of widths that do not divide 8 are put together into words, and words split into planes (`to_planes`): 4 codes of
3 bits into planes of 8 and 4 bits. Each plane is then packed by itself, and every plane's width divides 8, so that a
byte table decodes it.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from qcompress.errors import ConfigError

Codes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint16]

_WORD_BITS: Final = 16


def packed_nbytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take.

    >>> packed_nbytes(5, 3)
    2
    """
    return -(-count * bits // 8)


def pack(codes: Codes, bits: int) -> Codes:
    """Pack codes into bytes, LSB first.

    Args:
        codes: uint8, any shape, every value below 2**bits; read in row-major order.
        bits: width of a code, 1 to 8.

    Returns:
        uint8 [ceil(codes.size * bits / 8)]; unused bits of the last byte are 0.

    Raises:
        ConfigError: bits outside 1..8, or a code that does not fit.

    >>> pack(np.array([1, 2, 3, 0], np.uint8), 2).tolist()
    [57]
    """
    check_bits(bits)
    flat = np.asarray(codes).ravel()
    if flat.size and (int(flat.min()) < 0 or int(flat.max()) >> bits):
        wrong = int(flat.min()) if int(flat.min()) < 0 else int(flat.max())
        raise ConfigError(f"pack: every code must be in [0, 2**{bits} = {1 << bits}), got {wrong}.")
    flat = flat.astype(np.uint8)
    if bits == 8:
        return flat
    if 8 % bits == 0:
        per = 8 // bits
        padded = np.zeros(-(-flat.size // per) * per, np.uint8)
        padded[: flat.size] = flat
        shifted = padded.reshape(-1, per) << (bits * np.arange(per, dtype=np.uint8))
        merged: Codes = np.bitwise_or.reduce(shifted, axis=1)
        return merged
    stream = np.unpackbits(flat[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(stream.ravel(), bitorder="little")


def unpack(packed: Codes, bits: int, count: int) -> Codes:
    """The exact inverse of `pack`.

    Args:
        packed: uint8 [ceil(count * bits / 8)].
        bits: width of a code, 1 to 8.
        count: number of codes.

    Returns:
        uint8 [count].

    Raises:
        ConfigError: bits outside 1..8, or a byte count that does not belong to `count` codes.

    >>> unpack(np.array([57], np.uint8), 2, 4).tolist()
    [1, 2, 3, 0]
    """
    check_bits(bits)
    packed = np.asarray(packed, np.uint8).ravel()
    if packed.size != packed_nbytes(count, bits):
        raise ConfigError(
            f"unpack: {count} codes of {bits} bits take {packed_nbytes(count, bits)} bytes, got {packed.size}."
        )
    if bits == 8:
        return packed.copy()
    if 8 % bits == 0:
        shifts = bits * np.arange(8 // bits, dtype=np.uint8)
        return ((packed[:, None] >> shifts) & np.uint8((1 << bits) - 1)).ravel()[:count]
    stream = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
    return np.packbits(stream, axis=1, bitorder="little").ravel()


def to_planes(words: Codes | Words, widths: Sequence[int]) -> list[Codes]:
    """Split codes, or words of several codes, into planes of the given widths, lowest bits first.

    Args:
        words: uint8 or uint16, any shape.
        widths: bits of each plane, 1 to 8; their sum is the width of a word, at most 16.

    Returns:
        One uint8 array per plane, in the shape of `words`.

    >>> [p.tolist() for p in to_planes(np.array([5, 2], np.uint8), (2, 1))]
    [[1, 2], [1, 0]]
    """
    _check_widths(widths)
    shifts = np.cumsum([0, *widths[:-1]])
    wide = words.astype(np.uint16)
    return [
        (wide >> np.uint16(shift) & np.uint16((1 << width) - 1)).astype(np.uint8)
        for shift, width in zip(shifts, widths, strict=True)
    ]


def from_planes(planes: Sequence[Codes], widths: Sequence[int]) -> Words:
    """Put planes together; the exact inverse of `to_planes`.

    >>> from_planes([np.array([1, 2], np.uint8), np.array([1, 0], np.uint8)], (2, 1)).tolist()
    [5, 2]
    """
    _check_widths(widths)
    words, shift = np.zeros(planes[0].shape, np.uint16), 0
    for plane, width in zip(planes, widths, strict=True):
        words |= plane.astype(np.uint16) << np.uint16(shift)
        shift += width
    return words


def _check_widths(widths: Sequence[int]) -> None:
    for width in widths:
        check_bits(width)
    if sum(widths) > _WORD_BITS:
        raise ConfigError(f"a word must have at most {_WORD_BITS} bits, got planes of {' + '.join(map(str, widths))}.")


def check_bits(bits: int) -> None:
    """Raise ConfigError unless `bits` is a width that a code can have."""
    if not 1 <= bits <= 8:
        raise ConfigError(f"bits must be in [1, 8], got {bits!r}.")
