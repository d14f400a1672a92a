"""The layers of a program: which of its tensors is the weight of which kind of layer, read from the ATen graph."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch.fx import Node

from qcompress.graph.nodes import arguments, calls, row_of
from qcompress.graph.program import FloatProgram, state_nodes, value_of
from qcompress.graph.weights import Tensor, weight_uses

# The kinds of layers whose input can be quantized.
LAYER_KINDS: Final = ("conv", "depthwise", "conv_transpose", "linear")


@dataclass(frozen=True, slots=True)
class Layer:
    """One use of a weight by the graph.

    Args:
        weight: qualified name of the weight.
        kind: one of `kinds.KINDS`.
        axis: the weight's axis that counts output channels.
        node: the node that uses it.
    """

    weight: str
    kind: str
    axis: int
    node: Node


def layers(program: FloatProgram) -> list[Layer]:
    """Return every use of a weight, in the order in which the graph runs them."""
    graph = program.exported.graph
    nodes = {node.name: node for node in graph.nodes}
    state = {n.name: Tensor(name, tuple(value_of(n).shape)) for n, name in state_nodes(program.exported).items()}
    found = weight_uses(calls(graph), state)
    return [Layer(use.weight, use.kind, use.axis, nodes[use.call.outputs[0]]) for use in found]


def weight_layers(program: FloatProgram) -> dict[str, Layer]:
    """Return the first use of each weight, by qualified name, in the order in which the graph runs them."""
    first: dict[str, Layer] = {}
    for layer in layers(program):
        first.setdefault(layer.weight, layer)
    return first


def named_uses(program: FloatProgram) -> dict[str, Layer]:
    """Return every use of a weight in LAYER_KINDS by the weight's name; further uses of one by their nodes' names."""
    found: dict[str, Layer] = {}
    for use in layers(program):
        if use.kind in LAYER_KINDS:
            found[use.node.name if use.weight in found else use.weight] = use
    return found


def data_input(layer: Node) -> Node:
    """Return the activation that a convolution or a matrix product takes."""
    row = row_of(layer).layer
    assert row is not None
    assert row.data is not None
    value = arguments(layer)[row.data]
    assert isinstance(value, Node)
    return value


def bias_of(layer: Node) -> Node | None:
    """Return the bias that a layer adds; None if it has no bias."""
    row = row_of(layer).layer
    bias = None if row is None or row.bias is None else arguments(layer).get(row.bias)
    return bias if isinstance(bias, Node) else None


def pads(layer: Node) -> bool:
    """Return whether a layer pads its input with zeros."""
    padding = arguments(layer).get("padding", 0)
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, Sequence) else bool(padding)
