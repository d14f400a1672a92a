"""Write files whole or not at all: to a temporary file, fsync, rename. An interrupted command leaves the old file."""

import contextlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from qcompress.errors import OutputError


def check_writable(path: Path, *, force: bool = False, inputs: Iterable[Path] = (), flag: str | None = "-o") -> None:
    """Refuse an output path that cannot be written, before any work is done.

    Args:
        path: the output path.
        force: whether an existing file may be replaced.
        inputs: files that are never replaced, even with `force`, nor are links to them.
        flag: the option that sets the path, for messages; None: there is no such option.

    Raises:
        OutputError: the folder is missing or read-only, or the file exists, is not a regular file, or is an input.
    """
    by = f" with {flag}" if flag else ""
    for given in inputs:
        if path.exists() and given.exists() and path.samefile(given):
            raise OutputError(f"{path} is an input of this command and is never replaced: name another file{by}.")
    if path.is_dir():
        raise OutputError(f"{path} is a folder, a file name is needed: name a file in it{by}.")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is a device, pipe or socket, which is never replaced: name a file{by}.")
    if path.exists() and not force:
        raise OutputError(f"{path} exists: name another file{by}, or replace it with --force.")
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"{path} cannot be written: the folder {folder} does not exist. Create it first.")
    if not folder.stat().st_mode & 0o222:  # root could write there, but nobody wants that
        raise OutputError(f"{path} cannot be written: the folder {folder} is read-only. Name another place{by}.")
    try:
        handle, probe = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)
    except OSError as e:
        raise OutputError(f"{path} cannot be written: {e.strerror}. Name another place{by}.") from None
    os.close(handle)
    os.unlink(probe)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OutputError: it cannot be written. An old file stays as it was.
    """
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        sync(path.parent)
    except OSError as e:
        raise OutputError(f"{path} cannot be written: {e.strerror}.") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Flush a file or folder to the disk, if the system supports it."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
