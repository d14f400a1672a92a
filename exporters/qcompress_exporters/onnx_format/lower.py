"""Put artifacts into the open weights of a trace, and serialize: same input, same bytes."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from qcompress.artifacts import Artifact, FloatWeight, IntegerWeight, PalettizedWeight, SiteGrid
from qcompress.errors import ConfigError
from qcompress_exporters.onnx_format.digests import tensor_digest
from qcompress_exporters.onnx_format.edit import GraphEditor, values_taken
from qcompress_exporters.onnx_format.encodings.base import GraphWriter
from qcompress_exporters.onnx_format.encodings.palette import choose, write_palette
from qcompress_exporters.onnx_format.encodings.uniform import write_uniform
from qcompress_exporters.onnx_format.int8 import dynamic, qdq
from qcompress_exporters.onnx_format.int8 import operators as integer
from qcompress_exporters.onnx_format.int8.lowering import (
    SHARED,
    IntegerLayer,
    Layer,
    Lowering,
    bias_name,
    code_name,
    code_scale_name,
    offset_name,
    pair_saturation,
    scale_name,
)
from qcompress_exporters.onnx_format.metadata import serialize
from qcompress_exporters.onnx_format.names import ShortNames
from qcompress_exporters.onnx_format.trace import DOMAIN, Trace
from qcompress_exporters.report import LayerReport

_WIDEN: Final = {TensorProto.FLOAT16, TensorProto.BFLOAT16}

WriteLayer = Callable[[Lowering, IntegerLayer], None]

# How layers of integer compute can be written: a new format is a file and a line here.
FORMATS: Final[Mapping[str, WriteLayer]] = {"qdq": qdq.write_layer, "integer": integer.write_layer}


@dataclass(frozen=True, slots=True)
class Lowered:
    """An ONNX model, and how each tensor was written.

    Args:
        model: complete but for its metadata.
        encodings: name of the encoding by qualified name.
        layers: how each is computed; none where all is float.
    """

    model: onnx.ModelProto
    encodings: Mapping[str, str]
    layers: tuple[LayerReport, ...] = ()

    @property
    def payload(self) -> int:
        """Bytes of all initializers."""
        return sum(len(t.raw_data) or numpy_helper.to_array(t).nbytes for t in self.model.graph.initializer)

    def serialize(self, metadata: Mapping[str, str] | None = None) -> bytes:
        """The file's bytes."""
        return serialize(self.model, metadata)


def lower(trace: Trace, artifacts: Mapping[str, Artifact], opset: int, *, sign: bool = True) -> Lowered:
    """Write every open weight of a trace.

    Args:
        trace: the graph.
        artifacts: one for each tensor of `trace.state_names`.
        opset: one that the target reads.
        sign: whether tensors carry their digests.

    Returns:
        The model. The decoded value of each tensor goes by its qualified name, and the node or initializer that
        gives it carries a digest of name and value as its doc string, taken from the artifact: what `validate`
        compares with what the runtime decodes.
    """
    model = trace.at_opset(opset)
    graph = model.graph
    writer = GraphWriter(ShortNames(_names_in(graph)))
    encodings = {}
    for name in trace.state_names:
        encodings[name] = write_artifact(writer, artifacts[name], name, opset)
        if sign:
            writer.sign_last(tensor_digest(name, artifacts[name].dequantize()))
    is_open = set(trace.state_names)
    inputs = [v for v in graph.input if v.name not in is_open]
    nodes = list(graph.node)
    del graph.input[:], graph.node[:]
    graph.input.extend(inputs)
    graph.node.extend([*writer.nodes, *nodes])
    while writer.initializers:  # one by one: a large model is not held twice
        graph.initializer.append(writer.initializers.pop(0))
    return Lowered(model, encodings)


def _names_in(graph: onnx.GraphProto) -> Iterator[str]:
    """Every value's name, those of subgraphs included: they share one name space."""
    for value in (*graph.input, *graph.output, *graph.initializer):
        yield value.name
    for node in graph.node:
        yield from (*node.input, *node.output)
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _names_in(inner)


def lower_integer(
    trace: Trace,
    artifacts: Mapping[str, Artifact],
    opset: int,
    grids: Sequence[SiteGrid],
    write: WriteLayer,
) -> Lowered:
    """Write a marked graph for integer compute.

    Args:
        trace: of a marked program.
        artifacts: one for each tensor of `trace.state_names`.
        opset: one that the target reads.
        grids: one for each mark.
        write: how a layer that can be computed in integers is written: a value of FORMATS.

    Returns:
        The model. The codes of site i are called `q<i>`. Weights of integer layers go by their qualified names as
        int8, their scales by that name and `_scale`; int32 biases by theirs.
    """
    lowering, model = _begin(trace, artifacts, opset, grids)
    lowering.quantize()
    layers = lowering.layers()
    nodes = {id(use.node): use for uses in layers.values() for use in uses}

    alone = {key: lowering.integer_layer(use) for key, use in nodes.items()}

    def takes_offset(user: onnx.NodeProto) -> bool:
        use = nodes.get(id(user))
        return use is not None and use.alone and isinstance(alone[id(user)], IntegerLayer)

    added = lowering.add_offsets(takes_offset)
    reports = []
    for name, uses in layers.items():
        found = [_unless_added(alone[id(use.node)], lowering.integer_layer(use)) for use in uses]
        why = next((f for f in found if isinstance(f, str)), "")
        offset = _offset_of(uses[0], found[0], added)
        saturation = max((_saturation(layer) for layer in found), default=0.0) if not why else 0.0
        reports.append(LayerReport(name, "float" if why else "int8", why, offset, saturation))
        for use, layer in zip(uses, found, strict=True):
            if isinstance(layer, IntegerLayer) and not why:
                lowering.fold_behind(use)
                write(lowering, layer)
            else:
                lowering.shield(use)
    return _finish(model, lowering, trace, reports)


