"""The protocol of formats, each of which writes the weights of one kind of artifact.

Reading them back is the same for all kinds: the runtime decodes the value that goes by the weight's qualified name, and
its digest, taken from the artifact, says whether that is right.
"""

from typing import Any, NamedTuple, Protocol

import onnx_ir as ir

from qcompress_exporters.onnx_format.graph_writer import GraphWriter


class Written(NamedTuple):
    """A weight in a graph.

    Args:
        value: the weight, in its own shape.
        encoding: the way in which it is written, for reports.
    """

    value: ir.Value
    encoding: str


class WeightFormat(Protocol):
    """Writes the weights of one kind of artifact; onnxruntime folds what it writes when it loads the file."""

    def write(self, writer: GraphWriter, weight: Any, opset: int) -> Written:
        """Write a weight; its value equals `weight.dequantize()`.

        Args:
            writer: of the graph.
            weight: an artifact of the kind.
            opset: the file's.
        """

    def write_int8(self, writer: GraphWriter, weight: Any, opset: int) -> Written:
        """Write a weight for integer kernels; its value equals `weight.integers().codes`.

        Args:
            writer: of the graph.
            weight: an artifact of the kind whose `integers()` is not None.
            opset: the file's.
        """
