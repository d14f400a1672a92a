"""A graph without what runtimes do not need: names of nodes, types of inner values, notes and metadata."""

from typing import final

import onnx_ir as ir


@final
class Strip(ir.passes.InPlacePass):
    """Clears names of nodes, and the types, notes and metadata of values, at every depth."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        model.metadata_props.clear()
        model.doc_string = None
        model.producer_name, model.producer_version = "qcompress", None
        model.graph.name = "g"
        for graph in (model.graph, *model.graph.subgraphs()):
            graph.metadata_props.clear()
            graph.doc_string = None
            ends = {*graph.inputs, *graph.outputs}
            for value in (*ends, *graph.initializers.values(), *(o for node in graph for o in node.outputs)):
                value.metadata_props.clear()
                value.doc_string = None
                constant = value.const_value
                if constant is not None and (constant.doc_string or constant.metadata_props):
                    value.const_value = ir.tensor(constant.numpy(), constant.dtype, name=constant.name)
                if value not in ends:
                    value.type = value.shape = None
            for node in graph:
                node.name, node.overload = "", ""  # None would be named again
        return ir.passes.PassResult(model, modified=True)
