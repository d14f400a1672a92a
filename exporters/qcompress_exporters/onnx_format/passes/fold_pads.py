"""Padding with zeros moves into the convolution behind it; padding by nothing goes."""

from typing import Any, final

import numpy.typing as npt
import onnx_ir as ir

from qcompress_exporters.onnx_format.passes.replace import constant_of, input_of, replace_node


@final
class FoldPads(ir.passes.InPlacePass):
    """Removes Pad nodes; see the module."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        modified = False
        for node in list(model.graph):
            if node.op_type != "Pad" or node.domain:
                continue
            pads = constant_of(node, 1)
            if pads is None or node.attributes.get_string("mode", "constant") != "constant" or len(node.inputs) > 3:
                continue
            if pads.any():
                if not _fits_convolutions(node, pads):
                    continue
                _add_to_convolutions(node, pads)
            replace_node(model.graph, node, input_of(node, 0))
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _fits_convolutions(node: ir.Node, pads: npt.NDArray[Any]) -> bool:
    """Return whether only convolutions take what a Pad gives, and can pad so themselves."""
    output, rank, fill = node.outputs[0], len(pads) // 2, constant_of(node, 2)
    with_zeros = len(node.inputs) < 3 or node.inputs[2] is None or (fill is not None and not fill.any())
    spatial = (pads >= 0).all() and not pads[[0, 1, rank, rank + 1]].any()
    users = output.consumers()
    return bool(
        users
        and not output.is_graph_output()
        and with_zeros
        and spatial
        and all(
            u.op_type == "Conv"
            and u.inputs[0] is output
            and u.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
            and all(i is not output for i in u.inputs[1:])
            for u in users
        )
    )


def _add_to_convolutions(node: ir.Node, pads: npt.NDArray[Any]) -> None:
    rank = len(pads) // 2
    added = [int(p) for p in (*pads[2:rank], *pads[rank + 2 :])]
    for user in node.outputs[0].consumers():
        own = user.attributes.get_ints("pads", [0] * len(added))
        user.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(own, added, strict=True)])
