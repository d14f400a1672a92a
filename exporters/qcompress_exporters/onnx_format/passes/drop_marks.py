"""A graph without its marks of activation sites."""

from typing import final

import onnx_ir as ir

from qcompress_exporters.onnx_format.marks import is_mark
from qcompress_exporters.onnx_format.passes.replace import input_of, replace_node


@final
class DropMarks(ir.passes.InPlacePass):
    """Removes every mark; what it marked takes its place."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        found = [node for node in model.graph if is_mark(node)]
        for node in found:
            replace_node(model.graph, node, input_of(node, 0))
        return ir.passes.PassResult(model, modified=bool(found))
