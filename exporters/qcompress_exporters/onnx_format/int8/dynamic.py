"""Layers whose activations are quantized at run time: DynamicQuantizeLinear and MatMulInteger, packed weights.

onnxruntime fuses each into one DynamicQuantizeMatMul.
"""

from typing import Final

import onnx_ir as ir

from qcompress_exporters.onnx_format.int8.biases import Int8Weight, pair_saturation
from qcompress_exporters.onnx_format.int8.layers import MATRIX_PRODUCTS, Layer, int8_weight, layers_of
from qcompress_exporters.onnx_format.int8.tensors import Tensors
from qcompress_exporters.onnx_format.marks import is_mark, site_of
from qcompress_exporters.onnx_format.names import code_name, code_scale_name, code_zero_point_name
from qcompress_exporters.onnx_format.passes.replace import drop_unused, input_of, optional_input
from qcompress_exporters.report import LayerReport

_LARGEST: Final = 255  # code of an activation


def write_layers(tensors: Tensors) -> list[LayerReport]:
    """Write every product of a marked activation with a weight in integers; other marks stay."""
    reports = []
    for name, uses in layers_of(tensors.open_values, tensors.writer.graph).items():
        weights = [int8_weight(use, tensors.artifacts[name], tensors.largest) for use in uses]
        found = [weight for weight in weights if isinstance(weight, Int8Weight)]
        why = next((weight for weight in weights if isinstance(weight, str)), "")
        if any(use.node.op_type not in MATRIX_PRODUCTS for use in uses):
            why = "only inputs of matrix products can be quantized at run time"
        if not why and not all(_mark_of(use) for use in uses):
            why = "its input is not a float activation"
        saturation = max((pair_saturation(weight, _LARGEST) for weight in found), default=0.0)
        reports.append(LayerReport(name, "float", why) if why else LayerReport(name, "dynamic8", saturation=saturation))
        if not why:
            for use, weight in zip(uses, found, strict=True):
                _write(tensors, use, weight)
    return reports


def _mark_of(layer: Layer) -> ir.Node | None:
    node = input_of(layer.node, 0).producer()
    return node if node is not None and is_mark(node) else None


def _write(tensors: Tensors, layer: Layer, weight: Int8Weight) -> None:
    writer, node, mark = tensors.writer, layer.node, _mark_of(layer)
    assert mark is not None
    site = site_of(mark)
    codes, scale = tensors.weight(weight, kernel_order=True)
    names = [code_name(site), code_scale_name(site), code_zero_point_name(site)]
    q, s, z = writer.add_many("DynamicQuantizeLinear", [input_of(mark, 0)], names)
    bias, inputs = optional_input(node, 2), node.inputs[:2]
    sums = writer.add("Cast", [writer.add("MatMulInteger", [q, codes, z])], to=ir.DataType.FLOAT)
    result = writer.add("Mul", [sums, writer.add("Mul", [s, scale])])
    if bias is not None:
        result = writer.add("Add", [result, bias])
    writer.supersede(node.outputs[0], result)
    writer.graph.remove(node, safe=True)
    for value in inputs:
        drop_unused(writer.graph, value)
