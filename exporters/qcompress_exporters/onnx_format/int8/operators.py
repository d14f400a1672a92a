"""Layers as integer operators: QLinearConv, QLinearMatMul, MatMulInteger, with packed weights and folded offsets."""

import numpy as np
import onnx
from onnx import TensorProto

from qcompress_exporters.onnx_format.edit import attribute
from qcompress_exporters.onnx_format.int8.lowering import IntegerLayer, Lowering, bias_scale


def write_layer(lowering: Lowering, layer: IntegerLayer) -> None:
    """Write an integer operator in place of a layer, and of the quantizer behind it where the operator quantizes."""
    if layer.layer.node.op_type == "Conv":
        _conv(lowering, layer)
    else:
        _product(lowering, layer)


def _conv(lowering: Lowering, layer: IntegerLayer) -> None:
    graph, writer, node = lowering.graph, lowering.writer, layer.layer.node
    codes, scale = lowering.write_weight(layer.weight, kernel_order=False)
    requantizer = lowering.requantizer(node)
    assert requantizer is not None
    zero = writer.constant(np.zeros(layer.weight.scale.shape, np.int8))
    inputs = [*_input(lowering, layer), codes, scale, zero, *requantizer.input[1:3]]
    if layer.bias is not None:
        rounded = np.rint(layer.bias / bias_scale(layer).astype(np.float64)).astype(np.int32)
        inputs.append(lowering.write_bias(layer, rounded))
    attributes = {a.name: attribute(node, a.name) for a in node.attribute}
    graph.add("QLinearConv", inputs, requantizer.output[0], **attributes)
    _drop(lowering, [node, requantizer])


def _product(lowering: Lowering, layer: IntegerLayer) -> None:
    """A matrix product: requantized by QLinearMatMul where nothing comes in between, else int32 sums in float."""
    graph, writer, node = lowering.graph, lowering.writer, layer.layer.node
    codes, scale = lowering.write_weight(layer.weight, kernel_order=True)
    x, s_x, z_x = _input(lowering, layer)
    requantizer = lowering.requantizer(node)
    if layer.bias is None and requantizer is not None:
        zero = writer.constant(np.zeros(layer.weight.scale.shape, np.int8))
        inputs = [x, s_x, z_x, codes, scale, zero, *requantizer.input[1:3]]
        graph.add("QLinearMatMul", inputs, requantizer.output[0])
        _drop(lowering, [node, requantizer])
        return
    sums = graph.add("Cast", [graph.add("MatMulInteger", [x, codes, z_x])], to=TensorProto.FLOAT)
    inputs = [sums, writer.node("Mul", [s_x, scale])]
    if layer.bias is None:
        graph.add("Mul", inputs, node.output[0])
    else:
        bias = lowering.write_bias(layer, layer.bias.astype(np.float32))
        graph.add("Add", [graph.add("Mul", inputs), bias], node.output[0])
    _drop(lowering, [node])


def _input(lowering: Lowering, layer: IntegerLayer) -> list[str]:
    source = layer.source
    return [source.codes, source.scale, lowering.writer.constant(np.asarray(source.zero_point, np.uint8))]


def _drop(lowering: Lowering, nodes: list[onnx.NodeProto]) -> None:
    """Take a layer and what was fused into it out, and its input's dequantizer if no one else takes it."""
    for node in nodes:
        lowering.graph.remove(node)
    for value in nodes[0].input[:2]:
        lowering.graph.drop_unused(value)
