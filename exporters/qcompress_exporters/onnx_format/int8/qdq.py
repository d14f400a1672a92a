"""Layers as quantize-dequantize graphs: DequantizeLinear on input, weight and bias around the float operator.

onnxruntime fuses each into one integer kernel (QLinearConv, QGemm, QLinearMatMul, MatMulIntegerToFloat).
"""

import numpy as np

from qcompress_exporters.onnx_format.int8.lowering import IntegerLayer, Lowering, bias_scale


def write_layer(lowering: Lowering, layer: IntegerLayer) -> None:
    """Put packed weights and an int32 bias into a layer; its input is dequantized already."""
    graph, writer, node = lowering.graph, lowering.writer, layer.layer.node
    matrix = node.op_type != "Conv"
    stays = node.op_type == "Gemm" and layer.layer.transpose is None  # transB says how it lies
    codes, scale = lowering.write_weight(layer.weight, kernel_order=matrix and not stays)
    axis = layer.weight.axis if stays or not matrix else 1
    inputs = [codes, scale]
    if matrix:  # QGemm needs it written out
        inputs.append(writer.constant(np.zeros(layer.weight.scale.shape, np.int8)))
    weight = writer.node("DequantizeLinear", inputs, **({} if axis == 1 else {"axis": axis}))
    old = node.input[1]
    graph.set_input(node, 1, weight)
    graph.drop_unused(old)
    if layer.bias is None:
        return
    if node.op_type == "MatMul":  # a folded offset: it has no place for it
        output, product = node.output[0], graph.new_name()
        graph.set_output(node, product)
        graph.add("Add", [product, lowering.write_bias(layer, layer.bias.astype(np.float32))], output)
        return
    scales = bias_scale(layer)
    rounded = np.rint(layer.bias / scales.astype(np.float64)).astype(np.int32)
    bias = lowering.write_bias(layer, rounded)
    # Stored, the product would be as large as the bias; it is folded when the file is loaded.
    product = writer.node("Mul", [layer.source.scale, scale])
    graph.set_input(node, 2, writer.node("DequantizeLinear", [bias, product], axis=0))
