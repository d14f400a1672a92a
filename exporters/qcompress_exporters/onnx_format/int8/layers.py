"""Layers: which nodes use a weight, and which of them can compute with int8 weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from qcompress.artifacts import Artifact
from qcompress.artifacts.base import Doubles
from qcompress_exporters.onnx_format.int8.activations import Activations, Quantized
from qcompress_exporters.onnx_format.int8.biases import LARGEST, Int8Weight, bias_scale, folded
from qcompress_exporters.onnx_format.int8.clamps import CLAMPS
from qcompress_exporters.onnx_format.passes.replace import input_of, only_user, optional_input

_LAYERS: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MATRIX_PRODUCTS: Final = ("Gemm", "MatMul")
# Why a layer stays in float that would not if its input's offset were a zero point.
PADDED: Final = "its input has a free offset, which only unpadded layers can take up"
SHARED: Final = "something else takes its input's free offset"
COMPARED: Final = "its output is compared with thresholds, which takes floats"


@dataclass(frozen=True, slots=True)
class Layer:
    """One use of a weight by a node.

    Args:
        node: the node.
        weight: qualified name.
        transpose: the Transpose between the weight and the node; None if the node takes the weight itself.
        alone: whether no other node uses the weight.
    """

    node: ir.Node
    weight: str
    transpose: ir.Node | None
    alone: bool

    @property
    def output_axis(self) -> int:
        """The axis of the weight that counts output channels."""
        if self.node.op_type == "Conv":
            return 0
        transposed = self.transpose is not None
        if self.node.op_type == "Gemm":
            return int((self.node.attributes.get_int("transB", 0) == 0) != transposed)
        return 0 if transposed else 1


@dataclass(frozen=True, slots=True)
class IntegerLayer:
    """A layer that can be computed in integers.

    Args:
        layer: the node and its weight.
        source: its input.
        weight: its weight.
        bias: float64 [O], free offsets of the input and of what quantizes the output folded in; None: no bias.
        bias_value: the open tensor that the bias came from; None if the node has no bias.
    """

    layer: Layer
    source: Quantized
    weight: Int8Weight
    bias: Doubles | None
    bias_value: ir.Value | None


def layers_of(open_values: Mapping[str, ir.Value], graph: ir.Graph) -> dict[str, list[Layer]]:
    """Return the layers of each weight that only layers use, by the weight's qualified name."""
    found = {}
    for name, value in open_values.items():
        uses = [use for user in value.consumers() for use in _uses(user, value, graph)]
        if uses and None not in uses:
            found[name] = [Layer(use[0], name, use[1], alone=len(uses) == 1) for use in uses if use is not None]
    return found


def _uses(node: ir.Node, value: ir.Value, graph: ir.Graph) -> list[tuple[ir.Node, ir.Node | None] | None]:
    """Return the nodes, with the Transpose in front, that have a value as their weight; None for any other user."""
    if node.graph is not graph or node.domain:
        return [None]
    if node.op_type in _LAYERS and optional_input(node, 1) is value:
        return [(node, None)]
    if node.op_type != "Transpose" or node.attributes.get_ints("perm", (1, 0)) != (1, 0):
        return [None]
    output = node.outputs[0]
    users = output.consumers()
    if output.is_graph_output() or not all(
        u.graph is graph and u.op_type in MATRIX_PRODUCTS and u.inputs[1] is output for u in users
    ):
        return [None]
    return [(u, node) for u in users]


def int8_weight(layer: Layer, artifact: Artifact, largest: int) -> Int8Weight | str:
    """Return a layer's weight for integer kernels, or why kernels cannot take it.

    Args:
        layer: the layer.
        artifact: its weight.
        largest: elements of the largest weight that onnxruntime decodes at load.
    """
    if math.prod(artifact.shape) > largest:
        return "it is too large to be decoded at load in one part"
    values, axis = artifact.integers(), layer.output_axis
    if values is None:
        return artifact.no_integers
    if values.scale.ndim and values.axis != axis:
        return "its scales are not along its output channels"
    if any(name in layer.node.attributes for name in ("alpha", "beta", "transA")):
        return "its product is scaled"
    return Int8Weight(layer.weight, values.codes, values.scale, axis)


