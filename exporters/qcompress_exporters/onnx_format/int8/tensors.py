"""Weights and biases of integer layers, each written once, by the names that parity looks up."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompress.artifacts import Artifact
from qcompress_exporters.onnx_format.digests import tensor_digest
from qcompress_exporters.onnx_format.encodings.formats import WeightFormat
from qcompress_exporters.onnx_format.encodings.table import write_int8, write_weight
from qcompress_exporters.onnx_format.graph_writer import GraphWriter, sign
from qcompress_exporters.onnx_format.int8.activations import Quantized
from qcompress_exporters.onnx_format.int8.biases import Int8Weight
from qcompress_exporters.onnx_format.int8.layers import IntegerLayer, Layer
from qcompress_exporters.onnx_format.names import bias_name, offset_name, part_name, scale_name
from qcompress_exporters.onnx_format.parts import FOLDED, Part, axes_of, largest_part, take_parts


@dataclass(slots=True)
class Tensors:
    """Writes the tensors of a model; each carries its digest, taken from the artifact.

    Args:
        writer: of the graph.
        artifacts: one for each open tensor.
        open_values: the open tensors' values, by qualified name.
        opset: of the file.
        weights: what writes each kind of artifact.
        signed: whether tensors carry digests.
        largest: elements of the largest weight that the runtime decodes at load in one part.
        encodings: how each tensor is written, by qualified name.
        parts: names of the parts of larger weights.
        whole: larger weights that are no parts, because something takes them that takes no parts.
    """

    writer: GraphWriter
    artifacts: Mapping[str, Artifact]
    open_values: Mapping[str, ir.Value]
    opset: int
    weights: Mapping[str, WeightFormat]
    signed: bool = True
    largest: int = largest_part(FOLDED)
    encodings: dict[str, str] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    _int8: dict[str, tuple[ir.Value, ir.Value]] = field(default_factory=dict)
    _codes_digests: dict[str, str] = field(default_factory=dict)
    _transposed: dict[str, ir.Value] = field(default_factory=dict)
    _biases: dict[str, ir.Value] = field(default_factory=dict)

    def write_rest(self) -> None:
        """Write every tensor that no integer layer took, in the type that the graph computes with."""
        for name, value in self.open_values.items():
            if name not in self.encodings and not self._write_parts(name, value):
                value.replace_all_uses_with(self._decoded(name, name, self.artifacts[name]))

    def _write_parts(self, name: str, value: ir.Value) -> bool:
        """Write a weight that is too large to be decoded at load in one part; return False for all others."""
        artifact = self.artifacts[name]
        decoded = math.prod(artifact.shape) * artifact.decoded_dtype.itemsize
        if math.prod(artifact.shape) <= self.largest or artifact.nbytes >= decoded:
            return False
        for axis in axes_of(value, self.writer.graph):
            cut = artifact.parts(axis, self.largest)
            if not cut:
                continue
            parts, start = [], 0
            for number, piece in enumerate(cut):
                self.parts.append(part_name(name, axis, number))
                stop = start + piece.shape[axis]
                parts.append(Part(self._decoded(name, self.parts[-1], piece), start, stop))
                start = stop
            take_parts(self.writer, value, axis, parts)
            return True
        self.whole.append(name)
        return False

    def _decoded(self, weight: str, name: str, artifact: Artifact) -> ir.Value:
        """Write what decodes a weight or a part of it to the value `name`."""
        written = write_weight(self.writer, artifact, name, self.opset, self.weights)
        self.encodings[weight] = written.encoding
        if self.signed:
            sign(written.value, tensor_digest(name, artifact.dequantize()))
        return written.value

    def weight(self, weight: Int8Weight, *, kernel_order: bool) -> tuple[ir.Value, ir.Value]:
        """Return the int8 codes of a weight, called by its qualified name, and its scale, which has a short name.

        Args:
            weight: the weight.
            kernel_order: [in, out] for a matrix, as products take it, instead of the weight's own order.
        """
        name = weight.name
        if name not in self._int8:
            written = write_int8(self.writer, self.artifacts[name], name, self.opset, self.weights)
            self.encodings[name] = written.encoding
            scale = self.writer.tensor(np.asarray(weight.scale))
            sign(scale, tensor_digest(scale_name(name), weight.scale))
            self._int8[name] = written.value, scale
            self._codes_digests[name] = tensor_digest(name, weight.codes)
        codes, scale = self._int8[name]
        if not kernel_order or weight.axis != 0:
            return codes, scale
        if name not in self._transposed:
            self._transposed[name] = self.writer.node("Transpose", [codes], perm=[1, 0])
        return self._transposed[name], scale

    def sign_codes(self) -> None:
        """Let the int8 codes of each weight carry their digest and the name of their scale, which is final by now."""
        for name, (codes, scale) in self._int8.items():
            sign(codes, self._codes_digests[name] + str(scale.name))

    def bias(
        self,
        layer: IntegerLayer,
        values: npt.NDArray[Any],
        quantized: Mapping[ir.Value, Quantized],
        others: Sequence[Layer],
    ) -> ir.Value:
        """Return a layer's bias as it is computed with.

        It is called by its qualified name where all that take it are layers of one site and one weight; else by the
        names of weight and site: `bias_name`, or `offset_name` for an offset that is added behind a product.

        Args:
            layer: the layer.
            values: int32 or float32.
            quantized: the graph's quantized values.
            others: all layers of its weight.
        """
        behind = layer.layer.node.op_type == "MatMul"
        apart = (offset_name if behind else bias_name)(layer.weight.name, layer.source.site)
        if apart not in self._biases:
            own, name = layer.bias_value, apart
            if own is not None and not own.is_graph_output():
                same = {id(use.node) for use in others if _site(use.node, quantized) == layer.source.site}
                if all(id(user) in {*same, id(layer.layer.node)} for user in own.consumers()):
                    name = str(own.name)
                    self.encodings[name] = str(values.dtype)
            self._biases[apart] = self._tensor(name, values)
        return self._biases[apart]

    def _tensor(self, name: str, values: npt.NDArray[Any]) -> ir.Value:
        value = self.writer.tensor(np.asarray(values), name)
        sign(value, tensor_digest(name, values))
        return value


def _site(node: ir.Node, quantized: Mapping[ir.Value, Quantized]) -> int | None:
    value = node.inputs[0]
    source = None if value is None else quantized.get(value)
    return None if source is None else source.site