def lower_dynamic(trace: Trace, artifacts: Mapping[str, Artifact], opset: int) -> Lowered:
    """Write a graph whose matrix products quantize their marked inputs at run time; see `dynamic`."""
    lowering, model = _begin(trace, artifacts, opset, ())
    reports = dynamic.write_layers(lowering)
    return _finish(model, lowering, trace, reports)


def _saturation(layer: IntegerLayer | str) -> float:
    return 0.0 if isinstance(layer, str) else pair_saturation(layer.weight, layer.source.grid.levels)


def _unless_added(alone: IntegerLayer | str, found: IntegerLayer | str) -> IntegerLayer | str:
    """A layer, or why it cannot be one: for itself alone, or for what else takes its input."""
    if isinstance(alone, str):
        return alone
    return SHARED if isinstance(found, str) else found


def _offset_of(use: Layer, found: IntegerLayer | str, added: Container[str]) -> str:
    if use.node.input[0] in added:
        return "added"
    if isinstance(found, str):
        return ""
    return "zero point" if found.source.grid.zero_point is not None else "folded"


def _begin(
    trace: Trace, artifacts: Mapping[str, Artifact], opset: int, grids: Sequence[SiteGrid]
) -> tuple[Lowering, onnx.ModelProto]:
    model = trace.at_opset(opset, marked=True)
    fixed = {text(i) for text in (code_name, code_scale_name) for i in range(trace.marks)} | {
        scale_name(name) for name in trace.state_names
    }
    fixed |= {text.format(i) for text in (dynamic.SCALE, dynamic.ZERO_POINT) for i in range(trace.marks)}
    fixed |= {text(n, i) for text in (bias_name, offset_name) for n in trace.state_names for i in range(trace.marks)}
    names = ShortNames({*_names_in(model.graph), *fixed})
    return Lowering(GraphEditor(model.graph, names), GraphWriter(names), artifacts, grids, opset), model


def _finish(model: onnx.ModelProto, lowering: Lowering, trace: Trace, layers: list[LayerReport]) -> Lowered:
    """Write the tensors that no integer layer took, and put the graph together."""
    graph, writer = model.graph, lowering.writer
    for marks in [o for o in model.opset_import if o.domain == DOMAIN]:  # none is left
        model.opset_import.remove(marks)
    for name in trace.state_names:
        if name not in lowering.encodings:
            lowering.encodings[name] = write_artifact(writer, lowering.artifacts[name], name, lowering.opset)
            lowering.sign(name, lowering.artifacts[name].dequantize())
    is_open = set(trace.state_names)
    inputs = [v for v in graph.input if v.name not in is_open]
    nodes = lowering.graph.finish(writer.nodes)
    used = {name for node in nodes for name in values_taken(node)} | {v.name for v in graph.output}
    used |= set(trace.state_names)  # a bias that every layer has in integers of its own
    initializers = [t for t in (*graph.initializer, *writer.initializers) if t.name in used]
    del graph.input[:], graph.node[:], graph.initializer[:]
    graph.input.extend(inputs)
    graph.node.extend(nodes)
    graph.initializer.extend(initializers)
    return Lowered(model, lowering.encodings, tuple(layers))


def write_artifact(writer: GraphWriter, artifact: Artifact, name: str, opset: int) -> str:
    """Write one tensor as the value `name`; returns the name of the encoding."""
    if isinstance(artifact, PalettizedWeight):
        encoding = choose(artifact.bits, opset)
        write_palette(writer, artifact, name, encoding)
        return encoding.name
    if isinstance(artifact, IntegerWeight):
        return write_uniform(writer, artifact, name, opset)
    if isinstance(artifact, FloatWeight):
        return _write_float(writer, artifact.values, name)
    raise ConfigError(f"{name}: this version writes palettes, uniform grids and floats, got {type(artifact).__name__}.")


def _write_float(writer: GraphWriter, values: Any, name: str) -> str:
    tensor = onnx.numpy_helper.from_array(np.array(values, order="C"))
    if tensor.data_type in _WIDEN:
        writer.node("Cast", [writer.tensor(values)], to=TensorProto.FLOAT)
        writer.name_last(name)
    else:
        writer.tensor(values, name)
    return str(values.dtype)
