"""The inputs and outputs of a graph get the program's own names, and its names of dynamic axes."""

import re
from collections.abc import Mapping
from typing import Any, final

import onnx_ir as ir

from qcompress.graph.program import FloatProgram


@final
class NameEnds(ir.passes.InPlacePass):
    """Renames inputs and outputs; an output that is an input or another output too becomes a copy.

    Args:
        program: the graph's first inputs are the program's own.
    """

    def __init__(self, program: FloatProgram) -> None:
        super().__init__()
        self._program = program

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        graph, program = model.graph, self._program
        symbols: dict[str, str] = {}
        inputs = list(graph.inputs)[: len(program.input_names)]
        for name, value in zip(program.input_names, inputs, strict=True):
            for axis, size in enumerate(value.shape or ()):
                if isinstance(size, ir.SymbolicDim) and (name, axis) in program.dynamic:
                    symbols.setdefault(str(size.value), program.dynamic[name, axis])
            value.name = name
        outputs = list(graph.outputs)
        for position, (name, value) in enumerate(zip(program.output_names, outputs, strict=True)):
            if value in graph.inputs or value in outputs[:position]:
                node = ir.node("Identity", [value])
                node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
                graph.append(node)
                graph.outputs[position] = node.outputs[0]
            graph.outputs[position].name = name
        for value in (*graph.inputs, *graph.outputs):
            if value.shape is not None:
                value.shape = ir.Shape([_renamed(d, symbols) for d in value.shape])
        return ir.passes.PassResult(model, modified=True)


def _renamed(dim: Any, symbols: Mapping[str, str]) -> Any:
    if not isinstance(dim, ir.SymbolicDim) or dim.value is None:
        return dim
    if str(dim.value).isdecimal():
        return int(str(dim.value))  # dynamic in the trace until an operator turned out to allow one size only
    return re.sub(r"[A-Za-z_]\w*", lambda m: symbols.get(m[0], m[0]), str(dim.value))
