"""Means over all axes but batch and channels become GlobalAveragePool, which runtimes can compute in integers."""

from typing import final

import onnx_ir as ir

from qcompress_exporters.onnx_format.passes.replace import constant_of, input_of, replace_node


@final
class PoolMeans(ir.passes.InPlacePass):
    """Replaces ReduceMean over the spatial axes; see the module."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        found = [node for node in model.graph if _is_spatial_mean(node)]
        for node in found:
            pool = ir.node("GlobalAveragePool", [input_of(node, 0)])
            new = [pool]
            if not node.attributes.get_int("keepdims", 1):
                new.append(ir.node("Flatten", [pool.outputs[0]]))
            replace_node(model.graph, node, new[-1].outputs[0], new)
        return ir.passes.PassResult(model, modified=bool(found))


def _is_spatial_mean(node: ir.Node) -> bool:
    if node.op_type != "ReduceMean" or node.domain:
        return False
    data, axes = input_of(node, 0), constant_of(node, 1)
    rank = 0 if data.shape is None else len(data.shape)
    return rank in (3, 4) and axes is not None and {int(a) % rank for a in axes} == set(range(2, rank))
