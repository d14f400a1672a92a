"""Writes whole nets for integer compute in any format and compares them with torch as `validate` does."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch.fx import Interpreter, Node
from torch.utils._pytree import tree_map_only

from qcompress.compressed.model import CompressedModel
from qcompress.graph.marks import MarkedRunner, mark, rounding
from qcompress.graph.program import FloatProgram, state_nodes, user_inputs
from qcompress_exporters import build
from qcompress_exporters.onnx_format import file as onnx_file
from qcompress_exporters.onnx_format.file import float_file, sites_of
from qcompress_exporters.onnx_format.int8.grids import file_grids
from qcompress_exporters.onnx_format.int8.stepped_biases import stepped
from qcompress_exporters.onnx_format.trace import Trace, trace
from qcompress_exporters.parity.checks import OUTPUT_TOLERANCE, Check, check_codes, check_weights
from qcompress_exporters.parity.differences import EXPORTER_TOLERANCE, output_error, output_limit
from qcompress_exporters.parity.replay import reference_state, replay
from qcompress_exporters.parity.sessions import Mode, run, session
from qcompress_exporters.report import Built, LayerReport
from tests.helpers import quick_torch
from tests.helpers.saturation import kernels_saturate, model_exact_here

quick_torch.look_up_once()

Arrays = dict[str, npt.NDArray[Any]]
MODES: tuple[Mode, ...] = ("exact", "deployed")
FORMATS = ("qdq", "integer")
_AS_ROUNDED = 4  # times torch's own float32 error


@dataclass
class Agreement:
    """Writes a compressed model in any format and compares it with torch on some inputs; traces it once.

    Args:
        small: a model for int8 compute; its weights are changed so that this CPU's kernels multiply exactly.
        inputs: one batch of inputs by name.
    """

    small: CompressedModel
    inputs: Mapping[str, npt.NDArray[Any]]
    built: dict[str, Built] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.small = model_exact_here(self.small)

    @cached_property
    def marked(self) -> FloatProgram:
        return mark(self.small.program, sites_of(self.small))

    @cached_property
    def graph(self) -> Trace:
        return trace(self.marked)

    @cached_property
    def feeds(self) -> Arrays:
        return dict(zip(self.small.program.input_names, self.small.program.bind(self.inputs), strict=True))

    def file(self, format: str) -> Built:
        if format not in self.built:
            with mock.patch.object(onnx_file, "trace", return_value=self.graph):
                self.built[format] = build(self.small, format=format)
        return self.built[format]

    def model(self, format: str) -> onnx.ModelProto:
        return onnx.load_from_string(self.file(format).data)

    def layers(self, format: str = "qdq") -> dict[str, LayerReport]:
        return {layer.weight: layer for layer in self.file(format).report.layers}

    def ops(self, format: str = "qdq") -> set[str]:
        return {node.op_type for node in self.model(format).graph.node}

    def failures(self, format: str) -> list[str]:
        """Return descriptions of all disagreements; empty if the file agrees with torch."""
        return list(self._failures(format))

    def _failures(self, format: str) -> Iterator[str]:
        saturated = [r.weight for r in self.layers(format).values() if r.saturation]
        if kernels_saturate() and saturated:
            yield f"{format}: {', '.join(saturated)} saturate on this CPU"
        model = self.model(format)
        onnx.checker.check_model(model, full_check=True)
        weights, values = check_weights(self.graph, model)
        yield from _said(weights)
        if values is None:
            return
        grids = file_grids(model, list(self.small.activations))
        for read, wanted in zip(grids, self.small.activations.values(), strict=True):
            grid = read.grid
            same = grid.scale == wanted.scale and 0 <= read.low <= read.high <= wanted.levels
            if not same or (wanted.zero_point is not None and grid.zero_point != wanted.zero_point):
                yield f"{format}: the grid of {wanted.site} is {grid}, not {wanted}"
        state = reference_state(self.marked, values, grids)
        for mode in MODES:
            found = replay(self.marked, model, sites_of(self.small), state, grids, [self.feeds], mode)
            yield from _said(check_codes(found, mode, len(next(iter(self.feeds.values())))), format)
            plain = run(session(self.file(format).data, mode), self.feeds)
            for name, got in plain.items():
                asked = found.got[name]
                if (error := output_error(asked, got)) > output_limit(asked, OUTPUT_TOLERANCE):
                    yield f"{format} {mode}: {name} is off by {error:.1e} without the codes as outputs"

    def distance(self, format: str) -> float:
        """Return the distance of a file from a torch program that itself quantizes with the artifacts' grids.

        Returns:
            Root mean square of the difference over that of the outputs' noise. Each differing code affects the rest of
            the net, so the distance is small, but not 0.
        """
        small, quantize = stepped(self.small), rounding(list(self.small.activations.values()))
        weights = {name: artifact.dequantize() for name, artifact in small.artifacts.items()}
        marked = self.marked.with_state(weights)
        wanted, original = MarkedRunner(marked)(self.feeds, quantize), small.program.run(self.feeds)
        got = run(session(self.file(format).data, "deployed"), self.feeds)
        off = sum(float(np.square(got[n].astype(np.float64) - wanted[n]).sum()) for n in wanted)
        noise = sum(float(np.square(original[n].astype(np.float64) - wanted[n]).sum()) for n in wanted)
        return float(np.sqrt(off / max(noise, 1e-12)))

    def exporter(self) -> list[str]:
        """Return which outputs of the float file differ too much from those that torch computes in float64.

        Where float32 loses digits by cancellation, the file may lose a few times as many as torch does.
        """
        program, original = self.small.program, float_file(self.graph, self.small.program.state())
        wanted, exact = program.run(self.feeds), self._in_float64()
        failures = []
        for mode in MODES:
            for name, got in run(session(original, mode), self.feeds).items():
                own, found = output_error(exact[name], wanted[name]), output_error(exact[name], got)
                if found > max(EXPORTER_TOLERANCE, _AS_ROUNDED * own):
                    failures.append(f"float file {mode}: {name} is off by {found:.1e}, torch's by {own:.1e}")
        return failures

    def _in_float64(self) -> dict[str, npt.NDArray[Any]]:
        program = self.small.program
        exported = program.exported
        state = {name: v.double() if v.is_floating_point() else v for name, v in program.state().items()}
        values = {node: state[name] for node, name in state_nodes(exported).items()}
        for node, array in zip(user_inputs(exported), program.bind(self.feeds), strict=True):
            value = torch.from_numpy(array)
            values[node] = value.double() if value.is_floating_point() else value
        placeholders = [values[node] for node in exported.graph.find_nodes(op="placeholder")]
        with torch.no_grad():
            found = _Doubles(exported.graph_module).run(*placeholders)
        return {n: v.numpy() for n, v in zip(program.output_names, found, strict=True)}


class _Doubles(Interpreter):
    """Runs a graph in float64, including tensors that it creates itself (the first state of an LSTM)."""

    def run_node(self, n: Node) -> Any:
        return tree_map_only(torch.Tensor, lambda v: v.double() if v.is_floating_point() else v, super().run_node(n))


def _said(check: Check, format: str = "") -> Iterator[str]:
    if not check.ok:
        text = f"{format} {check.name} {check.session}: {check.detail} (error {check.error}, limit {check.limit})"
        yield text.strip()