def requantizer(node: ir.Node) -> ir.Node | None:
    """Return the QuantizeLinear that is the only user of a node's output; None if there are others."""
    user = only_user(node.outputs[0])
    return user if user is not None and user.op_type == "QuantizeLinear" else None


@dataclass(frozen=True, slots=True)
class Decisions:
    """Decides which layers compute in integers.

    Args:
        activations: the graph's quantized values.
        artifacts: one for each open tensor.
        open_values: the open tensors' values, by qualified name.
        largest: elements of the largest weight that onnxruntime decodes at load.
    """

    activations: Activations
    artifacts: Mapping[str, Artifact]
    open_values: Mapping[str, ir.Value]
    largest: int

    def integer_layer(self, layer: Layer) -> IntegerLayer | str:
        """Return a layer for integer kernels, or why it stays in float."""
        node, source = layer.node, self.activations.quantized.get(input_of(layer.node, 0))
        if node.op_type == "ConvTranspose":
            return "onnxruntime has no integer kernel for transposed convolutions"
        if source is None:
            return "its input is not quantized"
        weight = int8_weight(layer, self.artifacts[layer.weight], self.largest)
        if isinstance(weight, str):
            return weight
        shift = self.shift_behind(layer)
        if node.op_type == "Conv" and requantizer(node if shift is None else shift[0]) is None:
            return COMPARED if self._is_compared(node.outputs[0]) else "its output is not quantized by itself"
        value = optional_input(node, 2)
        bias = None if value is None else self._bias(value, weight)
        if isinstance(bias, str):
            return bias
        if source.grid.zero_point is None:
            if _pads(node):
                return PADDED
            bias = folded(bias, source.grid, weight)
        if shift is not None:
            bias = (0.0 if bias is None else bias) - np.full(weight.channels, shift[1])
        if bias is not None and np.abs(bias / bias_scale(source.grid, weight)).max(initial=0) > LARGEST:
            return "its bias does not fit 32 bits at the scale of its products"
        return IntegerLayer(layer, source, weight, bias, value)

    def _bias(self, value: ir.Value, weight: Int8Weight) -> Doubles | str:
        name = str(value.name)
        if self.open_values.get(name) is not value or self.artifacts[name].shape != (weight.channels,):
            return "its bias is not a vector of the model"
        return np.asarray(self.artifacts[name].dequantize(), np.float64)

    def shift_behind(self, layer: Layer) -> tuple[ir.Node, float] | None:
        """Return the Sub that is the only user of a layer's output, and its offset, which the bias can take off."""
        user = only_user(layer.node.outputs[0])
        if user is None or layer.node.op_type == "MatMul" or not layer.alone or requantizer(user) is None:
            return None
        offset = self.activations.shifted.get(user.outputs[0])
        return None if offset is None else (user, offset)

    def drop_shift_behind(self, layer: Layer) -> None:
        """Remove the Sub behind a layer whose bias takes the offset off."""
        shift = self.shift_behind(layer)
        if shift is not None:
            shift[0].outputs[0].replace_all_uses_with(layer.node.outputs[0])
            self.activations.writer.graph.remove(shift[0], safe=True)

    def _is_compared(self, value: ir.Value) -> bool:
        """Return whether only thresholds take a value, or a clamp of it."""
        while value not in self.activations.compared:
            user = only_user(value)
            if user is None or user.op_type not in CLAMPS:
                return False
            value = user.outputs[0]
        return all(user.op_type == "Less" for user in value.consumers()) and not value.is_graph_output()


def _pads(node: ir.Node) -> bool:
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    return any(node.attributes.get_ints("pads", ())) or auto not in ("NOTSET", "VALID")
