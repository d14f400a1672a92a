"""Layers whose activations are quantized at run time: DynamicQuantizeLinear and MatMulInteger, packed weights.

onnxruntime fuses each into one DynamicQuantizeMatMul.
"""

from onnx import TensorProto

from qcompress_exporters.onnx_format.edit import attribute
from qcompress_exporters.onnx_format.int8.lowering import Layer, Lowering, code_name, pair_saturation
from qcompress_exporters.onnx_format.trace import DOMAIN
from qcompress_exporters.report import LayerReport

# What the three outputs of a site's DynamicQuantizeLinear are called.
SCALE, ZERO_POINT = "s{}", "z{}"


def write_layers(lowering: Lowering) -> list[LayerReport]:
    """Every product of a marked activation with a weight in integers; other marks go."""
    graph = lowering.graph
    reports = []
    for name, uses in lowering.layers().items():
        weights = [lowering.int8(use) for use in uses]
        why = next((w for w in weights if isinstance(w, str)), "")
        if any(use.node.op_type not in ("Gemm", "MatMul") for use in uses):
            why = "quantized at run time are inputs of matrix products alone"
        if not why and not all(_mark(lowering, use) for use in uses):
            why = "its input is no float activation"
        saturation = max((pair_saturation(w, 255) for w in weights if not isinstance(w, str)), default=0.0)
        reports.append(LayerReport(name, "float", why) if why else LayerReport(name, "dynamic8", saturation=saturation))
        if not why:
            for use in uses:
                _write(lowering, use)
    for node in graph:
        if node.domain == DOMAIN:
            graph.remove(node)
            graph.replace(node.output[0], node.input[0])
    return reports


def _mark(lowering: Lowering, layer: Layer) -> object:
    mark = lowering.graph.producer(layer.node.input[0])
    return mark if mark is not None and mark.domain == DOMAIN else None


def _write(lowering: Lowering, layer: Layer) -> None:
    graph, node = lowering.graph, layer.node
    weight, mark = lowering.int8(layer), graph.producer(node.input[0])
    assert not isinstance(weight, str)
    assert mark is not None
    index = attribute(mark, "index")
    codes, scale = lowering.write_weight(weight, kernel_order=True)
    q, s, z = code_name(index), SCALE.format(index), ZERO_POINT.format(index)
    graph.add_many("DynamicQuantizeLinear", [mark.input[0]], [q, s, z])
    output, bias = node.output[0], node.input[2] if len(node.input) > 2 else ""
    graph.remove(node)
    for value in node.input[:2]:
        graph.drop_unused(value)
    sums = graph.add("Cast", [graph.add("MatMulInteger", [q, codes, z])], to=TensorProto.FLOAT)
    product = graph.add("Mul", [sums, graph.add("Mul", [s, scale])], None if bias else output)
    if bias:
        graph.add("Add", [product, bias], output)
