"""Views of transposed values: torch.onnx's decompositions refuse some that the trace allowed.

Attention is traced with a kernel whose outputs, transposed, are contiguous; it is decomposed to others.
"""

from typing import Final

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from qcompress.graph.nodes import operator_name, row_of
from qcompress.graph.program import copy_graph, rebuild

_VIEWS: Final = ("view.default", "_unsafe_view.default", "reshape.default", "flatten.using_ints")


def with_contiguous_views(exported: ExportedProgram) -> ExportedProgram:
    """Return the program with a contiguous copy in front of every view of a transposed value; a file has no copies."""
    views = [n.name for n in exported.graph.nodes if operator_name(n) in _VIEWS and _is_transposed(n.args[0])]
    if not views:
        return exported
    module = copy_graph(exported)
    for node in module.graph.nodes:
        if node.name in views:
            given = node.args[0]
            with module.graph.inserting_before(node):
                clone = module.graph.call_function(
                    torch.ops.aten.clone.default, (given,), {"memory_format": torch.contiguous_format}
                )
            clone.meta["val"] = given.meta["val"].clone(memory_format=torch.contiguous_format)
            node.replace_input_with(given, clone)
    module.recompile()
    return rebuild(exported, module=module)


def _is_transposed(node: object) -> bool:
    while isinstance(node, Node) and operator_name(node) == "contiguous.default":  # does nothing in the trace
        node = node.args[0]
    if not isinstance(node, Node):
        return False
    value = node.meta.get("val")
    return row_of(node).transposes or (isinstance(value, torch.Tensor) and not value.is_contiguous())
