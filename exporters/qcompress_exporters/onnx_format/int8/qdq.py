"""Layers as quantize-dequantize graphs: DequantizeLinear on input, weight and bias around the float operator.

onnxruntime fuses each into one integer kernel (QLinearConv, QGemm, QLinearMatMul, MatMulIntegerToFloat).
"""

from qcompress_exporters.onnx_format.int8.write_layer import Place
from qcompress_exporters.onnx_format.passes.replace import drop_unused, input_of


def write_layer(place: Place) -> None:
    """Put packed weights and an int32 bias into a layer; its input is dequantized already."""
    writer, node, layer = place.writer, place.node, place.layer
    matrix = node.op_type != "Conv"
    stays = node.op_type == "Gemm" and layer.layer.transpose is None  # transB says how it lies
    codes, scale = place.weight(kernel_order=matrix and not stays)
    axis = layer.weight.axis if stays or not matrix else 1
    inputs = [codes, scale]
    if matrix:  # QGemm needs it written out
        inputs.append(place.weight_zero_point())
    weight = writer.node("DequantizeLinear", inputs, **({} if axis == 1 else {"axis": axis}))
    old = input_of(node, 1)
    node.replace_input_with(1, weight)
    drop_unused(writer.graph, old)
    if layer.bias is None:
        return
    if node.op_type == "MatMul":  # a folded offset: the operator has no bias
        writer.insert_behind(node.outputs[0], "Add", [place.float_bias()])
        return
    bias = place.integer_bias()
    # Stored, the product would be as large as the bias; it is folded when the file is loaded.
    product = writer.node("Mul", [layer.source.scale, scale])
    node.resize_inputs(3)
    node.replace_input_with(2, writer.node("DequantizeLinear", [bias, product], axis=0))
