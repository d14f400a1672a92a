"""Clamps of a value in front of its quantizer."""

from typing import Final

import numpy as np
import onnx_ir as ir

from qcompress_exporters.onnx_format.passes.replace import input_of, optional_input

CLAMPS: Final = ("Relu", "Clip")


def absorb_clamps(graph: ir.Graph, value: ir.Value) -> tuple[ir.Value, tuple[float, float]]:
    """Remove the clamps that give a value and have no other user than its quantizer.

    Rounding is monotone, so that clamping before it equals clamping to the rounded ends after it.

    Args:
        graph: holds the clamps.
        value: what is to be quantized; nothing takes it yet.

    Returns:
        The value in front of the clamps, and their ends.
    """
    ends = (-np.inf, np.inf)
    while (
        (node := value.producer()) is not None
        and node.op_type in CLAMPS
        and not value.uses()
        and not value.is_graph_output()
        and (clamp := _ends(node)) is not None
    ):
        ends = (float(np.clip(clamp[0], *ends)), float(np.clip(clamp[1], *ends)))
        value = input_of(node, 0)
        graph.remove(node, safe=True)
    return value, ends


def _ends(clamp: ir.Node) -> tuple[float, float] | None:
    """Return the least and the largest value that a clamp passes; None if they are not constant."""
    if clamp.op_type == "Relu":
        return 0.0, np.inf
    ends = [-np.inf, np.inf]
    for position in (1, 2):
        end = optional_input(clamp, position)
        if end is None:
            continue
        if end.const_value is None:
            return None
        ends[position - 1] = float(end.const_value.numpy())
    return (ends[0], ends[1]) if ends[0] <= ends[1] else None
