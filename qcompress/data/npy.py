"""Arrays from .npy and .npz files of untrusted origin: every header is checked against the bytes that are there.

numpy's own reader allocates what a header claims before it looks at the file. Here numpy parses the header only, from a
bounded piece of the file; memory is allocated, and elements are mapped or read, once the claim fits. Nothing is
unpickled.
Messages leave out the file's name, which the caller puts before them.
"""

import contextlib
import io
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Literal, final

import numpy as np
import numpy.lib.format
import numpy.typing as npt

from qcompress.data.arrays import check_layout
from qcompress.errors import DataError, did_you_mean
from qcompress.zip_archive import MAX_RATIO, ZipArchive

MAGIC: Final = b"\x93NUMPY"
ZIP_MAGIC: Final = (b"PK\x03\x04", b"PK\x05\x06")
MAX_HEADER: Final = 10_000  # numpy's own limit
MAX_ARRAYS: Final = 10_000
# Arrays that compress very well, masks for example, may unpack to this many bytes, or to MAX_RATIO times the file.
FREE_BYTES: Final = 1 << 30
_CHUNK: Final = 1 << 24
# Version 3.0 differs from 2.0 in the encoding of the names of record fields only, and no records are read.
_PARSERS: Final = {
    (1, 0): numpy.lib.format.read_array_header_1_0,
    (2, 0): numpy.lib.format.read_array_header_2_0,
    (3, 0): numpy.lib.format.read_array_header_2_0,
}


@final
@dataclass(frozen=True, slots=True)
class Header:
    """The contents of a .npy header.

    Args:
        dtype: of the elements.
        shape: lengths of the axes.
        fortran: whether the elements are in column-major order.
        offset: bytes before the elements.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, as the header claims."""
        return math.prod(self.shape) * self.dtype.itemsize


def map_npy(path: Path, name: str) -> npt.NDArray[Any]:
    """Map the array of a .npy file: its elements are read when they are used.

    Args:
        path: the file.
        name: the array's name in messages.

    Raises:
        DataError: the file is damaged or truncated, or holds no batch of numbers.
    """
    with _damage(name), path.open("rb") as f:
        header = _read_header(f, name)
        check_layout(name, header.dtype, header.shape)
        _check_nbytes(header, path.stat().st_size, name)
        order = "F" if header.fortran else "C"
        mapped = np.memmap(path, header.dtype, "r", header.offset, header.shape, order)  # type: ignore[call-overload]
        return _native(np.asarray(mapped))


@final
class Npz:
    """The arrays of a .npz file, by name.

    Args:
        path: the file; it starts like a zip.

    Raises:
        DataError: the archive is refused, or holds no arrays.
    """

    def __init__(self, path: Path) -> None:
        free_nbytes = max(FREE_BYTES, MAX_RATIO * path.stat().st_size)
        self._archive = ZipArchive(path, label="the archive", error=DataError, free_nbytes=free_nbytes)
        members = self._archive.names
        self._members = {name.removesuffix(".npy"): name for name in members if name.endswith(".npy")}
        if not self._members:
            found = f"{len(members)} members, but no .npy among them" if members else "nothing"
            raise DataError(f"the archive must hold arrays, as numpy.savez writes them, got {found}.")
        if len(self._members) > MAX_ARRAYS:
            raise DataError(
                f"the archive is refused: it has {len(self._members)} arrays, but at most {MAX_ARRAYS} are read."
            )

    @property
    def keys(self) -> list[str]:
        """Names of the arrays, in the file's order."""
        return list(self._members)

    def header(self, key: str) -> Header:
        """The header of one array, whose elements are not read.

        Raises:
            DataError: there is no such array, or it is damaged.
        """
        if key not in self._members:
            there = ", ".join(self.keys[:20])
            raise DataError(f"there is no array {key!r}; it holds {there}.{did_you_mean(key, self.keys)}")
        member = self._members[key]
        with _damage(key), self._archive.open(member) as f:
            header = _read_header(f, key)
        _check_nbytes(header, self._archive.nbytes(member), key)
        return header

    def read(self, keys: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
        """Return the named arrays: those that are stored uncompressed are mapped, others are read into memory.

        Raises:
            DataError: one is missing or damaged, or is no batch of numbers.
        """
        headers = {key: self.header(key) for key in dict.fromkeys(keys)}
        for key, header in headers.items():
            check_layout(key, header.dtype, header.shape)
        return {key: self._read(key, header) for key, header in headers.items()}

    def _read(self, key: str, header: Header) -> npt.NDArray[Any]:
        order: Literal["F", "C"] = "F" if header.fortran else "C"
        mapped = self._archive.mapped(self._members[key])
        if mapped is not None:
            return _native(mapped[header.offset :].view(header.dtype).reshape(header.shape, order=order))
        with _damage(key), self._archive.open(self._members[key]) as f:
            f.read(header.offset)
            flat = np.empty(math.prod(header.shape), header.dtype)
            space = flat.view(np.uint8).data
            done = 0
            while done < len(space):
                piece = f.read(min(_CHUNK, len(space) - done))
                if not piece:
                    raise EOFError("the file ends within it")
                space[done : done + len(piece)] = piece
                done += len(piece)
        return _native(flat.reshape(header.shape, order=order))


def _read_header(f: IO[bytes], name: str) -> Header:
    """Parse the header at the start of a stream, which is left at an unspecified position."""
    start = io.BytesIO(f.read(MAX_HEADER + 12))  # 12: magic, version, length
    try:
        parse = _PARSERS[numpy.lib.format.read_magic(start)]
    except (ValueError, KeyError):
        raise DataError(
            f"array {name!r} is not in numpy's .npy format: save it again with numpy.save or numpy.savez."
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about Python 2, odd escapes and old names of dtypes
            shape, fortran, dtype = parse(start, max_header_size=MAX_HEADER)
        is_shape = len(shape) <= 32 and all(type(n) is int and n >= 0 for n in shape)
    except Exception:  # a hostile header makes numpy, ast and tokenize fail in many ways
        is_shape = False
    if not is_shape:
        raise DataError(f"array {name!r} is damaged: its header cannot be read. Save it again.")
    return Header(dtype, shape, fortran, start.tell())


def _check_nbytes(header: Header, nbytes: int, name: str) -> None:
    if header.dtype.kind in "OV":
        return  # refused because of their dtype, whatever their size
    if header.offset + header.nbytes != nbytes:
        raise DataError(
            f"array {name!r} is truncated or damaged: its header, {header.dtype} of shape {list(header.shape)}, "
            f"asks for {header.nbytes} bytes, there are {nbytes - header.offset}. Copy or save the file again."
        )


def _native(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values.astype(values.dtype.newbyteorder("="), copy=False)


@contextlib.contextmanager
def _damage(name: str) -> Iterator[None]:
    """Turn what numpy and the system raise over a damaged file into one message."""
    try:
        yield
    except DataError:
        raise
    except (EOFError, ValueError) as e:
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise DataError(f"array {name!r} is truncated or damaged ({reason}). Copy or save the file again.") from None
    except MemoryError:
        raise DataError(f"array {name!r} does not fit into memory: save fewer samples.") from None
    except OSError as e:
        raise DataError(f"array {name!r} cannot be read: {e.strerror or e}.") from None
