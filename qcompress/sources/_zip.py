"""A zip that nobody vouches for: listed and read with care, its members mapped, nothing extracted."""

import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Final, final

import numpy as np

from qcompress.errors import SourceError
from qcompress.sources.strided import Bytes

# torch stores its members; a deflated one is read only where it does not blow up.
MAX_RATIO: Final = 200
MAX_MEMBERS: Final = 1_000_000
# The largest member that is parsed (JSON, pickle) rather than mapped.
MAX_PARSED: Final = 1 << 28


@final
class ZipArchive:
    """The members of a zip file by name, the common top folder cut off.

    Args:
        path: the file; it starts with a zip's magic.

    Raises:
        SourceError: the archive is truncated or damaged, or a member is doubled, encrypted, a bomb, or named so that
            it would lie outside the archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError) as e:
            raise SourceError(
                f"{path} is a truncated or damaged archive: it starts like a saved model, but its table of contents "
                f"cannot be read ({e}). Copy or save the file again."
            ) from None
        if len(infos) > MAX_MEMBERS:
            raise SourceError(f"{path} is refused: {len(infos)} members, at most {MAX_MEMBERS} are read.")
        # Cut off within its last member, an archive of archives ends with that member's own table of contents, which
        # zipfile would take for the whole, the rest for a prefix.
        if infos and min(info.header_offset for info in infos) != 0:
            raise SourceError(
                f"{path} is a truncated or damaged archive: it starts like a saved model, but its table of contents "
                "does not. Copy or save the file again."
            )
        self._nbytes = path.stat().st_size
        self._infos: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            self._check(info)
            if info.filename in self._infos:
                raise SourceError(f"{path} is refused: it holds the member {info.filename!r} twice.")
            self._infos[info.filename] = info
        self.root = _root(list(self._infos))
        if self.root:
            self._infos = {name[len(self.root) :]: info for name, info in self._infos.items()}

    @property
    def names(self) -> list[str]:
        """Names of the members below the top folder, in the archive's order; folders left out."""
        return [name for name in self._infos if name and not name.endswith("/")]

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def nbytes(self, name: str) -> int:
        """Bytes of a member."""
        return self._info(name).file_size

    def read(self, name: str, limit: int = MAX_PARSED) -> bytes:
        """The bytes of a member that is to be parsed.

        Raises:
            SourceError: there is no such member, it is larger than `limit`, or it is damaged.
        """
        info = self._info(name)
        if info.file_size > limit:
            raise SourceError(f"{self.path} is refused: its member {name!r} has {info.file_size} bytes, over {limit}.")
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(info)
        except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, ValueError, RuntimeError) as e:
            raise SourceError(f"{self.path} is damaged: its member {name!r} cannot be read ({e}).") from None

    def data(self, name: str) -> Bytes:
        """The bytes of a member that holds numbers, mapped from the file where they are stored as they are."""
        info = self._info(name)
        if info.compress_type != zipfile.ZIP_STORED:
            return np.frombuffer(self.read(name, limit=self._nbytes * MAX_RATIO), np.uint8)
        with self.path.open("rb") as f:
            f.seek(info.header_offset)
            header = f.read(30)
        if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
            raise SourceError(f"{self.path} is damaged: its member {name!r} has no header.")
        name_length, extra_length = struct.unpack_from("<HH", header, 26)
        start = info.header_offset + 30 + name_length + extra_length
        if start + info.file_size > self._nbytes:
            raise SourceError(f"{self.path} is truncated: its member {name!r} reaches beyond the end of the file.")
        if not info.file_size:
            return np.zeros(0, np.uint8)
        return np.memmap(self.path, np.uint8, "r", start, (info.file_size,))

    def _info(self, name: str) -> zipfile.ZipInfo:
        if name not in self._infos:
            raise SourceError(f"{self.path} is damaged: its member {name!r} is missing. Save the file again.")
        return self._infos[name]

    def _check(self, info: zipfile.ZipInfo) -> None:
        name, parts = info.filename, info.filename.replace("\\", "/").split("/")
        if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\0" in name or not name:
            raise SourceError(f"{self.path} is refused: its member {name!r} points outside the archive.")
        if info.flag_bits & 1:
            raise SourceError(f"{self.path} is refused: its member {name!r} is encrypted.")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise SourceError(f"{self.path} is refused: its member {name!r} is packed in an unusual way.")
        stored = info.compress_type == zipfile.ZIP_STORED
        if info.header_offset + info.compress_size > self._nbytes or (stored and info.compress_size != info.file_size):
            raise SourceError(f"{self.path} is truncated: its member {name!r} reaches beyond the end of the file.")
        if info.file_size > MAX_RATIO * max(info.compress_size, 1):
            ratio = math.ceil(info.file_size / max(info.compress_size, 1))
            raise SourceError(f"{self.path} is refused: its member {name!r} would grow {ratio} times when unpacked.")


def _root(names: list[str]) -> str:
    """The folder that all members share, with its slash.

    >>> _root(["m/data.pkl", "m/data/0"]), _root(["version", "m/x"])
    ('m/', '')
    """
    heads = {name.partition("/")[0] for name in names}
    shared = len(heads) == 1 and all("/" in name for name in names)
    return f"{heads.pop()}/" if shared else ""
