"""The marks of a graph become quantizers, and operators that move quantized values move their codes.

The rules that onnxruntime's fusions follow were measured, not read: unsigned activations, 0-d scales. Operators that
only move values (Slice, Pad, Reshape, MaxPool, ...) move codes, so that they need no quantizers of their own. That is
exact.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from qcompress.artifacts import SiteGrid
from qcompress_exporters.onnx_format.graph_writer import GraphWriter
from qcompress_exporters.onnx_format.int8.grid_format import Formats, Quantizer, format_of
from qcompress_exporters.onnx_format.int8.hard_sigmoid import write_as_sum
from qcompress_exporters.onnx_format.int8.lookup import FUNCTIONS, write_as_lookup
from qcompress_exporters.onnx_format.marks import is_mark, site_of
from qcompress_exporters.onnx_format.names import code_name
from qcompress_exporters.onnx_format.passes.hoist_marks import RESHAPES
from qcompress_exporters.onnx_format.passes.replace import drop_unused, input_of, optional_input, replace_node

_SUMS: Final = ("Add", "Mul")
_MOVES: Final = (*RESHAPES, "Transpose", "Slice", "MaxPool", "Expand", "Split", "Gather", "DepthToSpace", "Resize")


@dataclass(frozen=True, slots=True)
class Quantized:
    """A value that is dequantized from codes.

    Args:
        floats: what a DequantizeLinear gives.
        site: index of its site.
        grid: the site's grid.
    """

    floats: ir.Value
    site: int
    grid: SiteGrid

    @property
    def codes(self) -> ir.Value:
        """The uint8 codes."""
        return self._dequantizer(0)

    @property
    def scale(self) -> ir.Value:
        """The scale of the codes."""
        return self._dequantizer(1)

    def _dequantizer(self, position: int) -> ir.Value:
        node = self.floats.producer()
        assert node is not None
        return input_of(node, position)


@dataclass(slots=True)
class Activations:
    """The quantized values of a graph.

    Args:
        writer: of the graph.
        grids: one for each site, in the order of the marks' indices.
        formats: what writes each kind of grid.
        quantized: by what the DequantizeLinear gives.
        shifted: values that have a free offset taken off in front of their quantizer, and the offset.
        compared: values that are compared with thresholds.
    """

    writer: GraphWriter
    grids: Sequence[SiteGrid]
    formats: Formats
    quantized: dict[ir.Value, Quantized] = field(default_factory=dict)
    shifted: dict[ir.Value, float] = field(default_factory=dict)
    compared: set[ir.Value] = field(default_factory=set)
    _written: dict[tuple[ir.Value, str], Quantizer] = field(default_factory=dict)
    _named: set[int] = field(default_factory=set)

    def quantize(self) -> None:
        """Write quantizers in place of all marks."""
        for node in list(self.writer.graph):
            if is_mark(node):
                self._replace(node)
        for node in list(self.writer.graph):
            is_sum = node.op_type in _SUMS and not node.domain
            if is_sum and any(user.op_type == "QuantizeLinear" for user in node.outputs[0].consumers()):
                self._dequantize_number(node)

    def _dequantize_number(self, node: ir.Node) -> None:
        """Let a number that a dequantized value is added to, or multiplied with, be code 1 or -1 of its own scale."""
        for position in (0, 1):
            number, other = input_of(node, position).const_value, input_of(node, 1 - position)
            if other in self.quantized and number is not None and not len(number.shape) and number.numpy():
                value = np.asarray(number.numpy(), np.float32)
                codes = (0, 1) if value < 0 else (1, 0)  # the code, and the zero point
                scale = self.writer.constant(np.abs(value))
                inputs = [self.code(codes[0]), scale, self.code(codes[1])]
                node.replace_input_with(position, self.writer.add("DequantizeLinear", inputs))

    def _replace(self, mark: ir.Node) -> None:
        graph, value, site = self.writer.graph, input_of(mark, 0), site_of(mark)
        if value in self.quantized and self.quantized[value].site == site:  # moved here as codes
            replace_node(graph, mark, value)
            self._push_down(self.quantized[value])
            return
        mark.replace_input_with(0, None)
        quantizer = self._quantizer(value, site)
        found = self._dequantize(quantizer.codes, quantizer.scale, site)
        replace_node(graph, mark, found.floats)
        self._push_down(found)

    def _quantizer(self, value: ir.Value, site: int) -> Quantizer:
        """Return what quantizes a value at a site; sites of equal grids share it."""
        grid = self.grids[site]
        key = value, json.dumps({**grid.as_dict(), "site": None})
        named = site in self._named
        self._named.add(site)
        if key in self._written:
            if not named:  # the same codes by the name of this site too
                self.writer.add("Identity", [self._written[key].codes], code_name(site))
            return self._written[key]
        quantizer = format_of(grid, self.formats).write(self.writer, grid, value, None if named else site)
        self._written[key] = quantizer
        if quantizer.shifted is not None:
            self.shifted[quantizer.shifted] = float(grid.free_offset)
        if quantizer.compares:
            self.compared.add(value)
        return quantizer

    def _dequantize(self, codes: ir.Value, scale: ir.Value, site: int) -> Quantized:
        zero_point = self.code(self.grids[site].stored_zero_point)
        floats = self.writer.add("DequantizeLinear", [codes, scale, zero_point])
        return self._remember(floats, site)

    def _remember(self, floats: ir.Value, site: int) -> Quantized:
        self.quantized[floats] = Quantized(floats, site, self.grids[site])
        return self.quantized[floats]

    def _push_down(self, source: Quantized) -> None:
        """Let what moves a dequantized value move its codes."""
        for user in source.floats.consumers():
            write = self._function(user, source)
            if write is not None:
                write(self.writer, user)
                continue
            if not self._moves_codes(user, source):
                continue
            if user.op_type == "Pad":
                user.resize_inputs(max(3, len(user.inputs)))
                user.replace_input_with(2, self.code(source.grid.stored_zero_point))
            codes, scale = source.codes, source.scale
            user.replace_input_with(0, codes)
            zero_point = self.code(source.grid.stored_zero_point)
            for output in user.outputs:
                moved = self.writer.insert_behind(output, "DequantizeLinear", [scale, zero_point])
                self._push_down(self._remember(moved, source.site))
        drop_unused(self.writer.graph, source.floats)

    def _function(self, node: ir.Node, source: Quantized) -> Callable[[GraphWriter, ir.Node], None] | None:
        """Return what writes a function of a dequantized value in another way; None for other nodes."""
        if node.domain or node.graph is not self.writer.graph or source.grid.zero_point is None:
            return None
        if node.op_type == "HardSigmoid":
            return write_as_sum
        return write_as_lookup if node.op_type in FUNCTIONS else None

    def _moves_codes(self, node: ir.Node, source: Quantized) -> bool:
        takes_once = list(node.inputs).count(source.floats) == 1 and node.inputs[0] is source.floats
        if node.domain or node.graph is not self.writer.graph or not takes_once:
            return False
        if (len(node.outputs) != 1 and node.op_type != "Split") or any(not o.name for o in node.outputs):
            return False
        mode = node.attributes.get_string("mode", {"Resize": "nearest", "Pad": "constant"}.get(node.op_type, ""))
        if node.op_type == "Resize":
            return mode == "nearest"
        if node.op_type == "Pad":
            fill = optional_input(node, 2)
            constant = None if fill is None else fill.const_value
            with_zeros = fill is None or (constant is not None and not constant.numpy().any())
            return mode == "constant" and with_zeros and source.grid.zero_point is not None
        return node.op_type in _MOVES

    def add_offsets(self, takes_offset: Callable[[ir.Node], bool]) -> set[ir.Value]:
        """Add a free offset back to a dequantized value, unless all its users are layers that fold it.

        Args:
            takes_offset: whether a node is such a layer.

        Returns:
            The values that have their offsets.
        """
        by_site: dict[int, list[Quantized]] = {}
        for source in self.quantized.values():
            if source.grid.zero_point is None and source.floats.graph is not None:
                by_site.setdefault(source.site, []).append(source)
        added: set[ir.Value] = set()
        for sources in by_site.values():
            users = [user for source in sources for user in source.floats.consumers()]
            if all(takes_offset(user) for user in users) and not any(s.floats.is_graph_output() for s in sources):
                continue
            for source in sources:
                offset = self.writer.constant(np.asarray(source.grid.free_offset, np.float32))
                added.add(self.writer.insert_behind(source.floats, "Add", [offset]))
                del self.quantized[source.floats]
        return added

    def code(self, value: Any) -> ir.Value:
        """Return a shared constant code."""
        return self.writer.constant(np.asarray(value, np.uint8))
