"""A compressed model to an ONNX file: encodings chosen, bytes counted, file written whole."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from qcompress.artifacts import Artifact, FloatWeight, IntegerWeight, PalettizedWeight
from qcompress.artifacts.base import bits_per_weight
from qcompress.artifacts.size import SizeReport, ideal_nbytes
from qcompress.compressed.model import CompressedModel
from qcompress.errors import ConfigError
from qcompress.files import check_writable, write_whole
from qcompress.graph.sites import input_sites, layer_input_sites, mark
from qcompress.plan.combinations import QDQ, check_file
from qcompress_exporters.onnx_format import metadata
from qcompress_exporters.onnx_format.encodings.codes import ENCODINGS, choose
from qcompress_exporters.onnx_format.encodings.native import Native
from qcompress_exporters.onnx_format.encodings.words import Words
from qcompress_exporters.onnx_format.int8.grids import grid_entry
from qcompress_exporters.onnx_format.int8.layers import PADDED, SHARED, LayerReport
from qcompress_exporters.onnx_format.lower import FORMATS, Lowered, lower, lower_dynamic, lower_integer
from qcompress_exporters.onnx_format.nbytes import nbytes_with
from qcompress_exporters.onnx_format.targets import BASE_OPSET, DEFAULT_TARGET, Target
from qcompress_exporters.onnx_format.trace import Trace, trace

Leftovers = Literal["float32", "float16"]

# A native type needs a newer opset than the byte table; it is taken where it saves this share of the file.
_WORTH_AN_OPSET: Final = 0.01
_HALF_MAX: Final = float(np.finfo(np.float16).max)
_HALF_STEP: Final = float(np.finfo(np.float16).eps)
_HALF_MIN_SIZE: Final = 32  # below, the Cast costs what the narrower type saves


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReport:
    """How one tensor left.

    Args:
        name: qualified name.
        shape: its shape.
        artifact: kind of artifact.
        bits: bits per code, or of the float type.
        bits_per_weight: its bytes on disk, tables included, per weight.
        nbytes: its bytes on disk, without protobuf.
        float_nbytes: its bytes in the float file.
        encoding: `native`, `words`, `planes`, or the float type.
        why: why this encoding, or why it stayed float.
    """

    name: str
    shape: tuple[int, ...]
    artifact: str
    bits: int
    bits_per_weight: float
    nbytes: int
    float_nbytes: int
    encoding: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was written, to the byte.

    Args:
        path: the file; None where nothing was written.
        target: the oldest runtime that runs it.
        opset: its opset.
        size: ideal, payload, file and original bytes.
        tensors: every tensor of the graph.
        notes: what a user should be told.
        compute: `float`, `int8` or `dynamic8`.
        layers: how each layer is computed; none where all is float.
        saturation: share of the calibration data that each activation's grid clips.
    """

    path: Path | None
    target: str
    opset: int
    size: SizeReport
    tensors: tuple[TensorReport, ...]
    notes: tuple[str, ...]
    compute: str = "float"
    layers: tuple[LayerReport, ...] = ()
    saturation: Mapping[str, float] = field(default_factory=dict)

    @property
    def shrank(self) -> bool:
        """Whether any tensor got smaller."""
        return any(t.nbytes < t.float_nbytes for t in self.tensors)

    @property
    def left_in_float(self) -> tuple[TensorReport, ...]:
        """The tensors that no code was made for."""
        return tuple(t for t in self.tensors if t.artifact == FloatWeight.kind)


@dataclass(frozen=True, slots=True)
class Built:
    """A file in memory.

    Args:
        data: its bytes.
        report: what it holds.
    """

    data: bytes
    report: ExportReport

    def write(self, path: Path, *, force: bool = False, inputs: Sequence[Path] = ()) -> ExportReport:
        """Write the file, whole or not at all; see `files.check_writable`."""
        check_writable(path, force=force, inputs=inputs)
        write_whole(path, self.data)
        return replace(self.report, path=path)


def export(
    model: CompressedModel,
    path: str | Path,
    *,
    target: str = DEFAULT_TARGET,
    format: str | None = None,
    float_leftovers: Leftovers = "float32",
    force: bool = False,
) -> ExportReport:
    """Write a compressed model as ONNX.

    Args:
        model: from `qcompress.compress`, or loaded from a folder.
        path: the file to write.
        target: the oldest onnxruntime that must run it.
        format: how int8 compute is written: `qdq` (the default: quantize and dequantize around float operators, which
            the runtime fuses) or `integer` (QLinearConv, QLinearMatMul, MatMulInteger); None for other compute.
        float_leftovers: type on disk of what stays float.
        force: replace an existing file.

    Raises:
        OutputError: the file exists or cannot be written.
        ConfigError: a target or format that there is not, or a format where compute is not int8.
        SourceError: the graph cannot be written as ONNX.
    """
    path = Path(path)
    check_writable(path, force=force)
    return build(model, target=target, format=format, float_leftovers=float_leftovers).write(path, force=force)


