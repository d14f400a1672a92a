"""Operators that do the work of several listed ones: the graph has these instead, and each can run on codes."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from qcompress.graph.nodes import operator_name
from qcompress.graph.program import copy_graph, rebuild

# Operators of one argument that multiply it with a function of itself, and that function.
_GATES: Final[Mapping[str, Callable[..., Any]]] = {
    "silu.default": torch.ops.aten.sigmoid.default,
    "hardswish.default": torch.ops.aten.hardsigmoid.default,
}


def without_composites(exported: ExportedProgram) -> ExportedProgram:
    """Return the program with listed operators in place of those that are made of them.

    Args:
        exported: without in-place operators.
    """
    if not any(operator_name(node) in _GATES for node in exported.graph.nodes):
        return exported
    module = copy_graph(exported)
    for node in list(module.graph.nodes):
        gate = _GATES.get(operator_name(node))
        if gate is not None:
            x = node.args[0]
            with module.graph.inserting_before(node):
                found = _call(module.graph, torch.ops.aten.mul.Tensor, x, _call(module.graph, gate, x))
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
