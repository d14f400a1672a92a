"""The base of all sources that are one file: label, path, size and digest."""

import abc
import hashlib
from pathlib import Path


class AbstractFile(abc.ABC):
    """A source in a file; subclasses set `path` and read it."""

    path: Path

    @property
    def label(self) -> str:
        """The path as given."""
        return str(self.path)

    @property
    def original_bytes(self) -> int:
        """Size of the file in bytes."""
        return self.path.stat().st_size

    @property
    def sha256(self) -> str:
        """SHA-256 of the file, which is read in pieces."""
        with self.path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
