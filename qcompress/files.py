"""Read plain files only, and write files whole or not at all: to a temporary file, fsync, rename.

An interrupted command leaves the old file. What a killed one leaves half written is removed by the next write there.
"""

import contextlib
import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from qcompress.errors import OutputError

try:
    import fcntl
except ImportError:  # on Windows, where nothing is swept
    fcntl = None  # type: ignore[assignment]


def read_plain(path: Path) -> bytes:
    """Return the bytes of a plain file, or of one that a link names.

    Anything else is refused before it is read: a pipe could wait, and a device go on, without end. What is written to
    the file while it is read is left out.

    Raises:
        OSError: it cannot be read, or is no plain file.

    >>> read_plain(Path("/dev/zero"))
    Traceback (most recent call last):
    OSError: [Errno 22] it is a pipe, a device or a socket, and a plain file is needed: '/dev/zero'
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as f:
        found = os.fstat(handle)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(found.st_mode):
            reason = "it is a pipe, a device or a socket, and a plain file is needed"
            raise OSError(errno.EINVAL, reason, str(path))
        return f.read(found.st_size)


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
        with tempfile.TemporaryFile(dir=folder):  # where the system can make it so, it never has a name
            pass
    except OSError as e:
        raise OutputError(f"{path} cannot be written: {e.strerror}. Name another place{by}.") from None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OutputError: it cannot be written. An old file stays as it was.
    """
    temporary: str | None = None
    sweep(path)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as f:
            _lock(handle)
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


@contextlib.contextmanager
def half_written(folder: Path) -> Iterator[Path]:
    """Give a new folder beside the one that it will become; it is removed unless it was moved there by then.

    Raises:
        OSError: it cannot be made.
    """
    sweep(folder)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    handle = os.open(part, os.O_RDONLY)
    try:
        _lock(handle)
        yield part
    finally:
        os.close(handle)
        shutil.rmtree(part, ignore_errors=True)


def sweep(path: Path) -> None:
    """Remove what killed runs left of a file or a folder that they were writing."""
    name = re.compile(re.escape(f".{path.name}.") + "[a-z0-9_]{8}")  # as tempfile makes them
    with contextlib.suppress(OSError):
        for part in [found for found in path.parent.iterdir() if name.fullmatch(found.name)]:
            handle = os.open(part, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
            try:
                if _lock(handle):
                    shutil.rmtree(part) if part.is_dir() else part.unlink()
            finally:
                os.close(handle)


def _lock(handle: int) -> bool:
    """Lock a file or folder until it is closed, or until this process ends, however it ends; return whether it is."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


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
