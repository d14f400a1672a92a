"""What all sources that lie in a file share: label, path, size, digest."""

import abc
import hashlib
from pathlib import Path


class AbstractFile(abc.ABC):
    """A source in a file; what is final says which file, and reads it."""

    path: Path

    @property
    def label(self) -> str:
        """The path as given."""
        return str(self.path)

    @property
    def original_bytes(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size

    @property
    def sha256(self) -> str:
        """SHA-256 of the file, read in pieces."""
        with self.path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
