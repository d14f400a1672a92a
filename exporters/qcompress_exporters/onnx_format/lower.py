"""Put artifacts into the open weights of a trace, and serialize: same input, same bytes."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx
import onnx_ir as ir
from onnx import numpy_helper
from onnx_ir.passes import common

from qcompress.artifacts import Artifact, SiteGrid
from qcompress.errors import SourceError
from qcompress_exporters.onnx_format.encodings.formats import WeightFormat
from qcompress_exporters.onnx_format.encodings.table import WEIGHTS
from qcompress_exporters.onnx_format.graph_writer import GraphWriter, names_in
from qcompress_exporters.onnx_format.int8 import dynamic, integer, operators, qdq
from qcompress_exporters.onnx_format.int8.activations import Activations
from qcompress_exporters.onnx_format.int8.grid_format import Formats
from qcompress_exporters.onnx_format.int8.grids import GRIDS
from qcompress_exporters.onnx_format.int8.tensors import Tensors
from qcompress_exporters.onnx_format.int8.write_layer import WriteLayer
from qcompress_exporters.onnx_format.metadata import serialize
from qcompress_exporters.onnx_format.names import reserved_names
from qcompress_exporters.onnx_format.parts import FOLDED, largest_part
from qcompress_exporters.onnx_format.passes.drop_marks import DropMarks
from qcompress_exporters.onnx_format.passes.hoist_marks import HoistMarks
from qcompress_exporters.onnx_format.passes.shorten_names import ShortenNames
from qcompress_exporters.onnx_format.trace import Trace
from qcompress_exporters.report import LayerReport

# How layers of integer compute can be written: a new format is a file and a line here.
FORMATS: Final[Mapping[str, WriteLayer]] = {"qdq": qdq.write_layer, "integer": operators.write_layer}


@dataclass(frozen=True, slots=True)
class Lowered:
    """An ONNX model, and how each tensor was written.

    Args:
        model: complete but for its metadata.
        encodings: name of the encoding by qualified name.
        layers: how each is computed; empty where all is float.
        unfolded: weights that are decoded at each run; see `parts`.
    """

    model: onnx.ModelProto
    encodings: Mapping[str, str]
    layers: tuple[LayerReport, ...] = ()
    unfolded: tuple[str, ...] = ()

    @property
    def payload(self) -> int:
        """Bytes of all initializers."""
        return sum(len(t.raw_data) or numpy_helper.to_array(t).nbytes for t in self.model.graph.initializer)

    def serialize(self, metadata: Mapping[str, str] | None = None) -> bytes:
        """Return the file's bytes."""
        return serialize(self.model, metadata)


def lower(
    trace: Trace,
    artifacts: Mapping[str, Artifact],
    opset: int,
    *,
    sign: bool = True,
    folded: int = FOLDED,
    weights: Mapping[str, WeightFormat] = WEIGHTS,
) -> Lowered:
    """Write a graph for float compute.

    Args:
        trace: the graph.
        artifacts: one for each tensor of `trace.state_names`.
        opset: one that the target reads.
        sign: whether tensors carry their digests.
        folded: bytes of the largest value that the runtime computes at load.
        weights: what writes each kind of artifact.

    Returns:
        The model. The decoded value of each tensor goes by its qualified name, and the node or initializer that
        gives it carries a digest of name and value as its doc string, taken from the artifact: what `validate`
        compares with what the runtime decodes.
    """
    model = trace.at_opset(opset)
    tensors = _tensors(model, trace, artifacts, weights, folded, signed=sign)
    # The names of the trace stay, so that two files of one trace can be compared value by value.
    return _finished(model, tensors, (), set(names_in(model.graph)))


