"""Builds the ONNX file of a compressed model: chooses its opset, counts its bytes, fills in its metadata."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata as package_metadata
from typing import Any, Final

import numpy as np

from qcompress.artifacts import Artifact, FloatWeight
from qcompress.artifacts.base import bits_per_weight
from qcompress.artifacts.size import SizeReport, ideal_nbytes
from qcompress.compressed.model import CompressedModel
from qcompress.errors import QCompressError
from qcompress.graph.channels_first import stored_channels_first
from qcompress.graph.constants import uncomputed
from qcompress.graph.conversion import to_numpy
from qcompress.graph.marks import input_sites, mark
from qcompress.graph.program import FloatProgram
from qcompress.graph.sites import layer_input_sites
from qcompress.graph.tracing import with_fewer_dynamic_axes
from qcompress.graph.widths import activation_widths
from qcompress_exporters.onnx_format import metadata
from qcompress_exporters.onnx_format.encodings.codes import choose
from qcompress_exporters.onnx_format.encodings.native import Native
from qcompress_exporters.onnx_format.int8.between import float_operators
from qcompress_exporters.onnx_format.int8.grids import grid_entry
from qcompress_exporters.onnx_format.int8.layers import PADDED, SHARED
from qcompress_exporters.onnx_format.int8.stepped_biases import stepped
from qcompress_exporters.onnx_format.lower import FORMATS, Lowered, lower, lower_dynamic, lower_integer
from qcompress_exporters.onnx_format.nbytes import nbytes_with
from qcompress_exporters.onnx_format.opsets import BASE_OPSET
from qcompress_exporters.onnx_format.small_integers import shorten_integers
from qcompress_exporters.onnx_format.targets import Target
from qcompress_exporters.onnx_format.trace import Trace, UntranslatedError, trace
from qcompress_exporters.options import BuildOptions
from qcompress_exporters.report import Built, ExportReport, LayerReport, TensorReport

# A newer opset brings smaller types; it is taken where these save this share of the file.
_WORTH_AN_OPSET: Final = 0.01

Lower = Callable[[int], Lowered]


def build(model: CompressedModel, target: Target, options: BuildOptions) -> Built:
    """Return the ONNX file of a compressed model.

    Raises:
        SourceError: the graph cannot be written as ONNX.
    """
    model = stepped(model)
    sites = sites_of(model)
    model, graph = _traced(model, sites)
    artifacts = {name: model.artifacts[name] for name in graph.state_names}
    if options.float_leftovers == "float16":
        artifacts = {name: artifact.halved() for name, artifact in artifacts.items()}
    original = float_file_nbytes(graph, model.program.state())
    lower_at = _lowering(model, graph, artifacts, target, options.way or next(iter(FORMATS)))
    lowered, opset, found = _at_best_opset(lower_at, artifacts, target)
    payload = lowered.payload
    entries = [grid_entry(grid) for grid in model.activations.values()] if model.compute == "int8" else []
    shorten_integers(lowered.model)
    data = lowered.serialize(
        {
            metadata.VERSION: package_metadata.version("qcompress"),
            metadata.TARGET: target.name,
            metadata.ORIGINAL_BYTES: str(original),
            metadata.PLAN: model.plan_digest,
            metadata.SOURCE: model.source_digest,
            **({metadata.SITES: metadata.sites_text(model.compute, sites)} if sites else {}),
            **({metadata.GRIDS: metadata.grids_text(entries)} if entries else {}),
            **_stored_as(model.program),
        }
    )
    count = sum(int(np.prod(a.shape)) for a in artifacts.values())
    ideal = ideal_nbytes([*artifacts.values(), *model.activations.values()])
    report = ExportReport(
        path=None,
        target=target.name,
        runs_on=target.runs_on,
        opset=opset,
        size=SizeReport(ideal=ideal, payload=payload, file=len(data), original=original, count=count),
        tensors=tuple(
            _tensor_report(name, artifact, lowered.encodings[name], _why(artifact, opset, target, found))
            for name, artifact in artifacts.items()
        ),
        notes=tuple(dict.fromkeys((*model.notes, *graph.notes, *map(_unfolded_note, lowered.unfolded)))),
        compute=model.compute,
        layers=_with_widths(model, lowered.layers),
        float_operators=float_operators(lowered.model, [r.weight for r in lowered.layers if r.compute == "int8"]),
        saturation={name: share for (name, _), share in model.saturation.items()},
    )
    return Built(data, report)


def _unfolded_note(weight: str) -> str:
    return (
        f"{weight} is decoded at each run, which is slow: it is too large for onnxruntime to decode at load, and what "
        "takes it cannot take parts of it. Leave it in float: skip = true for it in a --plan."
    )


def _traced(model: CompressedModel, sites: Sequence[tuple[str, int]]) -> tuple[CompressedModel, Trace]:
    """Return the ONNX graph of a model, and the model: with fewer dynamic axes if torch.onnx can write it only so."""
    try:
        return model, trace(mark(model.program, sites))
    except UntranslatedError as e:
        failure = e
    for program, what in with_fewer_dynamic_axes(model.program):
        try:
            graph = trace(mark(program, sites))
        except QCompressError:
            continue
        note = f"Exported with {what}, because it cannot be written otherwise. {failure}"
        return replace(model, program=program, notes=(*model.notes, note)), graph
    raise failure


def _with_widths(model: CompressedModel, layers: Iterable[LayerReport]) -> tuple[LayerReport, ...]:
    """Return the reports with the bits at which each layer takes its activations."""
    if model.compute == "dynamic8":
        return tuple(replace(layer, activation_bits=8 if layer.compute == "dynamic8" else None) for layer in layers)
    bits = {site: grid.bits for site, grid in model.activations.items()}
    widths = activation_widths(model.program, bits) if model.compute == "int8" else {}
    return tuple(replace(layer, activation_bits=widths.get(layer.weight)) for layer in layers)


def sites_of(model: CompressedModel) -> list[tuple[str, int]]:
    """Return the sites that a model's program is marked with, in the order of their marks."""
    if model.compute == "int8":
        return list(model.activations)
    if model.compute == "dynamic8":
        integer = [name for name, artifact in model.artifacts.items() if artifact.integers() is not None]
        return [site.key for site in layer_input_sites(model.program, integer)]
    return []


