"""Decides what kind of file a path is, from its content; its name does not matter."""

import string
import struct
from pathlib import Path
from typing import Final, Literal

from qcompress.errors import SourceError, did_you_mean
from qcompress.zip_archive import ZipArchive

Content = Literal[
    "empty",
    "safetensors",
    "exported",
    "old_exported",
    "torchscript",
    "checkpoint",
    "legacy_checkpoint",
    "tar_checkpoint",
    "pickle",
    "zip",
    "onnx",
    "compressed_folder",
    "float_folder",
    "folder",
    "text",
    "unknown",
]

# The kinds in messages: "it is …".
DESCRIPTIONS: Final[dict[Content, str]] = {
    "empty": "an empty file",
    "safetensors": "a safetensors file",
    "exported": "an exported program",
    "old_exported": "an exported program in the layout of torch before 2.8",
    "torchscript": "a TorchScript archive",
    "checkpoint": "a torch checkpoint",
    "legacy_checkpoint": "a torch checkpoint in the format before torch 1.6",
    "tar_checkpoint": "a torch checkpoint in the tar format of torch before 0.2",
    "pickle": "a plain Python pickle",
    "zip": "a zip archive that holds no model",
    "onnx": "an ONNX file",
    "compressed_folder": "a folder that qcompress wrote",
    "float_folder": "a folder of a training run without quantizers",
    "folder": "a folder",
    "text": "a text file",
    "unknown": "a file of an unknown kind",
}

_LEGACY_MAGIC: Final = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
_TEXT: Final = frozenset(string.printable.encode()) | frozenset(range(0x80, 0x100))
# Fields that can follow the IR version in a protobuf ModelProto: producer's name or version, domain, graph, opset.
_ONNX_FIELDS: Final = (0x12, 0x1A, 0x22, 0x3A, 0x42)
# The folders that qcompress writes, by the files that they hold.
_FOLDERS: Final[dict[Content, tuple[str, ...]]] = {
    "compressed_folder": ("weights.safetensors", "plan.toml"),
    "float_folder": ("run.json", "model.pt2"),
}


def content_of(path: Path) -> Content:
    """Return the kind of a file or folder, judged by its content.

    Raises:
        SourceError: there is nothing at `path`, or nothing that can be read, or a damaged archive.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "model.pt").write_text("hello")
    ...     content_of(Path(folder) / "model.pt"), content_of(Path(folder))
    ('text', 'folder')
    """
    try:
        if path.is_dir():
            kinds = (kind for kind, names in _FOLDERS.items() if all((path / name).is_file() for name in names))
            return next(kinds, "folder")
        if path.exists() and not path.is_file():  # reading it could wait, or go on, without end
            raise SourceError(f"{path} must be a file, but it is a pipe, a device or a socket: name a model file.")
        with path.open("rb") as f:
            head = f.read(4096)
            f.seek(0, 2)
            nbytes = f.tell()
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist: name a model file.{_near(path)}") from None
    except OSError as e:
        raise SourceError(f"{path} cannot be read: {e.strerror}.") from None
    if not head:
        return "empty"
    if head.startswith(b"PK\x03\x04"):
        return _zip_content(path)
    return _flat_content(head, nbytes)


def _zip_content(path: Path) -> Content:
    archive = ZipArchive(path).without_top_folder()
    if "archive_format" in archive or any(n.startswith("models/") and n.endswith(".json") for n in archive.names):
        return "exported"
    if "serialized_exported_program.json" in archive:
        return "old_exported"
    if "data.pkl" in archive:
        return "torchscript" if "constants.pkl" in archive else "checkpoint"
    return "zip"


def _flat_content(head: bytes, nbytes: int) -> Content:
    if _LEGACY_MAGIC in head[:32]:
        return "legacy_checkpoint"
    if head[257:262] == b"ustar":
        return "tar_checkpoint"
    if head[0] == 0x08 and len(head) > 2 and head[1] < 0x20 and head[2] in _ONNX_FIELDS:
        return "onnx"
    if len(head) >= 9:
        (header_length,) = struct.unpack_from("<Q", head)
        if head[8:9] == b"{" and (header_length <= nbytes or not all(byte in _TEXT for byte in head[:8])):
            return "safetensors"
    if head[0] == 0x80 and len(head) > 1 and head[1] <= 5:
        return "pickle"
    if all(byte in _TEXT for byte in head):
        # Protocol 0 is text too: it starts with a mark or a global and ends with a dot.
        return (
            "pickle"
            if head[:1] in (b"(", b"c") and b"\n" in head and nbytes <= 4096 and head.rstrip()[-1:] == b"."
            else "text"
        )
    return "unknown"


def _near(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir()][:1000]
    except OSError:
        return ""
    return did_you_mean(path.name, names)