def lower_integer(
    trace: Trace,
    artifacts: Mapping[str, Artifact],
    opset: int,
    grids: Sequence[SiteGrid],
    write: WriteLayer,
    *,
    folded: int = FOLDED,
    formats: Formats = GRIDS,
    weights: Mapping[str, WeightFormat] = WEIGHTS,
) -> Lowered:
    """Write a marked graph for integer compute.

    Args:
        trace: of a marked program.
        artifacts: one for each tensor of `trace.state_names`.
        opset: one that the target reads.
        grids: one for each mark.
        write: how a layer that can be computed in integers is written: a value of FORMATS.
        folded: bytes of the largest value that the runtime computes at load.
        formats: what writes each kind of grid.
        weights: what writes each kind of artifact.

    Returns:
        The model. The codes of site i are called `q<i>`. Weights of integer layers go by their qualified names as
        int8, int32 biases by theirs. The digest of such a weight is followed by the name of its scale.
    """
    model = _marked(trace, opset)
    HoistMarks(trace.state_names)(model)
    tensors = _tensors(model, trace, artifacts, weights, folded)
    activations = Activations(tensors.writer, grids, formats)
    activations.quantize()
    return _finished(model, tensors, integer.write_layers(activations, tensors, write), _looked_up(trace))


def lower_dynamic(
    trace: Trace,
    artifacts: Mapping[str, Artifact],
    opset: int,
    *,
    folded: int = FOLDED,
    weights: Mapping[str, WeightFormat] = WEIGHTS,
) -> Lowered:
    """Write a graph whose matrix products quantize their marked inputs at run time; see `dynamic`."""
    model = _marked(trace, opset)
    tensors = _tensors(model, trace, artifacts, weights, folded)
    reports = dynamic.write_layers(tensors)
    DropMarks()(model)
    return _finished(model, tensors, reports, _looked_up(trace))


def _marked(trace: Trace, opset: int) -> ir.Model:
    """Return a marked graph in which no value has a name that codes of activations will have."""
    model, reserved = trace.at_opset(opset, marked=True), reserved_names(trace.state_names, trace.marks)
    taken = [str(v.name) for v in (*model.graph.inputs, *model.graph.outputs) if v.name in reserved]
    if taken:
        raise SourceError(
            f"Files for integer compute give the name {taken[0]} to codes of an activation, so that no input, output "
            "or parameter can have it: choose another with --input-names or --output-names, or rename the parameter."
        )
    return model


def _tensors(
    model: ir.Model,
    trace: Trace,
    artifacts: Mapping[str, Artifact],
    weights: Mapping[str, WeightFormat],
    folded: int,
    *,
    signed: bool = True,
) -> Tensors:
    own = len(model.graph.inputs) - len(trace.state_names)  # the program's own inputs come first
    open_values = dict(zip(trace.state_names, model.graph.inputs[own:], strict=True))
    writer = GraphWriter(model.graph, _looked_up(trace))
    opset = model.graph.opset_imports[""]
    return Tensors(writer, artifacts, open_values, opset, weights, signed, largest_part(folded))


def _looked_up(trace: Trace) -> set[str]:
    """Return the names that parity looks up."""
    return {*trace.state_names, *reserved_names(trace.state_names, trace.marks)}


def _finished(model: ir.Model, tensors: Tensors, layers: Iterable[LayerReport], keep: Collection[str]) -> Lowered:
    """Write the tensors that no integer layer took, and put the graph together.

    Args:
        model: its inputs hold the open tensors.
        tensors: writes them.
        layers: reports.
        keep: names that stay; all others become as short as can be.
    """
    graph = model.graph
    tensors.write_rest()
    for value in tensors.open_values.values():
        graph.inputs.remove(value)
    for name, value in list(graph.initializers.items()):
        # A tensor of the model stays even where every layer has its own in integers.
        if not value.uses() and not value.is_graph_output() and name not in tensors.open_values:
            del graph.initializers[name]
    passes = common.TopologicalSortPass(), common.RemoveUnusedOpsetsPass(), ShortenNames({*keep, *tensors.parts})
    ir.passes.Sequential(*passes)(model)
    tensors.sign_codes()
    return Lowered(ir.to_proto(model), tensors.encodings, tuple(layers), tuple(tensors.whole))
