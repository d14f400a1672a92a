"""Nodes of a live graph: the operator that each calls, its row in the table, and its arguments by name."""

import operator as python
import re
from collections.abc import Container, Iterator
from typing import Any, Final

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from qcompress.graph.operators import UNLISTED, Operator, operator
from qcompress.graph.weights import Call, Value

_LINE: Final = re.compile(r'File "(.+)", line (\d+), in .*\n(.*)')


def operator_name(node: Node) -> str:
    """Return the name of a node's target in the table of operators; empty if the node calls no operator.

    >>> graph = Graph()
    >>> x = graph.placeholder("x")
    >>> operator_name(graph.call_function(torch.ops.aten.relu.default, (x,))), operator_name(x)
    ('relu.default', '')
    """
    if node.op != "call_function":
        return ""
    if node.target is python.getitem:
        return "getitem"
    return str(node.target).removeprefix("aten.") if isinstance(node.target, OpOverload) else ""


def row_of(node: Node) -> Operator:
    """Return the node's row in the table of operators; an empty row if the operator is unlisted."""
    name = operator_name(node)
    return operator(name) if name else UNLISTED


def arguments(node: Node) -> dict[str, Any]:
    """Return the arguments that a call was given, in the schema's order and by its names.

    >>> graph = Graph()
    >>> x = graph.placeholder("x")
    >>> arguments(graph.call_function(torch.ops.aten.softmax.int, (x,), {"dim": 1}))
    {'self': x, 'dim': 1}
    """
    if isinstance(node.target, OpOverload):
        names = [a.name for a in node.target._schema.arguments]
    else:
        names = ["self", "item"] if node.target is python.getitem else [str(i) for i in range(len(node.args))]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def line_of(node: Node) -> str | None:
    """Return the user's line that a node comes from, as `path:line: code`; None if the graph does not say."""
    lines = _LINE.findall(node.meta.get("stack_trace") or "")
    return f"{lines[-1][0]}:{lines[-1][1]}: {lines[-1][2].strip()}" if lines else None


def calls(graph: Graph) -> Iterator[Call]:
    """Yield the calls of a graph in order; each returns its node's name."""
    for node in graph.nodes:
        if node.op == "call_function":
            given = {name: as_value(argument) for name, argument in arguments(node).items()}
            yield Call(operator_name(node), given, (node.name,))


def as_value(argument: Any) -> Any:
    """Return an argument as a `Call` has it: nodes are Values, lists stay lists, constants stay as they are."""
    if isinstance(argument, list | tuple):
        return [as_value(item) for item in argument]
    if not isinstance(argument, Node):
        return argument
    value = argument.meta.get("val")
    return Value(argument.name, value.ndim if isinstance(value, torch.Tensor) else None)


def moves(node: Node, state: Container[Node]) -> bool:
    """Return whether a node moves the values of an activation without changing them; it may add zeros."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node) or node.args[0] in state:
        return False
    row = row_of(node)
    if node.target is python.getitem:
        return row_of(node.args[0]).splits and moves(node.args[0], state)
    if row.pads:
        given = arguments(node)
        return given.get("mode", "constant") == "constant" and not given.get("value") and not node.kwargs
    return row.moves
