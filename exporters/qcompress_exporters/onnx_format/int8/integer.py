"""Integer compute with known grids: which layers can compute so is decided first, then they are written."""

from collections.abc import Container

import onnx_ir as ir

from qcompress_exporters.onnx_format.int8.activations import Activations
from qcompress_exporters.onnx_format.int8.biases import pair_saturation
from qcompress_exporters.onnx_format.int8.layers import (
    SHARED,
    Decisions,
    IntegerLayer,
    Layer,
    layers_of,
)
from qcompress_exporters.onnx_format.int8.shield import shield
from qcompress_exporters.onnx_format.int8.tensors import Tensors
from qcompress_exporters.onnx_format.int8.write_layer import Place, WriteLayer
from qcompress_exporters.onnx_format.passes.replace import input_of
from qcompress_exporters.report import LayerReport


def write_layers(activations: Activations, tensors: Tensors, write: WriteLayer) -> list[LayerReport]:
    """Write every layer that can compute in integers; shield the others.

    Args:
        activations: of the graph, quantized.
        tensors: writes weights and biases.
        write: writes one integer layer.

    Returns:
        One report for each weight that only layers use.
    """
    decisions = Decisions(activations, tensors.artifacts, tensors.open_values, tensors.largest)
    layers = layers_of(tensors.open_values, activations.writer.graph)
    uses_of_node = {use.node: use for uses in layers.values() for use in uses}
    alone = {node: decisions.integer_layer(use) for node, use in uses_of_node.items()}

    def takes_offset(user: ir.Node) -> bool:
        return user in uses_of_node and uses_of_node[user].alone and isinstance(alone[user], IntegerLayer)

    added = activations.add_offsets(takes_offset)
    reports = []
    for name, uses in layers.items():
        found = [_unless_added(alone[use.node], decisions.integer_layer(use)) for use in uses]
        report = _report(name, uses[0], found, added)
        reports.append(report)
        for use, layer in zip(uses, found, strict=True):
            if isinstance(layer, IntegerLayer) and not report.why:
                decisions.drop_shift_behind(use)
                write(Place(layer, uses, tensors, activations))
            elif use.node.inputs[0] in activations.quantized:
                shield(activations.writer, use.node)
    return reports


def _unless_added(alone: IntegerLayer | str, found: IntegerLayer | str) -> IntegerLayer | str:
    """Return a layer, or why it stays in float: because of itself, or of what else takes its input."""
    if isinstance(alone, str):
        return alone
    return SHARED if isinstance(found, str) else found


def _report(name: str, use: Layer, found: list[IntegerLayer | str], added: Container[ir.Value]) -> LayerReport:
    why = next((layer for layer in found if isinstance(layer, str)), "")
    integer = [layer for layer in found if isinstance(layer, IntegerLayer)]
    offset = ""
    if input_of(use.node, 0) in added:
        offset = "added"
    elif isinstance(found[0], IntegerLayer):
        offset = "zero point" if found[0].source.grid.zero_point is not None else "folded"
    if why:
        return LayerReport(name, "float", why, offset)
    saturation = max((pair_saturation(layer.weight, layer.source.grid.levels) for layer in integer), default=0.0)
    return LayerReport(name, "int8", "", offset, saturation)
