"""Files are written whole or not at all, and a path is refused before any work is done for it."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qcompress.errors import OutputError
from qcompress.files import check_writable, half_written, read_plain, sweep, write_whole


def test_a_file_is_written_whole_and_nothing_stays_beside_it(tmp_path):
    path = tmp_path / "out.onnx"
    write_whole(path, b"new")
    write_whole(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert os.listdir(tmp_path) == ["out.onnx"]


def test_the_file_has_the_permissions_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "out.onnx", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "out.onnx").stat().st_mode & 0o777 == 0o640


def test_a_link_as_output_is_replaced_and_its_target_stays(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"target")
    link.symlink_to(target)
    write_whole(link, b"new")
    assert (target.read_bytes(), link.read_bytes()) == (b"target", b"new")


# The child stands still between the last byte and the rename, in what the parent then kills.
_KILLED_WHILE_WRITING = """
import os, sys, time
from pathlib import Path
from qcompress.files import write_whole

def stand_still(handle):
    print("writing", flush=True)
    time.sleep(60)

os.fsync = stand_still
write_whole(Path(sys.argv[1]), b"new" * 1000)
"""


@pytest.mark.parametrize("old", [None, b"old"])
def test_kill_9_while_writing_leaves_the_old_file_or_none(tmp_path, old):
    path = tmp_path / "out.onnx"
    if old is not None:
        path.write_bytes(old)
    command = [sys.executable, "-c", _KILLED_WHILE_WRITING, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": _root()}) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"writing\n"
        child.kill()
        assert child.wait() == -signal.SIGKILL
    assert (path.read_bytes() if path.exists() else None) == old
    assert len(os.listdir(tmp_path)) == (old is not None) + 1
    write_whole(path, b"newer")
    assert os.listdir(tmp_path) == ["out.onnx"]


def test_what_is_being_written_is_not_swept(tmp_path):
    path, folder = tmp_path / "out.onnx", tmp_path / "out"
    (tmp_path / ".out.onnx.a1b2c3d4").write_bytes(b"of a killed run")
    (tmp_path / ".out.onnx.notes").write_bytes(b"the user's")
    with half_written(folder) as part:
        held = os.open(tmp_path / ".out.onnx.e5f6g7h8", os.O_CREAT | os.O_WRONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
        write_whole(path, b"new")
        sweep(folder)
        assert set(os.listdir(tmp_path)) == {".out.onnx.e5f6g7h8", ".out.onnx.notes", part.name, "out.onnx"}
        os.close(held)
    write_whole(path, b"newer")
    assert sorted(os.listdir(tmp_path)) == [".out.onnx.notes", "out.onnx"]


def test_only_plain_files_are_read(tmp_path):
    plain, link, pipe = tmp_path / "plain", tmp_path / "link", tmp_path / "pipe"
    plain.write_bytes(b"bytes")
    link.symlink_to(plain)
    os.mkfifo(pipe)
    assert read_plain(link) == b"bytes"
    for path, reason in ((pipe, "it is a pipe"), (Path("/dev/zero"), "it is a pipe, a device"), (tmp_path, "Is a dir")):
        with pytest.raises(OSError, match=reason):
            read_plain(path)
    with pytest.raises(FileNotFoundError):
        read_plain(tmp_path / "none")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch, failing):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "out.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OutputError, match=r"out\.onnx cannot be written: No space left on device\.$"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.onnx"]


def test_a_missing_folder_is_refused(tmp_path):
    path = tmp_path / "no" / "out.onnx"
    with pytest.raises(OutputError, match=r"out\.onnx cannot be written: No such file or directory\.$"):
        write_whole(path, b"new")
    with pytest.raises(
        OutputError, match=r"out\.onnx cannot be written: the folder .*/no does not exist\. Create it first\.$"
    ):
        check_writable(path)


def test_an_existing_file_is_only_replaced_by_force(tmp_path):
    path = tmp_path / "out.onnx"
    check_writable(path)
    path.write_bytes(b"old")
    with pytest.raises(
        OutputError, match=r"out\.onnx exists: name another file with -o, or replace it with --force\.$"
    ):
        check_writable(path)
    check_writable(path, force=True)
    assert os.listdir(tmp_path) == ["out.onnx"]


@pytest.mark.parametrize("through", ["itself", "symlink", "hard link"])
def test_an_input_is_never_replaced(tmp_path, through):
    model, out = tmp_path / "model.pt", tmp_path / "out.onnx"
    model.write_bytes(b"model")
    if through == "itself":
        out = tmp_path / "." / "model.pt"
    elif through == "symlink":
        out.symlink_to(model)
    else:
        out.hardlink_to(model)
    with pytest.raises(
        OutputError, match=r" is an input of this command and is never replaced: name another file with -o\.$"
    ):
        check_writable(out, force=True, inputs=[tmp_path / "other", model])


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(OutputError, match=r" is a folder, a file name is needed: name a file in it with -o\.$"):
        check_writable(tmp_path, force=True)


def test_a_read_only_folder_is_refused_even_for_root(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    try:
        with pytest.raises(
            OutputError, match=r"cannot be written: the folder .* is read-only\. Name another place with -o\.$"
        ):
            check_writable(folder / "out.onnx")
    finally:
        folder.chmod(0o755)


def test_a_folder_that_refuses_new_files_is_named_before_any_work(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(
        OutputError, match=r"out\.onnx cannot be written: Read-only file system\. Name another place with -o\.$"
    ):
        check_writable(tmp_path / "out.onnx")


def _root() -> str:
    return str(Path(__file__).parents[1])


def test_what_is_no_regular_file_is_never_replaced(tmp_path):
    pipe = tmp_path / "pipe.onnx"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match=r"pipe\.onnx is a device, pipe or socket, which is never replaced: name a"):
        check_writable(pipe, force=True)
    assert pipe.is_fifo()
