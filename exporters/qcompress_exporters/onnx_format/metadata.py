"""Reads our ONNX files, their metadata and the measurements stored with them. Needs `onnx`, but no runtime."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import onnx

from qcompress.artifacts.digest import short_digest
from qcompress.errors import SourceError
from qcompress.files import read_plain
from qcompress.gate.validation import FORMAT, Validation
from qcompress.graph.options import ProgramOptions

VERSION: Final = "qcompress.version"
TARGET: Final = "qcompress.target"
ORIGINAL_BYTES: Final = "qcompress.original_bytes"
PLAN: Final = "qcompress.plan"
SOURCE: Final = "qcompress.source"
SITES: Final = "qcompress.sites"
GRIDS: Final = "qcompress.grids"
CHANNELS_FIRST: Final = "qcompress.channels_first"
UNCOMPUTED: Final = "qcompress.uncomputed"
VALIDATION: Final = "qcompress.validation"
_MOST_DIGITS: Final = 18  # of a number of bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedFile:
    """An ONNX file, as `gate` and `validate` read it; see `formats.DeployedFile`.

    Args:
        path: the file.
        nbytes: its size in bytes.
        model: the protobuf.
        metadata: its metadata by key.
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
    def whole_nbytes(self) -> int:
        """Bytes of the file and of the external files that hold its weights; without them any size limit would pass.

        Raises:
            SourceError: an external file is missing.
        """
        held = [t for t in self.model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        places = {entry.value for tensor in held for entry in tensor.external_data if entry.key == "location"}
        paths = [self.path.parent / place for place in sorted(places)]
        for path in paths:
            if not path.is_file():
                raise SourceError(f"{self.path} keeps weights in {path}, but there is no such file.")
        external: int = sum(path.stat().st_size for path in paths)
        return self.nbytes + external

    @property
    def original_bytes(self) -> int | None:
        """Size in bytes of the stripped float ONNX file of the same graph, which export measured."""
        text = self.metadata.get(ORIGINAL_BYTES)
        if text is None:
            return None
        if not text.isdecimal() or len(text) > _MOST_DIGITS or int(text) == 0:
            raise SourceError(
                f"{self.path}: its metadata {ORIGINAL_BYTES} must be a number of bytes, got {text[:30]!r}: export it "
                "again."
            )
        return int(text)

    @property
    def compute(self) -> str:
        """The arithmetic of its layers: `float`, `int8` or `dynamic8`."""
        return self.sites[0]

    @property
    def sites(self) -> tuple[str, list[tuple[str, int]]]:
        """The arithmetic of its layers, and the sites of its activations; see `sites_text`."""
        text = self.metadata.get(SITES)
        return ("float", []) if text is None else sites_from(text)

    @property
    def dynamic(self) -> dict[tuple[str, int], str]:
        """The names of the dynamic axes of its inputs."""
        return {key: size.dim_param for key, size in self._sizes().items() if size.dim_param}

    def _sizes(self) -> dict[tuple[str, int], Any]:
        inputs = self.model.graph.input
        return {(v.name, axis): size for v in inputs for axis, size in enumerate(v.type.tensor_type.shape.dim)}

    @property
    def options(self) -> ProgramOptions:
        """The names of its inputs, outputs and dynamic axes, with which the original is traced for comparison."""
        graph, names = self.model.graph, self.dynamic
        batch = next((size.dim_value for size in self._sizes().values()), 0)
        return ProgramOptions(
            input_names=tuple(v.name for v in graph.input),
            output_names=tuple(v.name for v in graph.output),
            dynamic={key: name for key, name in names.items() if key[1]},
            fixed_batch=batch if batch and not names else None,
            computes=UNCOMPUTED not in self.metadata,
        )

    @property
    def channels_first(self) -> list[str]:
        """The weights of grouped transposed convolutions that are stored with their output channels first."""
        try:
            names = json.loads(self.metadata.get(CHANNELS_FIRST, "[]"))
        except (ValueError, RecursionError):
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise SourceError(f"{self.path}: its metadata {CHANNELS_FIRST} is damaged: export it again.")
        return names

    @property
    def digest(self) -> str:
        """Digest of graph and initializers, which does not depend on the metadata."""
        return content_digest(self.model)

    def validation(self) -> Validation | None:
        """Return the measurements of `validate` from FILE.validation.json, else from the metadata; None without any.

        Raises:
            SourceError: they are unreadable, or belong to another file.
        """
        beside = validation_path(self.path)
        if beside.exists():
            where, text = str(beside), _bytes_of(beside).decode("utf-8", errors="replace")
        elif VALIDATION in self.metadata:
            where, text = f"{self.path} (metadata)", self.metadata[VALIDATION]
        else:
            return None
        again = f"run `qcompress validate MODEL {self.path}` again"
        try:
            measured = json.loads(text)
            measured_on, version = measured["file"]["digest"], measured["format_version"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise SourceError(f"{where} is not a validation of qcompress: {again}.") from None
        if version != FORMAT:
            raise SourceError(f"{where} has format {version}, this version reads {FORMAT}: {again}.")
        if measured_on != self.digest:
            raise SourceError(
                f"{where} was measured on another file (digest {measured_on}, {self.path} has {self.digest}): {again}."
            )
        return Validation.from_dict(measured, str(self.path))

    def with_validation(self, document: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
        """Return the file's bytes with measurements in its metadata, and the measurements with the new size.

        Args:
            document: the measurements of `validate`; `file.nbytes` is set to the size of the file that holds them.
        """
        kept = {key: value for key, value in self.metadata.items() if key != VALIDATION}
        nbytes = 0
        while True:  # ends, because a longer number never makes the file smaller, and numbers stay short
            document = {**document, "file": {**document["file"], "nbytes": nbytes}}
            data = serialize(self.model, {**kept, VALIDATION: json.dumps(document, allow_nan=False)})
            if len(data) == nbytes:
                return data, document
            nbytes = len(data)


def serialize(model: onnx.ModelProto, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a model's bytes with the given metadata in place of its own; the same model gives the same bytes."""
    del model.metadata_props[:]
    for key, value in sorted((metadata or {}).items()):
        model.metadata_props.add(key=key, value=value)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def sites_text(compute: str, sites: Iterable[tuple[str, int]]) -> str:
    """Return the metadata text for the sites of a file: `["int8", "x", "relu", ["fc.weight", 0]]`.

    Many names are numbered: i in the place of a name is the name of entry i with the next number.

    >>> sites_text("int8", [("x", -1), ("relu", -1), ("relu_1", -1), ("relu_2", -1), ("fc.weight", 0)])
    '["int8","x","relu",1,1,["fc.weight",0]]'
    """
    entries: list[str | int | list[str | int]] = []
    numbered = _Numbered()
    for position, (name, index) in enumerate(sites):
        if index >= 0:
            entries.append([name, index])
        elif (first := numbered.followed(name)) is not None:
            entries.append(first)
            numbered.next(first)
        else:
            entries.append(name)
            numbered.start(position, name)
    return json.dumps([compute, *entries], separators=(",", ":"))


def sites_from(text: str) -> tuple[str, list[tuple[str, int]]]:
    """Return the arithmetic and the sites from the text that `sites_text` made.

    Raises:
        SourceError: `sites_text` did not write the text.

    >>> sites_from('["int8","x","relu_3",1,["fc.weight",0]]')
    ('int8', [('x', -1), ('relu_3', -1), ('relu_4', -1), ('fc.weight', 0)])
    """
    sites: list[tuple[str, int]] = []
    numbered = _Numbered()
    try:
        compute, *entries = json.loads(text)
        for position, entry in enumerate(entries):
            if isinstance(entry, str):
                numbered.start(position, entry)
                sites.append((entry, -1))
            else:
                sites.append((numbered.next(entry), -1) if isinstance(entry, int) else (str(entry[0]), int(entry[1])))
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        raise SourceError(f"The file's metadata {SITES} is damaged: export it again.") from None
    return str(compute), sites


class _Numbered:
    """The last number of each name, by the entry that began it: `relu` has number 0, `relu_1` number 1."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[str, int]] = {}
        self._follower: dict[str, int] = {}  # the next name, and its entry

    def start(self, position: int, name: str) -> None:
        """Begin to count at an entry that is written out."""
        stem, _, number = name.rpartition("_")
        is_numbered = bool(stem) and number.isascii() and number.isdecimal() and number[0] != "0" and len(number) < 10
        self._note(position, *((stem, int(number)) if is_numbered else (name, 0)))

    def followed(self, name: str) -> int | None:
        """Return the entry whose next name this is."""
        return self._follower.get(name)

    def next(self, position: int) -> str:
        """Count on from an entry; return its next name."""
        stem, number = self._last[position]
        self._note(position, stem, number + 1)
        return f"{stem}_{number + 1}"

    def _note(self, position: int, stem: str, number: int) -> None:
        self._last[position] = stem, number
        self._follower[f"{stem}_{number + 1}"] = position


class GridEntry(NamedTuple):
    """One site's grid in a file's metadata.

    Args:
        bits: width of a code.
        digest: from `digests.grid_digest`.
        offset: the free offset, which the graph may hold in biases only; 0 if there is no such offset.
    """

    bits: int
    digest: str
    offset: float = 0.0


def grids_text(entries: Iterable[GridEntry]) -> str:
    """Return the metadata text for the grids of all sites.

    >>> grids_text([GridEntry(8, "hl831PiDsz5"), GridEntry(4, "J6L4CB6Zs0X", -0.25)])
    '8hl831PiDsz5 4J6L4CB6Zs0X:-0.25'
    """
    return " ".join(f"{e.bits}{e.digest}" + (f":{e.offset!r}" if e.offset else "") for e in entries)


def grids_from(text: str) -> list[GridEntry]:
    """Return the grids from the text that `grids_text` made.

    Raises:
        SourceError: `grids_text` did not write the text.

    >>> grids_from("8hl831PiDsz5 4J6L4CB6Zs0X:-0.25")[1]
    GridEntry(bits=4, digest='J6L4CB6Zs0X', offset=-0.25)
    """
    try:
        parts = [(entry[0], *entry[1:].split(":")) for entry in text.split()]
        return [GridEntry(int(bits), digest, *(float(offset) for offset in rest)) for bits, digest, *rest in parts]
    except (ValueError, TypeError):
        raise SourceError(f"The file's metadata {GRIDS} is damaged: export it again.") from None


def entry_of(model: onnx.ModelProto, key: str) -> str | None:
    """Return one entry of a model's metadata; None if it is missing."""
    return next((entry.value for entry in model.metadata_props if entry.key == key), None)


def _bytes_of(path: Path) -> bytes:
    try:
        return read_plain(path)
    except OSError as e:
        raise SourceError(f"{path} cannot be read: {e.strerror}.") from None


def parsed(path: Path) -> CompressedFile | None:
    """Read an ONNX file, written by qcompress or not; return None if the file has another format.

    Raises:
        SourceError: the file cannot be read.
    """
    data = _bytes_of(path)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception:  # protobuf's DecodeError has no stable import path
        return None
    if not (model.ir_version and model.opset_import and model.HasField("graph")):
        return None
    entries = {entry.key: entry.value for entry in model.metadata_props}
    return CompressedFile(path=path, nbytes=len(data), model=model, metadata=entries)


def read(path: Path) -> CompressedFile:
    """Read an ONNX file, written by qcompress or not.

    Raises:
        SourceError: the file cannot be read, or is not an ONNX model.
    """
    found = parsed(path)
    if found is None:
        raise SourceError(f"{path} is not an ONNX model.")
    return found


def content_digest(model: onnx.ModelProto) -> str:
    """Return the digest of a model without its metadata, so that measurements written into a file stay valid."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.metadata_props[:]
    return short_digest(bare.SerializeToString(deterministic=True))


def validation_path(path: Path) -> Path:
    """Return the path of the JSON file that holds the measurements of a file.

    >>> validation_path(Path("net.w2.onnx")).name
    'net.w2.onnx.validation.json'
    """
    return path.with_name(path.name + ".validation.json")
