"""The reader of zip files from untrusted origins (.pt, .pt2, .npz): it checks every declared size and extracts nothing.

What is refused, before any member is read: a damaged table of contents, too many members, a name that occurs twice or
points outside the archive, encryption, other compression than deflate, members that reach beyond the file or into each
other, and members that would grow far too much when they are unpacked.
"""

import contextlib
import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, Self, final

import numpy as np
import numpy.typing as npt

from qcompress.errors import QCompressError, SourceError

Bytes = npt.NDArray[np.uint8]

MAX_MEMBERS: Final = 1_000_000
# A member may grow this many times when it is unpacked.
MAX_RATIO: Final = 200
# The largest member that is parsed (JSON, pickle) rather than mapped.
MAX_PARSED: Final = 1 << 28

_BLOCK: Final = 1 << 24  # bytes that are read together

_HEADER: Final = struct.Struct("<4s5H3L2H")  # of a member: magic, …, length of its name, length of its extra fields
_OUTSIDE: Final = re.compile(r"[/\\]|[A-Za-z]:|(.*[/\\])?\.\.([/\\]|\Z)", re.DOTALL)
# What zipfile and zlib raise when they read a damaged archive.
_DAMAGE: Final = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, OSError, OverflowError, RuntimeError,
    ValueError,
)  # fmt: skip


