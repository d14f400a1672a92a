"""The variables of a loop come in the order of their names: the tracer's order differs from run to run."""

import re
from typing import final

import onnx_ir as ir


@final
class OrderLoops(ir.passes.InPlacePass):
    """Sorts the variables that a Loop hands from one iteration to the next, at every depth."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        modified = False
        for node in list(model.graph.all_nodes()):
            if node.op_type == "Loop" and not node.domain:
                modified |= _order(node)
        return ir.passes.PassResult(model, modified)


def _order(loop: ir.Node) -> bool:
    body, graph = loop.attributes["body"].as_graph(), loop.graph
    assert graph is not None
    inputs, outputs = list(body.inputs), list(body.outputs)
    names = [str(value.name) for value in inputs[2:]]
    # The tracer numbers its names in the order that differs, so that a number counts only between equal names.
    order = sorted(range(len(names)), key=lambda i: (re.sub(r"_\d+$", "", names[i]), names[i]))
    if order == sorted(order):
        return False
    body.inputs.clear()
    body.inputs.extend([*inputs[:2], *(inputs[2 + i] for i in order)])
    body.outputs.clear()
    body.outputs.extend([outputs[0], *(outputs[1 + i] for i in order), *outputs[1 + len(order) :]])
    new = ir.Node(
        "", "Loop", [*loop.inputs[:2], *(loop.inputs[2 + i] for i in order)], list(loop.attributes.values()),
        num_outputs=len(loop.outputs), name=loop.name,
    )  # fmt: skip
    graph.insert_before(loop, new)
    for position, i in enumerate([*order, *range(len(order), len(loop.outputs))]):
        old, value = loop.outputs[i], new.outputs[position]
        value.name, value.shape, value.type = old.name, old.shape, old.type
        old.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(loop, safe=True)
    return True
