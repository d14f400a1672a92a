"""The float operators between integer layers of a file: what costs time there although all layers are in integers."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

import onnx

from qcompress_exporters.onnx_format.layer_weight import LAYERS, layer_weight

_INTEGER_LAYERS: Final = ("QLinearConv", "QLinearMatMul", "MatMulInteger")
# What onnxruntime computes on codes where dequantizers stand in front and a quantizer behind.
_FUSED: Final = ("Add", "AveragePool", "Concat", "GlobalAveragePool", "LeakyRelu", "Mul", "Sigmoid")
_SCALES: Final = ("Cast", "Mul", "Add")  # what makes floats of an integer layer's sums, and adds its bias
# What moves values, or computes their sizes: it costs little, in floats too.
_MOVES: Final = (
    "Cast", "Constant", "ConstantOfShape", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad",
    "Range", "Reshape", "Resize", "Shape", "Size", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip


def float_operators(model: onnx.ModelProto, weights: Collection[str]) -> dict[str, int]:
    """Count the float operators that lie between two integer layers: no layers, and nothing that only moves values.

    Args:
        model: one of our files, for int8 compute; its nodes are in order.
        weights: the qualified names of the weights of its integer layers.

    Returns:
        How often each operator occurs, the most frequent first; nothing without integer layers.
    """
    if not weights:
        return {}
    graph = _Graph([node for node in model.graph.node if not node.domain], frozenset(weights))
    found = Counter(node.op_type for node in graph.between() if not graph.is_in_integers(node))
    return dict(found.most_common())


@dataclass
class _Graph:
    """The nodes of a file, and who gives and takes each value."""

    nodes: list[onnx.NodeProto]
    weights: frozenset[str]
    givers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    takers: dict[str, list[onnx.NodeProto]] = field(default_factory=dict)
    behind: set[str] = field(default_factory=set)  # values that an integer layer leads to

    def __post_init__(self) -> None:
        for node in self.nodes:
            self.givers.update((name, node) for name in node.output)
            for name in node.input:
                self.takers.setdefault(name, []).append(node)

    def between(self) -> list[onnx.NodeProto]:
        """Return the nodes between integer layers that are not a part of one, nor a float layer, nor a move."""
        own: set[str] = set()  # what integer layers give
        for node in self.nodes:
            others = self.behind.isdisjoint(node.input[1:])
            if self._is_integer_layer(node) or (node.op_type in _SCALES and node.input[0] in own and others):
                own.update(node.output)
            if not own.isdisjoint(node.output) or not self.behind.isdisjoint(node.input):
                self.behind.update(node.output)
        ahead: set[str] = set()  # values that lead to an integer layer
        found = []
        for node in reversed(self.nodes):
            leads = not ahead.isdisjoint(node.output)
            if leads or self._is_integer_layer(node):
                ahead.update(node.input)
            passed = node.op_type in _MOVES or (node.op_type in LAYERS and node.input[1] not in self.behind)
            if leads and not passed and own.isdisjoint(node.output) and not self.behind.isdisjoint(node.input):
                found.append(node)
        return found[::-1]

    def is_in_integers(self, node: onnx.NodeProto) -> bool:
        """Return whether a node takes or gives codes, or stands between dequantizers and quantizers that it fuses with.

        The maximum that keeps a float layer apart from a quantizer counts as part of the quantizer.
        """
        takers = [taker.op_type for name in node.output for taker in self.takers.get(name, [])]
        if node.op_type in _FUSED:
            givers = [self.givers[name].op_type if name in self.givers else "" for name in node.input]
            return {*givers} == {"DequantizeLinear"} and {*takers} == {"QuantizeLinear"}
        if node.op_type in ("Clip", "Max"):
            return self._gives_codes(node.input[0]) or (node.op_type == "Max" and {*takers} == {"QuantizeLinear"})
        return node.op_type == "DequantizeLinear" or self._gives_codes(node.output[0])

    def _is_integer_layer(self, node: onnx.NodeProto) -> bool:
        return node.op_type in _INTEGER_LAYERS or layer_weight(node, self.givers, self.weights) is not None

    def _gives_codes(self, name: str) -> bool:
        giver = self.givers.get(name)
        return giver is not None and (giver.op_type == "QuantizeLinear" or giver.op_type.startswith("QLinear"))