@final
class ZipArchive:
    """The members of a zip file by name.

    Args:
        file: its path, or its bytes.
        label: what messages call the archive; None: its path.
        error: the class of the errors that are raised.
        free_nbytes: bytes to which members that grow more than MAX_RATIO times may unpack, all together.

    Raises:
        SourceError: (or `error`) the archive is refused for one of the reasons above.
    """

    def __init__(
        self,
        file: Path | bytes,
        *,
        label: str | None = None,
        error: type[QCompressError] = SourceError,
        free_nbytes: int = 0,
    ) -> None:
        self._file = file
        self.label = str(file) if label is None else label
        self._error = error
        try:
            # closed by Python together with this object
            self._zip = zipfile.ZipFile(io.BytesIO(file) if isinstance(file, bytes) else file)
        except (*_DAMAGE, MemoryError) as e:
            raise self._cut_off(str(e)) from None
        infos = self._zip.infolist()
        if len(infos) > MAX_MEMBERS:
            raise self._refused(f"it has {len(infos)} members, but at most {MAX_MEMBERS} are read")
        # If an archive of archives is cut off within its last member, the file ends with the table of contents of that
        # member, and zipfile takes the member for the whole.
        if infos and min(info.header_offset for info in infos) != 0:
            raise self._cut_off("it describes the end of the file only")
        self._infos: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            self._check(info)
            if info.filename in self._infos:
                raise self._refused(f"it holds the member {info.filename!r} twice")
            self._infos[info.filename] = info
        self._check_places()
        self._check_ratio(free_nbytes)

    def without_top_folder(self) -> Self:
        """The archive, its members named from the folder that all of them share, if there is one."""
        root = _root(list(self._infos))
        self._infos = {name[len(root) :]: info for name, info in self._infos.items()}
        return self

    @property
    def names(self) -> list[str]:
        """Names of the members in the archive's order, without folders."""
        return [name for name in self._infos if name and not name.endswith("/")]

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def nbytes(self, name: str) -> int:
        """Size of a member in bytes."""
        return self._info(name).file_size

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Open a member for reading; damage that shows while it is read becomes one error.

        Raises:
            SourceError: (or `error`) the member is missing or damaged, or does not fit into memory.
        """
        info = self._info(name)
        try:
            with self._zip.open(info) as f:
                yield f
        except QCompressError:
            raise
        except MemoryError:
            raise self._error(f"{self.label}: its member {name!r} does not fit into memory.") from None
        except _DAMAGE as e:
            reason = " ".join(str(e).split())[:200] or type(e).__name__
            raise self._error(
                f"{self.label} is damaged: its member {name!r} cannot be read ({reason}). Copy or save the file again."
            ) from None

    def read(self, name: str, limit: int = MAX_PARSED) -> bytes:
        """Read a member that is to be parsed.

        Args:
            name: the member.
            limit: the largest size in bytes that is read.

        Raises:
            SourceError: (or `error`) the member is missing, damaged, or larger than `limit`.
        """
        nbytes = self.nbytes(name)
        if nbytes > limit:
            raise self._refused(f"its member {name!r} has {nbytes} bytes, but at most {limit} are read")
        with self.open(name) as f:
            return f.read(nbytes)  # without a number, zipfile unpacks whatever comes, not what was declared

    def data(self, name: str) -> Bytes:
        """The bytes of a member that holds numbers; mapped from the file if they are stored uncompressed."""
        info = self._info(name)
        if info.compress_type != zipfile.ZIP_STORED:
            return np.frombuffer(self.read(name, limit=info.file_size), np.uint8)
        start = self._start(info)
        if not info.file_size:
            return np.zeros(0, np.uint8)
        if isinstance(self._file, bytes):
            return np.frombuffer(self._file, np.uint8, info.file_size, start)
        return np.memmap(self._file, np.uint8, "r", start, (info.file_size,))

    def mapped(self, name: str) -> Bytes | None:
        """The bytes of a member, mapped from the file and compared with their checksum; None if they are compressed."""
        info = self._info(name)
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        content = np.asarray(self.data(name))
        checksum = 0
        for start in range(0, len(content), _BLOCK):
            checksum = zlib.crc32(content[start : start + _BLOCK].data, checksum)
        if checksum != info.CRC:
            raise self._error(
                f"{self.label} is damaged: the bytes of its member {name!r} do not match their checksum. Copy or save "
                "the file again."
            )
        return content

    def _opened(self) -> IO[bytes]:
        return io.BytesIO(self._file) if isinstance(self._file, bytes) else self._file.open("rb")

    def _info(self, name: str) -> zipfile.ZipInfo:
        if name not in self._infos:
            raise self._error(f"{self.label} is damaged: its member {name!r} is missing. Save the file again.")
        return self._infos[name]

    def _start(self, info: zipfile.ZipInfo) -> int:
        """Where the bytes of a member begin, from the header in front of them."""
        with self._opened() as f:
            f.seek(info.header_offset)
            magic, *_, name_length, extra_length = _HEADER.unpack(f.read(_HEADER.size).ljust(_HEADER.size, b"\0"))
            name = f.read(name_length)
        encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
        if magic != b"PK\x03\x04" or name != info.orig_filename.encode(encoding):
            raise self._error(f"{self.label} is damaged: its member {info.filename!r} has no header of its own.")
        start: int = info.header_offset + _HEADER.size + name_length + extra_length
        if start + info.file_size > self._ends[info.filename]:
            raise self._beyond(info)
        return start

    def _check(self, info: zipfile.ZipInfo) -> None:
        name = info.filename
        if not name or "\0" in name or _OUTSIDE.match(name):
            raise self._refused(f"its member {name!r} points outside the archive")
        if info.flag_bits & 1:
            raise self._refused(f"its member {name!r} is encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self._refused(f"its member {name!r} is neither stored nor deflated")
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            raise self._beyond(info)

    def _check_places(self) -> None:
        """Refuse members that reach into the next one or into the table of contents, which hide or repeat bytes."""
        infos = sorted(self._infos.values(), key=lambda info: info.header_offset)
        ends = [*(info.header_offset for info in infos), self._zip.start_dir][1:]
        for info, end in zip(infos, ends, strict=True):
            if info.header_offset + _HEADER.size + info.compress_size > end:
                raise self._beyond(info)
        self._ends = {info.filename: end for info, end in zip(infos, ends, strict=True)}

    def _check_ratio(self, free_nbytes: int) -> None:
        """Refuse bombs: members that grow more than MAX_RATIO times, and together to more than `free_nbytes`."""
        growing = [info for info in self._infos.values() if info.file_size > MAX_RATIO * max(info.compress_size, 1)]
        if sum(info.file_size for info in growing) > free_nbytes:
            worst = max(growing, key=lambda info: info.file_size)
            ratio = math.ceil(worst.file_size / max(worst.compress_size, 1))
            raise self._refused(
                f"its member {worst.filename!r} would grow {ratio} times when unpacked, to {worst.file_size} bytes; if "
                "that is meant, save it without compression"
            )

    def _refused(self, why: str) -> QCompressError:
        return self._error(f"{self.label} is refused: {why}.")

    def _beyond(self, info: zipfile.ZipInfo) -> QCompressError:
        return self._error(
            f"{self.label} is truncated or damaged: its member {info.filename!r} reaches beyond its place in the file. "
            "Copy or save the file again."
        )

    def _cut_off(self, why: str) -> QCompressError:
        reason = " ".join(why.split())[:200]
        return self._error(
            f"{self.label} is a truncated or damaged archive: its table of contents cannot be read ({reason}). Copy or "
            "save the file again."
        )


def _root(names: list[str]) -> str:
    """The folder that all members share, with its slash.

    >>> _root(["m/data.pkl", "m/data/0"]), _root(["version", "m/x"])
    ('m/', '')
    """
    heads = {name.partition("/")[0] for name in names}
    shared = len(heads) == 1 and all("/" in name for name in names)
    return f"{heads.pop()}/" if shared else ""
