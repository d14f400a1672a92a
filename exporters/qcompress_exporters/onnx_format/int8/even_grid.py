"""Even grids: QuantizeLinear, a Clip of the codes below 8 bits, and a Sub in front where an offset is free."""

from typing import Any, Final, final

import numpy as np
import onnx_ir as ir

from qcompress.artifacts import ActivationGrid
from qcompress.artifacts.base import Floats
from qcompress_exporters.onnx_format.graph_writer import GraphWriter
from qcompress_exporters.onnx_format.int8.clamps import absorb_clamps
from qcompress_exporters.onnx_format.int8.grid_format import FileGrid, Quantizer, StoredCodes, scalar
from qcompress_exporters.onnx_format.names import code_name
from qcompress_exporters.onnx_format.passes.replace import input_of, optional_input

_LARGEST: Final = 255
_QUANTIZERS: Final = {"QuantizeLinear": 1, "QLinearConv": 6, "QLinearMatMul": 6}  # position of the output's scale


@final
class EvenGrid:
    """Writes and reads `ActivationGrid`."""

    def stored(self, grid: ActivationGrid) -> ActivationGrid:
        """Return the grid with codes as they are stored; see `GridFormat`."""
        return _grid(grid.site, grid.scale, grid.stored_zero_point, grid.free_offset, grid.bits)

    def write(self, writer: GraphWriter, grid: ActivationGrid, value: ir.Value, site: int | None) -> Quantizer:
        """Write the nodes that quantize a value; see `GridFormat`.

        Clamps in front of the quantizer become a clamp of its codes, or nothing.
        """
        value, ends = absorb_clamps(writer.graph, value)
        low, high = (int(grid.quantize(np.float32(end).reshape(1))[0]) for end in ends)
        shifted = None
        if grid.zero_point is None:
            value = shifted = writer.add("Sub", [value, writer.constant(grid.free_offset)])
        name = None if site is None else code_name(site)
        clamped = low > 0 or high < _LARGEST
        scale = writer.constant(grid.scale)
        inputs = [value, scale, _code(writer, grid.stored_zero_point)]
        codes = writer.add("QuantizeLinear", inputs, None if clamped else name)
        if clamped:
            least = _code(writer, low) if low > 0 else None
            codes = writer.add("Clip", [codes, least, *([_code(writer, high)] if high < _LARGEST else [])], name)
        return Quantizer(codes, scale, shifted)

    def read(self, stored: StoredCodes) -> FileGrid | None:
        """Return the grid of a site; see `GridFormat`."""
        codes, ends = stored.codes, [0, _LARGEST]
        node = codes.producer()
        if node is not None and node.op_type == "Clip":
            for position in (1, 2):
                end = optional_input(node, position)
                if end is not None:
                    ends[position - 1] = int(scalar(end))
            node = input_of(node, 0).producer()
        if node is None or node.op_type not in _QUANTIZERS:
            return None
        position = _QUANTIZERS[node.op_type]
        scale, zero_point = (scalar(optional_input(node, i)) for i in (position, position + 1))
        offset, taken = np.asarray(stored.offset, np.float32), bool(stored.offset)
        source = input_of(node, 0).producer()
        if taken and node.op_type == "QuantizeLinear" and source is not None and source.op_type == "Sub":
            offset, taken = np.asarray(scalar(source.inputs[1]), np.float32), False
        folded = bool(stored.offset) and not _is_added_back(codes, offset)
        grid = _grid(stored.site, np.asarray(scale, np.float32), int(zero_point), offset, stored.bits)
        return FileGrid(grid, ends[0], ends[1], folded, taken)


def _grid(site: tuple[str, int], scale: Floats, zero_point: int, offset: Floats, bits: int) -> ActivationGrid:
    """Return the grid that stored numbers stand for."""
    if not offset:
        return ActivationGrid.from_zero_point(site, scale, zero_point, bits)
    return ActivationGrid(site=site, scale=scale, offset=offset, bits=bits, signed=zero_point != 0)


def _is_added_back(codes: ir.Value, offset: Any) -> bool:
    """Return whether a free offset is added to what the codes dequantize to, wherever they are moved first."""
    stack = [codes]
    while stack:
        for user in stack.pop().consumers():
            if user.op_type != "DequantizeLinear":
                stack += user.outputs
                continue
            for behind in user.outputs[0].consumers():
                constants = [v.const_value for v in behind.inputs if v is not None and v.const_value is not None]
                if behind.op_type == "Add" and any(not len(c.shape) and c.numpy() == offset for c in constants):
                    return True
    return False


def _code(writer: GraphWriter, value: int) -> ir.Value:
    return writer.constant(np.asarray(value, np.uint8))
