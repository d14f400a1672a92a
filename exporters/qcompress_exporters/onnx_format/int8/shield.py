"""Keeps float layers from standing directly between a dequantizer and a quantizer.

onnxruntime would quantize their weights by itself (`WeightBiasQuantization`). A maximum with the lowest float, which
changes nothing, stops it.
"""

from typing import Final

import numpy as np
import onnx_ir as ir

from qcompress_exporters.onnx_format.graph_writer import GraphWriter

_LOWEST: Final = np.array(np.finfo(np.float32).min, np.float32)
_PASSED: Final = ("Relu", "Clip", "Add", "LeakyRelu")  # operators that onnxruntime looks through


def shield(writer: GraphWriter, node: ir.Node) -> None:
    """Write a maximum in front of each quantizer behind a float layer.

    Args:
        writer: of the graph.
        node: the layer, whose input is dequantized.
    """
    stack, seen = [node.outputs[0]], set[ir.Value]()
    while stack:
        value = stack.pop()
        for user in value.consumers():
            if user.op_type == "QuantizeLinear" and user.inputs[0] is value:
                user.replace_input_with(0, writer.add("Max", [value, writer.constant(_LOWEST)]))
            elif user.op_type in _PASSED and user.outputs[0] not in seen:
                seen.add(user.outputs[0])
                stack.append(user.outputs[0])
