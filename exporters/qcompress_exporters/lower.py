"""Put artifacts into the open weights of a trace, and serialize: same input, same bytes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from qcompress.artifacts import Artifact, FloatWeight, PalettizedWeight, digest, short_digest
from qcompress.errors import ConfigError
from qcompress_exporters.encodings.base import GraphWriter
from qcompress_exporters.encodings.palette import choose, write_palette
from qcompress_exporters.names import ShortNames
from qcompress_exporters.trace import Trace

_WIDEN: Final = {TensorProto.FLOAT16, TensorProto.BFLOAT16}


@dataclass(frozen=True, slots=True)
class Lowered:
    """An ONNX model, and how each tensor was written.

    Args:
        model: complete but for its metadata.
        encodings: name of the encoding by qualified name.
    """

    model: onnx.ModelProto
    encodings: Mapping[str, str]

    @property
    def payload(self) -> int:
        """Bytes of all initializers."""
        return sum(len(t.raw_data) for t in self.model.graph.initializer)

    def serialize(self, metadata: Mapping[str, str] | None = None) -> bytes:
        """The file's bytes."""
        return serialize(self.model, metadata)


def serialize(model: onnx.ModelProto, metadata: Mapping[str, str] | None = None) -> bytes:
    """A model's bytes with the given metadata in place of its own."""
    del model.metadata_props[:]
    for key, value in sorted((metadata or {}).items()):
        model.metadata_props.add(key=key, value=value)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


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
    graph.initializer.extend(writer.initializers)
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


def tensor_digest(name: str, values: npt.NDArray[Any]) -> str:
    """11 characters for a decoded tensor under its name.

    >>> tensor_digest("a", np.zeros(2)) == tensor_digest("b", np.zeros(2))
    False
    """
    return short_digest(name.encode(), digest(values).encode())


def write_artifact(writer: GraphWriter, artifact: Artifact, name: str, opset: int) -> str:
    """Write one tensor as the value `name`; returns the name of the encoding."""
    if isinstance(artifact, PalettizedWeight):
        encoding = choose(artifact.bits, opset)
        write_palette(writer, artifact, name, encoding)
        return encoding.name
    if isinstance(artifact, FloatWeight):
        return _write_float(writer, artifact.values, name)
    raise ConfigError(f"{name}: this version writes palettized and float weights, got {type(artifact).__name__}.")


def _write_float(writer: GraphWriter, values: Any, name: str) -> str:
    tensor = onnx.numpy_helper.from_array(np.array(values, order="C"))
    if tensor.data_type in _WIDEN:
        writer.node("Cast", [writer.tensor(values)], to=TensorProto.FLOAT)
        writer.name_last(name)
    else:
        writer.tensor(values, name)
    return str(values.dtype)
