"""The reader of untrusted zip files: what it refuses, for models and for data alike, and what it must read."""

import io
import struct
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcompress import zip_archive
from qcompress.errors import DataError, QCompressError, SourceError
from qcompress.zip_archive import ZipArchive
from tests.helpers.examples import examples

MEMBERS = {"top/a.txt": b"hello", "top/sub/numbers": bytes(range(200)), "top/empty": b""}


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as archive:
        warnings.simplefilter("ignore")  # zipfile warns of doubled names
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.zip"


def refused(path: Path, content: bytes, match: str) -> None:
    """Both callers get the message, each with its own label and class of error."""
    path.write_bytes(content)
    with pytest.raises(
        SourceError, match=rf"^{path} is (refused|truncated or damaged|a truncated or damaged).*{match}"
    ):
        ZipArchive(path)
    with pytest.raises(DataError, match=rf"^the archive is .*{match}"):
        ZipArchive(path, label="the archive", error=DataError)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_are_read_whole(path, method):
    path.write_bytes(zipped({**MEMBERS, "top/folder/": b""}, method))
    archive = ZipArchive(path)
    assert archive.names == list(MEMBERS)
    for name, data in MEMBERS.items():
        assert name in archive
        assert archive.nbytes(name) == len(data)
        assert archive.read(name) == archive.data(name).tobytes() == data
    assert archive.without_top_folder().names == ["a.txt", "sub/numbers", "empty"]
    assert archive.data("sub/numbers").tobytes() == MEMBERS["top/sub/numbers"]
    assert isinstance(
        archive.data("sub/numbers").base, np.memmap if method == zipfile.ZIP_STORED else bytes
    ) or isinstance(archive.data("sub/numbers"), np.memmap)


@given(st.dictionaries(st.text("ab/é.:", min_size=1, max_size=6), st.binary(max_size=50), max_size=5), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_odd_names_are_read_or_refused(path, members, packed):
    path.write_bytes(zipped(members, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED))
    try:
        archive = ZipArchive(path)
    except SourceError as e:
        assert "points outside the archive" in str(e)  # noqa: PT017
        return
    for name in archive.names:
        assert archive.read(name) == archive.data(name).tobytes() == members[name]


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "a\\..\\x", "/etc/x", "\\x", "C:x", "c:/x", "..", "a/..", "a\nb/../c"]
)
def test_names_that_point_outside(path, name):
    info = zipfile.ZipInfo()
    info.filename = name  # as it is, whatever the system's separators
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(info, b"x")
    refused(path, out.getvalue(), "points outside the archive")


def test_names_that_only_look_odd(path):
    names = ["a..b", "..a", "ab:c", "a/...", "über"]
    path.write_bytes(zipped(dict.fromkeys(names, b"x")))
    assert ZipArchive(path).names == names


def test_a_name_that_occurs_twice(path):
    content = zipped({"a": b"1", "b": b"2"})
    refused(path, content.replace(b"b", b"a"), "it holds the member 'a' twice")


def test_encrypted_and_oddly_packed(path):
    content = bytearray(zipped({"a": b"1"}))
    entry = content.index(b"PK\x01\x02")
    content[entry + 8] |= 1
    refused(path, bytes(content), "its member 'a' is encrypted")
    for method in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        refused(path, zipped({"a": b"1" * 100}, method), "its member 'a' is neither stored nor deflated")


def test_members_that_share_bytes(path):
    """Two entries of the table of contents that point at one member: the trick of bombs that pass a test of ratios."""
    content = bytearray(zipped({"a": b"1" * 50, "b": b"2" * 50}))
    second = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1)
    content[second + 42 : second + 46] = struct.pack("<L", 0)
    refused(path, bytes(content), "reaches beyond its place in the file")


@pytest.mark.parametrize("size", [60, 1 << 20, (1 << 32) - 2])
def test_members_longer_than_their_place(path, size):
    content = bytearray(zipped({"a": b"1" * 50, "b": b"2" * 50}))
    entry = content.index(b"PK\x01\x02")
    content[entry + 20 : entry + 28] = struct.pack("<LL", size, size)
    refused(path, bytes(content), "its member 'a' reaches beyond its place in the file")


def test_a_header_that_is_not_the_members(path):
    """The table of contents and the header in front of the bytes must agree, or two readers see two files."""
    content = zipped({"a": b"1" * 50, "b": b"2" * 50})
    for changed in (content.replace(b"a", b"c", 1), content.replace(b"PK\x03\x04", b"PK\x03\x05", 1)):
        path.write_bytes(changed)
        with pytest.raises(SourceError, match=r"is damaged: its member 'a' has no header of its own"):
            ZipArchive(path).data("a")
        with pytest.raises(SourceError, match=r"is damaged: its member 'a' cannot be read \("):
            ZipArchive(path).read("a")
    longer = bytearray(content)
    longer[28:30] = struct.pack("<H", 60)  # extra fields, which move the bytes into the next member
    path.write_bytes(longer)
    with pytest.raises(SourceError, match="its member 'a' reaches beyond its place in the file"):
        ZipArchive(path).data("a")


def test_bombs(path):
    content = zipped({"a": b"\0" * (1 << 22), "b": b"\0" * (1 << 21)}, zipfile.ZIP_DEFLATED)
    refused(path, content, r"its member 'a' would grow \d{4} times when unpacked, to 4194304 bytes; if that is")
    assert ZipArchive(path, free_nbytes=3 << 21).nbytes("a") == 1 << 22
    with pytest.raises(SourceError, match="its member 'a' would grow"):
        ZipArchive(path, free_nbytes=(3 << 21) - 1)


def test_a_member_that_unpacks_to_more_than_it_says(path):
    """The declared size is what is read; the rest is never unpacked."""
    content = bytearray(zipped({"a": b"\0" * (1 << 26)}, zipfile.ZIP_DEFLATED))
    for at in (content.index(b"PK\x01\x02") + 24, 22):
        content[at : at + 4] = struct.pack("<L", 1000)
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match=r"its member 'a' cannot be read \(Bad CRC"):
            ZipArchive(path).data("a")
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_large_members_are_not_parsed(path):
    path.write_bytes(zipped({"a": b"1" * 100}))
    with pytest.raises(SourceError, match=r"is refused: its member 'a' has 100 bytes, but at most 99 are read\.$"):
        ZipArchive(path).read("a", limit=99)
    with pytest.raises(SourceError, match=r"is damaged: its member 'b' is missing\. Save the file again\.$"):
        ZipArchive(path).read("b")


def test_too_many_members(path, monkeypatch):
    monkeypatch.setattr(zip_archive, "MAX_MEMBERS", 1)
    refused(path, zipped({"a": b"", "b": b""}), "it has 2 members, but at most 1 are read")


def test_only_the_end_of_an_archive(path):
    """Cut off within its last member, an archive of archives ends with a whole archive."""
    inner = zipped({"a": b"1"})
    refused(path, b"PK\x03\x04" + bytes(30) + inner, "it describes the end of the file only")


@given(st.data(), st.booleans())
@examples(200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_one_error_or_none(path, data, packed):
    content = bytearray(zipped(MEMBERS, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.integers(0, 2)):
            case 0:
                content[at] = data.draw(st.integers(0, 255))
            case 1:
                content[at : at + 4] = b"\xff" * 4
            case 2:
                del content[at:]
                content += b"\0"
    path.write_bytes(content)
    try:
        archive = ZipArchive(path)
        for name in archive.names:
            archive.read(name)
            archive.data(name)
    except QCompressError as e:
        assert str(path) in str(e)  # noqa: PT017
