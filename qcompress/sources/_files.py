"""What all sources that lie in a file share: label, path, size, digest."""

import hashlib
from pathlib import Path


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def nbytes_of(path: Path) -> int:
    """Bytes of a file."""
    return path.stat().st_size
