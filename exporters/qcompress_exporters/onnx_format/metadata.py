"""What our ONNX files say of themselves, and the measurements beside them. Reads protobuf through `onnx` alone."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import onnx

from qcompress.artifacts.digest import short_digest
from qcompress.errors import SourceError
from qcompress.gate.validation import FORMAT, Validation

VERSION: Final = "qcompress.version"
TARGET: Final = "qcompress.target"
ORIGINAL_BYTES: Final = "qcompress.original_bytes"
PLAN: Final = "qcompress.plan"
SOURCE: Final = "qcompress.source"
SITES: Final = "qcompress.sites"
GRIDS: Final = "qcompress.grids"
VALIDATION: Final = "qcompress.validation"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedFile:
    """One of our files, as read for the gate and for validation.

    Args:
        path: where it lies.
        nbytes: its size.
        model: the protobuf.
        metadata: its metadata, by key.
    """

    path: Path
    nbytes: int
    model: onnx.ModelProto
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        """Whether qcompress wrote it."""
        return VERSION in self.metadata

    @property
    def original_bytes(self) -> int | None:
        """Bytes of the stripped float ONNX file of the same graph, as export measured them."""
        text = self.metadata.get(ORIGINAL_BYTES)
        if text is None:
            return None
        if not text.isdecimal() or int(text) == 0:
            raise SourceError(
                f"{self.path}: its metadata {ORIGINAL_BYTES} must be a number of bytes, got {text!r}: export it again."
            )
        return int(text)

    @property
    def sites(self) -> tuple[str, list[tuple[str, int]]]:
        """What its layers compute in, and where it quantizes activations; see `sites_text`."""
        text = self.metadata.get(SITES)
        return ("float", []) if text is None else sites_from(text)

    @property
    def digest(self) -> str:
        """Digest of graph and initializers; the same whatever the metadata holds."""
        return content_digest(self.model)

    def validation(self) -> Validation | None:
        """Return the measurements of `validate`: those beside the file (FILE.validation.json), else those within it.

        Raises:
            SourceError: they cannot be read, or were made on another file.
        """
        beside = validation_path(self.path)
        if beside.exists():
            where, text = str(beside), beside.read_text(encoding="utf-8", errors="replace")
        elif VALIDATION in self.metadata:
            where, text = f"{self.path} (metadata)", self.metadata[VALIDATION]
        else:
            return None
        again = f"run `qcompress validate MODEL {self.path}` again"
        try:
            measured = json.loads(text)
            stands_for, version = measured["file"]["digest"], measured["format_version"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise SourceError(f"{where} is not a validation of qcompress: {again}.") from None
        if version != FORMAT:
            raise SourceError(f"{where} has format {version}, this version reads {FORMAT}: {again}.")
        if stands_for != self.digest:
            raise SourceError(
                f"{where} was measured on another file (digest {stands_for}, {self.path} has {self.digest}): {again}."
            )
        return Validation.from_dict(measured, str(self.path))


def sites_text(compute: str, sites: Iterable[tuple[str, int]]) -> str:
    """Where a file quantizes activations, as its metadata says it: `["int8", "x", "relu", ["fc.weight", 0]]`.

    >>> sites_text("int8", [("x", -1), ("fc.weight", 0)])
    '["int8","x",["fc.weight",0]]'
    """
    entries = [name if index < 0 else [name, index] for name, index in sites]
    return json.dumps([compute, *entries], separators=(",", ":"))


def sites_from(text: str) -> tuple[str, list[tuple[str, int]]]:
    """The inverse of `sites_text`.

    Raises:
        SourceError: it was not written by that.

    >>> sites_from('["int8","x",["fc.weight",0]]')
    ('int8', [('x', -1), ('fc.weight', 0)])
    """
    try:
        compute, *entries = json.loads(text)
        sites = [(e, -1) if isinstance(e, str) else (str(e[0]), int(e[1])) for e in entries]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise SourceError(f"The file's metadata {SITES} is damaged: export it again.") from None
    return str(compute), sites


class GridEntry(NamedTuple):
    """What a file's metadata says of one site's grid.

    Args:
        bits: width of a code.
        digest: from `digests.grid_digest`.
        offset: a free one, which may stand nowhere in the graph but in biases; 0 where there is none.
    """

    bits: int
    digest: str
    offset: float = 0.0


def grids_text(entries: Iterable[GridEntry]) -> str:
    """The grids of all sites, as a file's metadata says them.

    >>> grids_text([GridEntry(8, "hl831PiDsz5"), GridEntry(4, "J6L4CB6Zs0X", -0.25)])
    '8hl831PiDsz5 4J6L4CB6Zs0X:-0.25'
    """
    return " ".join(f"{e.bits}{e.digest}" + (f":{e.offset!r}" if e.offset else "") for e in entries)


def grids_from(text: str) -> list[GridEntry]:
    """The inverse of `grids_text`.

    Raises:
        SourceError: it was not written by that.

    >>> grids_from("8hl831PiDsz5 4J6L4CB6Zs0X:-0.25")[1]
    GridEntry(bits=4, digest='J6L4CB6Zs0X', offset=-0.25)
    """
    try:
        parts = [(entry[0], *entry[1:].split(":")) for entry in text.split()]
        return [GridEntry(int(bits), digest, *(float(offset) for offset in rest)) for bits, digest, *rest in parts]
    except (ValueError, TypeError):
        raise SourceError(f"The file's metadata {GRIDS} is damaged: export it again.") from None


def entry_of(model: onnx.ModelProto, key: str) -> str | None:
    """One entry of a model's metadata."""
    return next((entry.value for entry in model.metadata_props if entry.key == key), None)


def read(path: Path) -> CompressedFile:
    """Read an ONNX file, ours or not.

    Raises:
        SourceError: no such file, or not an ONNX model.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise SourceError(f"{path} cannot be read: {e.strerror}.") from None
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception:  # protobuf's DecodeError has no stable import path
        model.Clear()
    if not (model.ir_version and model.opset_import and model.HasField("graph")):
        raise SourceError(f"{path} is not an ONNX model.")
    entries = {entry.key: entry.value for entry in model.metadata_props}
    return CompressedFile(path=path, nbytes=len(data), model=model, metadata=entries)


def content_digest(model: onnx.ModelProto) -> str:
    """Digest of a model without its metadata, so that writing measurements into a file does not unsettle them."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.metadata_props[:]
    return short_digest(bare.SerializeToString(deterministic=True))


def validation_path(path: Path) -> Path:
    """Where the measurements of a file lie.

    >>> validation_path(Path("net.w2.onnx")).name
    'net.w2.onnx.validation.json'
    """
    return path.with_name(path.name + ".validation.json")
