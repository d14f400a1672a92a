"""HardSigmoid of codes: the sum of other codes and a constant, which onnxruntime computes in integers, clamped.

It has no integer kernel for HardSigmoid. But alpha·x + beta is what the codes of x stand for with a scale that is alpha
times as large, plus beta.
"""

import numpy as np
import onnx_ir as ir

from qcompress_exporters.onnx_format.graph_writer import GraphWriter
from qcompress_exporters.onnx_format.passes.replace import input_of, replace_node

_ALPHA, _BETA = 0.2, 0.5  # ONNX's defaults


def write_as_sum(writer: GraphWriter, node: ir.Node) -> None:
    """Write a HardSigmoid whose input is dequantized as a sum and a clamp, if its alpha and beta are positive.

    Args:
        writer: of the graph.
        node: takes what a DequantizeLinear gives.
    """
    alpha = node.attributes.get_float("alpha", _ALPHA)
    beta = node.attributes.get_float("beta", _BETA)
    dequantizer = input_of(node, 0).producer()
    if dequantizer is None or alpha <= 0 or beta <= 0:
        return
    codes, scale, zero_point = (input_of(dequantizer, i) for i in range(3))
    assert scale.const_value is not None
    scaled = writer.constant(np.asarray(scale.const_value.numpy() * np.float32(alpha), np.float32))
    one, zero = (writer.constant(np.asarray(code, np.uint8)) for code in (1, 0))
    steep = writer.add("DequantizeLinear", [codes, scaled, zero_point])
    added = writer.add("DequantizeLinear", [one, writer.constant(np.asarray(beta, np.float32)), zero])
    ends = [writer.constant(np.asarray(end, np.float32)) for end in (0, 1)]
    replace_node(writer.graph, node, writer.add("Clip", [writer.add("Add", [steep, added]), *ends]))
