"""Arrays from .npy and .npz files that nobody vouches for: every header is checked against the bytes that are there.

Numpy's own reader allocates what a header claims before it looks; here nothing is allocated, and nothing unpickled,
until the claim fits the file. Messages leave out the file's name, which the caller puts before them.
"""

import ast
import contextlib
import math
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, final

import numpy as np
import numpy.typing as npt

from qcompress.data.arrays import check_layout
from qcompress.errors import DataError, did_you_mean

MAGIC: Final = b"\x93NUMPY"
ZIP_MAGIC: Final = (b"PK\x03\x04", b"PK\x05\x06")
MAX_HEADER: Final = 10_000  # as numpy's own limit
MAX_MEMBERS: Final = 10_000
# Packed arrays may be large or compress well; both at once is a bomb.
MAX_RATIO: Final = 200
FREE_BYTES: Final = 1 << 30
_CHUNK: Final = 1 << 24


@final
@dataclass(frozen=True, slots=True)
class Header:
    """What a .npy header says.

    Args:
        dtype: the elements.
        shape: the axes.
        fortran: whether the first axis is the fastest one.
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
    """The array of a .npy file, mapped: its elements are read when they are used.

    Args:
        path: the file.
        name: what messages call the array.

    Raises:
        DataError: the file is damaged, truncated, or holds no batch of numbers.
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
        DataError: the archive is damaged or not one that numpy writes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with _damage("the archive"), zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
        if len(infos) > MAX_MEMBERS:
            raise DataError(f"the archive is refused: {len(infos)} members, at most {MAX_MEMBERS} are read.")
        arrays = [info for info in infos if info.filename.endswith(".npy")]
        self._infos = {info.filename.removesuffix(".npy"): info for info in arrays}
        if len(self._infos) < len(arrays):
            raise DataError("the archive is refused: two of its arrays have the same name. Save it again.")
        if not arrays:
            found = f"{len(infos)} members, none of them a .npy" if infos else "nothing"
            raise DataError(f"the archive must hold arrays, as numpy.savez writes them, got {found}.")

    @property
    def keys(self) -> list[str]:
        """Names of the arrays, in the file's order."""
        return list(self._infos)

    def header(self, key: str) -> Header:
        """What one array is, without reading it.

        Raises:
            DataError: there is no such array, or it is damaged.
        """
        if key not in self._infos:
            there = ", ".join(self.keys[:20])
            raise DataError(f"there is no array {key!r}; it holds {there}.{did_you_mean(key, self.keys)}")
        info = self._infos[key]
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"array {key!r} is encrypted or packed in an unusual way: save it with numpy.savez.")
        with _damage(key), zipfile.ZipFile(self._path) as archive, archive.open(info) as f:
            header = _read_header(f, key)
        _check_nbytes(header, info.file_size, key)
        return header

    def read(self, keys: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
        """The named arrays, each read once.

        Raises:
            DataError: one is missing, damaged, no batch of numbers, or all together unpack to far too much.
        """
        headers = {key: self.header(key) for key in dict.fromkeys(keys)}
        for key, header in headers.items():
            check_layout(key, header.dtype, header.shape)
        total, limit = sum(h.nbytes for h in headers.values()), self._path.stat().st_size * MAX_RATIO
        if total > max(limit, FREE_BYTES):
            raise DataError(
                f"the archive is refused: its arrays would unpack to {total} bytes, more than {MAX_RATIO} times the "
                "file. If that is meant, save it unpacked with numpy.savez."
            )
        return {key: self._read(key, header) for key, header in headers.items()}

    def _read(self, key: str, header: Header) -> npt.NDArray[Any]:
        with _damage(key), zipfile.ZipFile(self._path) as archive, archive.open(self._infos[key]) as f:
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
        return _native(flat.reshape(header.shape, order="F" if header.fortran else "C"))


def _read_header(f: IO[bytes], name: str) -> Header:
    magic = f.read(8)
    if len(magic) < 8 or not magic.startswith(MAGIC) or magic[6] not in (1, 2, 3):
        raise DataError(f"array {name!r} is not in numpy's .npy format: save it again with numpy.save or numpy.savez.")
    width = 2 if magic[6] == 1 else 4
    length = int.from_bytes(f.read(width), "little")
    text = f.read(min(length, MAX_HEADER))
    try:
        if len(text) < length:
            raise ValueError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes, dtype names of old
            words = ast.literal_eval(text.decode("utf-8" if magic[6] == 3 else "latin-1").strip())
            if set(words) != {"descr", "fortran_order", "shape"}:
                raise ValueError
            descr, fortran, shape = words["descr"], words["fortran_order"], words["shape"]
            dtype = np.dtype(descr) if isinstance(descr, str) else np.dtype("V1")  # records are refused, not parsed
        if not isinstance(fortran, bool) or not isinstance(shape, tuple) or len(shape) > 32:
            raise ValueError
        if not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise DataError(f"array {name!r} is damaged: its header cannot be read. Save it again.") from None
    return Header(dtype, shape, fortran, 8 + width + length)


def _check_nbytes(header: Header, nbytes: int, name: str) -> None:
    if header.dtype.kind == "O" or header.dtype.kind == "V":
        return  # refused by what they are, whatever their size
    if header.offset + header.nbytes != nbytes:
        raise DataError(
            f"array {name!r} is truncated or damaged: its header, {header.dtype} of shape {list(header.shape)}, "
            f"asks for {header.nbytes} bytes, there are {nbytes - header.offset}. Copy or save the file again."
        )


def _native(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values.astype(values.dtype.newbyteorder("="), copy=False)


@contextlib.contextmanager
def _damage(name: str) -> Iterator[None]:
    """Whatever a damaged file makes zipfile, zlib or numpy raise, as one message."""
    what = name if name.startswith("the ") else f"array {name!r}"
    try:
        yield
    except DataError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, NotImplementedError, RuntimeError, ValueError) as e:
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise DataError(f"{what} is truncated or damaged ({reason}). Copy or save the file again.") from None
    except MemoryError:
        raise DataError(f"{what} does not fit into memory: save fewer samples.") from None
    except OSError as e:
        raise DataError(f"{what} cannot be read: {e.strerror or e}.") from None
