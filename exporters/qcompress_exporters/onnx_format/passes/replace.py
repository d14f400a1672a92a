"""Helpers of passes: reading inputs of a node, and letting one value stand for another."""

from typing import Any

import numpy.typing as npt
import onnx_ir as ir


def input_of(node: ir.Node, position: int) -> ir.Value:
    """Return an input that the operator requires."""
    value = node.inputs[position]
    assert value is not None
    return value


def optional_input(node: ir.Node, position: int) -> ir.Value | None:
    """Return an input; None if the node has none at this position."""
    return node.inputs[position] if len(node.inputs) > position else None


def constant_of(node: ir.Node, position: int) -> npt.NDArray[Any] | None:
    """Return the elements of a constant input, flat; None if the input is missing or not constant."""
    value = optional_input(node, position)
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if constant is None else constant.numpy().ravel()


def only_user(value: ir.Value) -> ir.Node | None:
    """Return the only user of a value; None if the value has another number of users, or one in a subgraph."""
    users, node = value.consumers(), value.producer()
    alone = len(users) == 1 and not value.is_graph_output()
    return users[0] if alone and (node is None or users[0].graph is node.graph) else None


def replace_node(graph: ir.Graph, node: ir.Node, by: ir.Value, new: list[ir.Node] | None = None) -> None:
    """Let a value stand for the one output of a node, and remove the node.

    Args:
        graph: holds the node.
        node: is removed.
        by: stands for its output; in a graph output's place it takes its name and type.
        new: nodes that compute `by`, in order; they come in the node's place.
    """
    graph.insert_before(node, new or [])
    output = node.outputs[0]
    if output.is_graph_output():
        if by.is_graph_input() or by.is_graph_output() or by.is_initializer():  # it has a name to keep
            copy = ir.node("Identity", [by], name="")
            graph.insert_before(node, copy)
            by = copy.outputs[0]
        by.name = output.name
    if by.type is None or output.is_graph_output():
        by.shape, by.type = output.shape, output.type
    output.replace_all_uses_with(by, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def drop_unused(graph: ir.Graph, value: ir.Value | None) -> None:
    """Remove the node that gives a value if nothing takes it, and all nodes that only this one needed."""
    node = None if value is None else value.producer()
    if node is None or node.graph is not graph or any(o.uses() or o.is_graph_output() for o in node.outputs):
        return
    inputs = dict.fromkeys(node.inputs)
    graph.remove(node, safe=True)
    for taken in inputs:
        drop_unused(graph, taken)
