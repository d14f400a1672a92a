"""Which tensor of a program is the weight of which kind of layer, read from the ATen graph."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.fx import Node

from qcompress.artifacts.granularity import output_axis
from qcompress.graph.program import FloatProgram, state_nodes

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Layer:
    """One use of a weight by the graph.

    Args:
        weight: qualified name of the weight.
        kind: one of `sources.base.KINDS`.
        axis: the weight's axis that counts output channels.
        node: the node that uses it.
    """

    weight: str
    kind: str
    axis: int
    node: Node


def _conv(node: Node, weight: torch.Tensor) -> str:
    if node.target is aten.convolution.default and node.args[6]:
        return "conv_transpose"
    position = 8 if node.target is aten.convolution.default else 6
    groups: Any = node.args[position] if len(node.args) > position else node.kwargs.get("groups", 1)
    return "depthwise" if isinstance(groups, int) and groups > 1 and weight.shape[1] == 1 else "conv"


def _fixed(kind: str) -> Callable[[Node, torch.Tensor], str]:
    return lambda node, weight: kind


# Operator -> (position of the weight argument, what decides the kind). Matrix products hold W[in, out].
_USES: Final[dict[Any, tuple[int, Callable[[Node, torch.Tensor], str]]]] = {
    aten.conv1d.default: (1, _conv),
    aten.conv1d.padding: (1, _conv),
    aten.conv2d.default: (1, _conv),
    aten.conv2d.padding: (1, _conv),
    aten.conv3d.default: (1, _conv),
    aten.conv3d.padding: (1, _conv),
    aten.convolution.default: (1, _conv),
    aten.conv_transpose1d.default: (1, _fixed("conv_transpose")),
    aten.conv_transpose2d.input: (1, _fixed("conv_transpose")),
    aten.conv_transpose3d.input: (1, _fixed("conv_transpose")),
    aten.linear.default: (1, _fixed("linear")),
    aten.matmul.default: (1, _fixed("linear")),
    aten.mm.default: (1, _fixed("linear")),
    aten.addmm.default: (2, _fixed("linear")),
    aten.embedding.default: (0, _fixed("embedding")),
    aten.embedding_bag.default: (0, _fixed("embedding")),
    aten.embedding_bag.padding_idx: (0, _fixed("embedding")),
}
_IN_OUT: Final = (aten.matmul.default, aten.mm.default, aten.addmm.default)
_TRANSPOSES: Final = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default)
_VIEWS: Final = (
    aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default, aten.to.dtype,
    aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.slice.Tensor, aten.select.int,
    aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, operator.getitem,
)  # fmt: skip
_RECURRENT: Final = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)


def layers(program: FloatProgram) -> list[Layer]:
    """Every use of a weight, in the order in which the graph runs them."""
    state = state_nodes(program.exported)
    found: list[Layer] = []
    for node in program.exported.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _USES:
            position, kind_of = _USES[node.target]
            argument = node.args[position] if len(node.args) > position else None
            origin, transposed = _origin(argument)
            if origin is not None and origin in state and origin.meta["val"].ndim >= 2:
                kind = kind_of(node, origin.meta["val"])
                axis = output_axis(kind) if kind != "linear" else int((node.target in _IN_OUT) != transposed)
                found.append(Layer(state[origin], kind, axis, node))
        elif node.target in _RECURRENT:
            weights = [n for n in node.all_input_nodes if n in state and n.meta["val"].ndim >= 2]
            found += [Layer(state[weight], "recurrent", 0, node) for weight in weights]
    return found


def weight_layers(program: FloatProgram) -> dict[str, Layer]:
    """The first use of each weight, by qualified name, in the order in which the graph runs them."""
    first: dict[str, Layer] = {}
    for layer in layers(program):
        first.setdefault(layer.weight, layer)
    return first


def data_input(layer: Node) -> Node:
    """The activation that a layer takes."""
    value = layer.args[1 if layer.target is aten.addmm.default else 0]
    assert isinstance(value, Node)
    return value


def bias_of(layer: Node) -> Node | None:
    """The bias that a layer adds."""
    position = 0 if layer.target is aten.addmm.default else 2
    bias = layer.args[position] if len(layer.args) > position else layer.kwargs.get("bias")
    return bias if isinstance(bias, Node) else None


def _origin(argument: Any) -> tuple[Node | None, bool]:
    """The parameter behind a chain of views and transposes of a matrix, and whether it arrives transposed."""
    transposed = False
    while isinstance(argument, Node) and argument.op == "call_function":
        if argument.target in _TRANSPOSES and argument.meta["val"].ndim == 2:
            transposed = not transposed
        elif argument.target not in _VIEWS:
            return None, False
        argument = argument.args[0]
    return (argument, transposed) if isinstance(argument, Node) else (None, False)
