"""Layers as integer operators: QLinearConv, QLinearMatMul, MatMulInteger, with packed weights and folded offsets."""

from typing import Any

import numpy as np
import onnx_ir as ir

from qcompress_exporters.onnx_format.int8.layers import requantizer
from qcompress_exporters.onnx_format.int8.write_layer import Place
from qcompress_exporters.onnx_format.passes.replace import input_of


def write_layer(place: Place) -> None:
    """Write an integer operator in place of a layer, and of the quantizer behind it where the operator quantizes."""
    if place.node.op_type == "Conv":
        _conv(place)
    else:
        _product(place)


def _conv(place: Place) -> None:
    codes, scale = place.weight(kernel_order=False)
    behind = requantizer(place.node)
    assert behind is not None
    inputs = [*_input(place), codes, scale, place.weight_zero_point(), input_of(behind, 1), input_of(behind, 2)]
    if place.layer.bias is not None:
        inputs.append(place.integer_bias())
    attributes = {name: attribute.value for name, attribute in place.node.attributes.items()}
    _requantize(place, "QLinearConv", inputs, behind, **attributes)


def _product(place: Place) -> None:
    """Write a matrix product: QLinearMatMul where a quantizer follows at once, else int32 sums that become floats."""
    writer, node = place.writer, place.node
    codes, scale = place.weight(kernel_order=True)
    x, s_x, z_x = _input(place)
    behind = requantizer(node)
    if place.layer.bias is None and behind is not None:
        inputs = [x, s_x, z_x, codes, scale, place.weight_zero_point(), input_of(behind, 1), input_of(behind, 2)]
        _requantize(place, "QLinearMatMul", inputs, behind)
        return
    sums = writer.add("Cast", [writer.add("MatMulInteger", [x, codes, z_x])], to=ir.DataType.FLOAT)
    result = writer.add("Mul", [sums, writer.node("Mul", [s_x, scale])])
    if place.layer.bias is not None:
        result = writer.add("Add", [result, place.float_bias()])
    writer.supersede(node.outputs[0], result)
    place.remove(node)


def _requantize(place: Place, op_type: str, inputs: list[ir.Value], behind: ir.Node, **attributes: Any) -> None:
    codes = place.writer.add(op_type, inputs, **attributes)
    place.writer.supersede(behind.outputs[0], codes)
    place.remove(place.node, behind)


def _input(place: Place) -> list[ir.Value]:
    source = place.layer.source
    return [source.codes, source.scale, place.writer.constant(np.asarray(source.grid.stored_zero_point, np.uint8))]
