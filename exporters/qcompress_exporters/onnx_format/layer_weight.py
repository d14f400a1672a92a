"""Finds the weight of a layer in a file."""

from collections.abc import Collection, Mapping
from typing import Final

import onnx

LAYERS: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_DECODED: Final = 8  # most nodes between a layer and its weight


def layer_weight(node: onnx.NodeProto, givers: Mapping[str, onnx.NodeProto], weights: Collection[str]) -> str | None:
    """Return the weight of a layer; None for other nodes, and for layers of other weights.

    Args:
        node: any node of the file.
        givers: the node that gives each value.
        weights: qualified names of weights, which their codes or decoded values have in the file.
    """
    if node.op_type not in LAYERS:
        return None
    name = str(node.input[1])
    for _ in range(_DECODED):
        if name in weights:
            return name
        if name not in givers or not givers[name].input:
            return None
        name = str(givers[name].input[0])
    return None