def build(
    model: CompressedModel,
    *,
    target: str = DEFAULT_TARGET,
    format: str | None = None,
    float_leftovers: Leftovers = "float32",
) -> Built:
    """The same file in memory, nothing written; see `export`."""
    runtime = Target.parse(target)
    check_file(model.compute, format)
    sites = sites_of(model)
    graph = trace(mark(model.program, sites))
    artifacts = {name: model.artifacts[name] for name in graph.state_names}
    if float_leftovers == "float16":
        artifacts = {name: a.halved() for name, a in artifacts.items()}
    elif float_leftovers != "float32":
        raise ConfigError(f"float_leftovers must be float32 or float16, got {float_leftovers!r}.")
    original = float_file_nbytes(graph, model.program.state())
    lowered, opset, found = _at_best_opset(_lowering(model, graph, artifacts, format or QDQ), artifacts, runtime)
    entries = [grid_entry(grid) for grid in model.activations.values()] if model.compute == "int8" else []
    data = lowered.serialize(
        {
            metadata.VERSION: package_metadata.version("qcompress"),
            metadata.TARGET: runtime.text,
            metadata.ORIGINAL_BYTES: str(original),
            metadata.PLAN: model.plan_digest,
            metadata.SOURCE: model.source_digest,
            **({metadata.SITES: metadata.sites_text(model.compute, sites)} if sites else {}),
            **({metadata.GRIDS: metadata.grids_text(entries)} if entries else {}),
        }
    )
    count = sum(int(np.prod(a.shape)) for a in artifacts.values())
    ideal = ideal_nbytes([*artifacts.values(), *model.activations.values()])
    report = ExportReport(
        path=None,
        target=runtime.text,
        opset=opset,
        size=SizeReport(ideal=ideal, payload=lowered.payload, file=len(data), original=original, count=count),
        tensors=tuple(_tensor_report(n, a, lowered.encodings[n], opset, runtime, found) for n, a in artifacts.items()),
        notes=(*model.notes, *graph.notes),
        compute=model.compute,
        layers=lowered.layers,
        saturation={name: share for (name, _), share in model.saturation.items()},
    )
    return Built(data, report)


def sites_of(model: CompressedModel) -> list[tuple[str, int]]:
    """The sites that a model's program is marked with, in the order of their marks."""
    if model.compute == "int8":
        return list(model.activations)
    if model.compute == "dynamic8":
        integer = [name for name, artifact in model.artifacts.items() if artifact.integers() is not None]
        return [site.key for site in layer_input_sites(model.program, integer)]
    return []


def unfolded(model: CompressedModel, report: ExportReport) -> list[tuple[str, int]]:
    """The sites whose free offsets keep layers in float, which would compute in int8 if they were zero points.

    Args:
        model: for int8 compute.
        report: of a file of it.

    Returns:
        Keys of `model.activations`; what `posthoc.offsets.snap_offsets` takes.
    """
    sites = sites_of(model)
    inputs = input_sites(mark(model.program, sites))
    found = {sites[inputs[r.weight]] for r in report.layers if r.why in (PADDED, SHARED) and r.weight in inputs}
    return [site for site in sites if site in found]


Lower = Callable[[int], Lowered]


def _lowering(model: CompressedModel, graph: Trace, artifacts: Mapping[str, Artifact], format: str) -> Lower:
    """What writes the graph at an opset."""
    if model.compute == "int8":
        grids = list(model.activations.values())
        return lambda opset: lower_integer(graph, artifacts, opset, grids, FORMATS[format])
    if model.compute == "dynamic8":
        return lambda opset: lower_dynamic(graph, artifacts, opset)
    return lambda opset: lower(graph, artifacts, opset)


def float_file(graph: Trace, state: Mapping[str, Any]) -> bytes:
    """The stripped float ONNX file of a graph: what a compressed file is compared with."""
    floats = {
        name: FloatWeight(values=state[name].detach().cpu().numpy(), reason="original") for name in graph.state_names
    }
    return lower(graph, floats, BASE_OPSET, sign=False).serialize()


