"""Operators that do the work of several listed ones: the graph has these instead, and each can run on codes."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from qcompress.graph.nodes import operator_name
from qcompress.graph.program import copy_graph, rebuild


def _silu(graph: Graph, x: Node) -> Node:
    sigmoid = _call(graph, torch.ops.aten.sigmoid.default, x)
    return _call(graph, torch.ops.aten.mul.Tensor, x, sigmoid)


# By the name of an operator of one argument: what computes the same.
_PARTS: Final[Mapping[str, Callable[[Graph, Node], Node]]] = {"silu.default": _silu}


def without_composites(exported: ExportedProgram) -> ExportedProgram:
    """Return the program with listed operators in place of those that are made of them.

    Args:
        exported: without in-place operators.
    """
    if not any(operator_name(node) in _PARTS for node in exported.graph.nodes):
        return exported
    module = copy_graph(exported)
    for node in list(module.graph.nodes):
        made = _PARTS.get(operator_name(node))
        if made is not None:
            with module.graph.inserting_before(node):
                found = made(module.graph, node.args[0])
            found.meta, name = dict(node.meta), node.name
            node.replace_all_uses_with(found)
            module.graph.erase_node(node)
            found.name = name  # by which plans and options know its site
    module.recompile()
    return rebuild(exported, module=module)


def _call(graph: Graph, operator: Callable[..., Any], *arguments: Node) -> Node:
    node = graph.create_node("call_function", operator, arguments, name=operator._opname)  # type: ignore[attr-defined]
    node.meta["val"] = operator(*(argument.meta["val"] for argument in arguments))
    return node