def _stored_as(program: FloatProgram) -> dict[str, str]:
    """Return the metadata from which `validate` knows how the program stores weights, where that is not as usual."""
    moved = stored_channels_first(program)
    return {
        **({metadata.CHANNELS_FIRST: json.dumps(moved)} if moved else {}),
        **({metadata.UNCOMPUTED: "1"} if {*uncomputed(program.exported)} - {*moved} else {}),
    }


def unfolded(model: CompressedModel, report: ExportReport) -> list[tuple[str, int]]:
    """Return the sites whose free offsets keep layers in float that would compute in int8 with zero points.

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


def _lowering(
    model: CompressedModel, graph: Trace, artifacts: Mapping[str, Artifact], target: Target, way: str
) -> Lower:
    """Return the function that writes the graph at an opset."""
    folded = target.folded
    if model.compute == "int8":
        grids = list(model.activations.values())
        return lambda opset: lower_integer(graph, artifacts, opset, grids, FORMATS[way], folded=folded)
    if model.compute == "dynamic8":
        return lambda opset: lower_dynamic(graph, artifacts, opset, folded=folded)
    return lambda opset: lower(graph, artifacts, opset, folded=folded)


def float_file(graph: Trace, state: Mapping[str, Any]) -> bytes:
    """Return the stripped float ONNX file of a graph, which a compressed file is compared with."""
    floats = {name: FloatWeight(values=to_numpy(state[name]), reason="original") for name in graph.state_names}
    return lower(graph, floats, BASE_OPSET, sign=False).serialize()


def float_file_nbytes(graph: Trace, state: Mapping[str, Any]) -> int:
    """Return the length of `float_file`, without the memory that it takes."""
    empty = {n: FloatWeight(values=to_numpy(state[n].flatten()[:0]), reason="") for n in graph.state_names}
    model = lower(graph, empty, BASE_OPSET, sign=False).model
    open_tensors = [t for t in model.graph.initializer if t.name in empty]
    for tensor in open_tensors:
        tensor.dims[:] = state[tensor.name].shape
        tensor.ClearField("raw_data")
    return nbytes_with(model, {t.name: state[t.name].nbytes for t in open_tensors})


def _at_best_opset(lower_at: Lower, artifacts: Mapping[str, Artifact], target: Target) -> tuple[Lowered, int, str]:
    """Write the graph at the base opset, or at a newer one whose native types save enough of the file.

    Returns:
        The model, its opset, and what was found of native types.
    """
    widths = {artifact.bits for artifact in artifacts.values() if not artifact.reason}
    best_opset, *newer = target.opsets
    best = lower_at(best_opset)
    nbytes, tried = best.model.ByteSize(), {_choices(widths, best_opset)}
    found = ""
    for opset in newer:
        if _choices(widths, opset) in tried:
            continue
        tried.add(_choices(widths, opset))
        higher = lower_at(opset)
        saved = 1 - higher.model.ByteSize() / nbytes
        if saved >= _WORTH_AN_OPSET:
            best, best_opset, nbytes = higher, opset, higher.model.ByteSize()
            found = f"native types (opset {opset}) save {saved:.1%} of the file"
        else:
            found = f"native types (opset {opset}) would save {saved:.1%} of the file, less than {_WORTH_AN_OPSET:.0%}"
    return best, best_opset, found


def _choices(widths: Iterable[int], opset: int) -> tuple[str, ...]:
    return tuple(choose(bits, opset).name for bits in sorted(widths))


def _why(artifact: Artifact, opset: int, target: Target, found: str) -> str:
    """Return why a tensor has its encoding, or why it is left in float."""
    if artifact.reason:
        return artifact.reason
    needed = Native().opset(artifact.bits)
    if needed in target.opsets:
        return found
    if needed is not None:
        return f"{target.name} allows no type of {artifact.bits} bits"
    return choose(artifact.bits, opset).why


def _tensor_report(name: str, artifact: Artifact, encoding: str, why: str) -> TensorReport:
    return TensorReport(
        name=name,
        shape=artifact.shape,
        artifact=artifact.kind,
        bits=artifact.bits,
        bits_per_weight=bits_per_weight(artifact),
        nbytes=artifact.nbytes,
        float_nbytes=int(np.prod(artifact.shape)) * artifact.decoded_dtype.itemsize,
        encoding=encoding,
        why=why,
    )