def float_file_nbytes(graph: Trace, state: Mapping[str, Any]) -> int:
    """The length of `float_file`, without the memory that it takes."""
    empty = {n: FloatWeight(values=state[n].detach().flatten()[:0].cpu().numpy(), reason="") for n in graph.state_names}
    model = lower(graph, empty, BASE_OPSET, sign=False).model
    open_tensors = [t for t in model.graph.initializer if t.name in empty]
    for tensor in open_tensors:
        tensor.dims[:] = state[tensor.name].shape
        tensor.ClearField("raw_data")
    return nbytes_with(model, {t.name: state[t.name].nbytes for t in open_tensors})


def _at_best_opset(lower: Lower, artifacts: Mapping[str, Artifact], target: Target) -> tuple[Lowered, int, str]:
    """The lowest opset that the widths need; a higher one where its native types save enough of the file.

    Returns:
        The model, its opset, and what was found of native types.
    """
    widths = {a.bits for a in artifacts.values() if isinstance(a, PalettizedWeight | IntegerWeight)}
    best_opset = max((_opset_needed(bits, target) for bits in widths), default=BASE_OPSET)
    best = lower(best_opset)
    nbytes, tried = best.model.ByteSize(), {_choices(widths, best_opset)}
    found = f"opset {best_opset} is needed anyway"
    for opset in (o for o in target.opsets if o > best_opset):
        if _choices(widths, opset) in tried:
            continue
        tried.add(_choices(widths, opset))
        higher = lower(opset)
        saved = 1 - higher.model.ByteSize() / nbytes
        if saved >= _WORTH_AN_OPSET:
            best, best_opset, nbytes = higher, opset, higher.model.ByteSize()
            found = f"native types (opset {opset}) save {saved:.1%} of the file"
        else:
            found = f"native types (opset {opset}) would save {saved:.1%} of the file, less than {_WORTH_AN_OPSET:.0%}"
    return best, best_opset, found


def _opset_needed(bits: int, target: Target) -> int:
    """The lowest opset that we write a width at; native types do not count, they must pay for theirs."""
    opsets = [o for e in ENCODINGS if e.name != Native.name and (o := e.opset(bits)) in target.opsets]
    return opsets[0] if opsets and opsets[0] else BASE_OPSET


def _choices(widths: set[int], opset: int) -> tuple[str, ...]:
    return tuple(choose(bits, opset).name for bits in sorted(widths))


def _why(bits: int, encoding: str, opset: int, target: Target, found: str) -> str:
    """Why a width was written in this way and no other."""
    if encoding == Native.name:
        return found
    native = Native().opset(bits)
    if native is not None:
        return found if native in target.opsets else f"{target.text} has no type of {bits} bits"
    if encoding == Words.name:
        return "a byte holds whole codes" if 8 % bits == 0 else f"its words need opset {opset}"
    return "7 bits make no word" if bits == 7 else f"{target.text} has no type for words of {bits} bits"


def _tensor_report(
    name: str, artifact: Artifact, encoding: str, opset: int, target: Target, found: str
) -> TensorReport:
    if isinstance(artifact, PalettizedWeight | IntegerWeight):
        bits, why = artifact.bits, _why(artifact.bits, encoding, opset, target, found)
    else:
        bits, why = 8 * _itemsize(artifact), getattr(artifact, "reason", "")
    return TensorReport(
        name=name,
        shape=artifact.shape,
        artifact=artifact.kind,
        bits=bits,
        bits_per_weight=bits_per_weight(artifact),
        nbytes=artifact.nbytes,
        float_nbytes=int(np.prod(artifact.shape)) * _float_itemsize(artifact),
        encoding=encoding,
        why=why,
    )


def _itemsize(artifact: Artifact) -> int:
    return artifact.values.itemsize if isinstance(artifact, FloatWeight) else 4


def _float_itemsize(artifact: Artifact) -> int:
    """Of what the graph computes with."""
    return artifact.dequantize().itemsize if isinstance(artifact, FloatWeight) else 4


def _halved(artifact: Artifact) -> Artifact:
    """A float32 leftover as float16, where it fits and pays."""
    if not isinstance(artifact, FloatWeight) or artifact.values.dtype != np.float32:
        return artifact
    values = artifact.values
    largest = float(np.abs(values).max(initial=0.0))
    if values.size < _HALF_MIN_SIZE or largest > _HALF_MAX:
        return artifact
    half = values.astype(np.float16)
    if float(np.abs(half - values).max()) > _HALF_STEP * largest:  # too small for float16 to tell apart
        return artifact
    return FloatWeight(values=half, reason=artifact.reason)
