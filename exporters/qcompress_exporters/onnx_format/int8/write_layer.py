"""An integer layer in its graph, for the formats that write it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompress_exporters.onnx_format.graph_writer import GraphWriter
from qcompress_exporters.onnx_format.int8.activations import Activations
from qcompress_exporters.onnx_format.int8.biases import in_steps
from qcompress_exporters.onnx_format.int8.layers import IntegerLayer, Layer
from qcompress_exporters.onnx_format.int8.tensors import Tensors
from qcompress_exporters.onnx_format.passes.replace import drop_unused


@dataclass(frozen=True, slots=True)
class Place:
    """One integer layer in its graph.

    Args:
        layer: the layer.
        others: all layers of its weight.
        tensors: writes its weight and bias.
        activations: the graph's quantized values.
    """

    layer: IntegerLayer
    others: Sequence[Layer]
    tensors: Tensors
    activations: Activations

    @property
    def node(self) -> ir.Node:
        """The float operator."""
        return self.layer.layer.node

    @property
    def writer(self) -> GraphWriter:
        """The graph's writer."""
        return self.tensors.writer

    def weight(self, *, kernel_order: bool) -> tuple[ir.Value, ir.Value]:
        """Write the weight; see `Tensors.weight`."""
        return self.tensors.weight(self.layer.weight, kernel_order=kernel_order)

    def weight_zero_point(self) -> ir.Value:
        """Write the zero points of the weight: kernels want them written out."""
        return self.writer.constant(np.zeros(self.layer.weight.scale.shape, np.int8))

    def integer_bias(self) -> ir.Value:
        """Write the bias as int32, in steps of the product of both scales."""
        assert self.layer.bias is not None
        return self._bias(in_steps(self.layer.bias, self.layer.source.grid, self.layer.weight))

    def float_bias(self) -> ir.Value:
        """Write the bias as float32."""
        assert self.layer.bias is not None
        return self._bias(self.layer.bias.astype(np.float32))

    def _bias(self, values: npt.NDArray[Any]) -> ir.Value:
        return self.tensors.bias(self.layer, values, self.activations.quantized, self.others)

    def remove(self, *nodes: ir.Node) -> None:
        """Remove the layer's nodes, and the dequantizer of its input if nothing else takes that."""
        inputs = self.node.inputs[:2]
        self.writer.graph.remove(nodes, safe=True)
        for value in inputs:
            drop_unused(self.writer.graph, value)


WriteLayer = Callable[[Place], None]
