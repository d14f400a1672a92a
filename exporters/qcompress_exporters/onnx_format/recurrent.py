"""Recurrent layers as ONNX's own operators: torch.onnx's translations in fewer nodes, and with projections.

torch stacks gates in another order than ONNX. An LSTM whose output h̃ is projected (h = P h̃) is a plain LSTM: its
recurrent matrix is that of torch times P, and what it returns is multiplied by P. Its first state must be zero, since
not every h has an h̃.

Shape suffixes: T = steps, B = batch, D = directions, H = hidden units, P = projected units.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from onnxscript import opset18
from torch.fx import Node

from qcompress.errors import SourceError
from qcompress.graph.nodes import arguments
from qcompress.graph.program import FloatProgram, value_of
from qcompress.graph.recurrent import OWN_LAYERS

op: Final[Any] = opset18  # takes Python's numbers, too, which its types do not say
_ZEROS: Final = ("zeros", "zeros_like", "new_zeros")


@dataclass(frozen=True, slots=True)
class _Cell:
    """How ONNX writes a recurrent layer.

    Args:
        operator: the ONNX operator.
        gates: the places in torch's order of the gates in ONNX's order.
        options: attributes of the operator.
    """

    operator: Callable[..., Any]
    gates: tuple[int, ...]
    options: Mapping[str, Any]


_GRU: Final = _Cell(op.GRU, (1, 0, 2), {"linear_before_reset": 1})
_LSTM: Final = _Cell(op.LSTM, (0, 3, 1, 2), {})


def _translate_lstm(
    x: Any, hx: Sequence[Any], params: Sequence[Any], has_biases: bool, num_layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Any, ...]:  # fmt: skip
    return _layers(_LSTM, x, hx, params, has_biases, num_layers, bidirectional, batch_first)


def _translate_gru(
    x: Any, hx: Any, params: Sequence[Any], has_biases: bool, num_layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool,
) -> tuple[Any, ...]:  # fmt: skip
    return _layers(_GRU, x, [hx], params, has_biases, num_layers, bidirectional, batch_first)


def _rnn(activation: str) -> Callable[..., tuple[Any, ...]]:
    def translate(
        x: Any, hx: Any, params: Sequence[Any], has_biases: bool, num_layers: int, dropout: float, train: bool,
        bidirectional: bool, batch_first: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        cell = _Cell(op.RNN, (0,), {"activations": [activation] * (1 + bidirectional)})
        return _layers(cell, x, [hx], params, has_biases, num_layers, bidirectional, batch_first)

    return translate


# For torch.onnx, which reads their signatures.
TRANSLATIONS: Final[Mapping[Any, Callable[..., Any]]] = {
    OWN_LAYERS[torch.ops.aten.lstm.input]: _translate_lstm,
    OWN_LAYERS[torch.ops.aten.gru.input]: _translate_gru,
    OWN_LAYERS[torch.ops.aten.rnn_tanh.input]: _rnn("Tanh"),
    OWN_LAYERS[torch.ops.aten.rnn_relu.input]: _rnn("Relu"),
}


def check_recurrent(program: FloatProgram) -> None:
    """Refuse projected LSTMs that begin with a state of their own.

    Raises:
        SourceError: names the layer's weight.
    """
    for node in program.exported.graph.nodes:
        if node.target is not torch.ops.aten.lstm.input:
            continue
        h, c = arguments(node)["hx"]
        if value_of(h).shape[2] != value_of(c).shape[2] and not _is_zero(h):
            raise SourceError(
                f"{node.name}: an LSTM with proj_size must begin with zeros, which ONNX's LSTM can do, but this one is "
                "given a state: leave the state out, or use an LSTM without proj_size."
            )


def _is_zero(node: Node) -> bool:
    name = getattr(node.target, "_opname", "")
    return name in _ZEROS or (name in ("full", "full_like") and arguments(node).get("fill_value") == 0)


def _layers(
    cell: _Cell,
    x: Any,
    states: Sequence[Any],
    params: Sequence[Any],
    has_biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Any, ...]:
    """Return the outputs and the last states of stacked layers.

    Args:
        cell: what they are.
        x: inputs.
        states: the first states, [layers * D, B, P] and, of an LSTM, [layers * D, B, H].
        params: for each layer and direction: weight_ih, weight_hh, then the biases and the projection, if any.
        has_biases: whether it has biases.
        layers: their number.
        bidirectional: whether each runs in both directions.
        batch_first: whether x is [B, T, inputs].
    """
    directions, hidden = 1 + bidirectional, states[-1].shape[2]
    projects = states[0].shape[2] != hidden
    each = 2 + 2 * has_biases + projects
    if batch_first:
        x = op.Transpose(x, perm=[1, 0, 2])
    ends: list[list[Any]] = [[] for _ in states]
    for layer in range(layers):
        first = layer * directions
        own = [params[i * each : (i + 1) * each] for i in range(first, first + directions)]
        projection = _joined([op.Unsqueeze(op.Transpose(p[-1], perm=[1, 0]), [0]) for p in own]) if projects else None
        begin = [_states(state, first, directions, layers) for state in states]
        y, *last = cell.operator(
            x,
            _joined([_gates(cell, p[0], hidden) for p in own]),
            _joined([_gates(cell, op.MatMul(p[1], p[-1]) if projects else p[1], hidden) for p in own]),
            _joined([_biases(cell, p[2], p[3], hidden) for p in own]) if has_biases else None,
            None,
            *([None, *begin[1:]] if projects else begin),
            direction="bidirectional" if bidirectional else "forward",
            hidden_size=hidden,
            **cell.options,
        )
        if projects:
            y, last[0] = op.MatMul(y, projection), op.MatMul(last[0], projection)
        for found, value in zip(ends, last, strict=True):
            found.append(value)
        x = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, -1]) if bidirectional else op.Squeeze(y, [1])
    if batch_first:
        x = op.Transpose(x, perm=[1, 0, 2])
    return x, *(_joined(found) for found in ends)


def _gates(cell: _Cell, weight: Any, hidden: int) -> Any:
    """Return a matrix as [1, gates * H, inputs] with its gates in ONNX's order."""
    if len(cell.gates) == 1:
        return op.Unsqueeze(weight, [0])
    gates = op.Gather(op.Reshape(weight, [len(cell.gates), hidden, -1]), list(cell.gates), axis=0)
    return op.Reshape(gates, [1, len(cell.gates) * hidden, -1])


def _biases(cell: _Cell, of_input: Any, of_state: Any, hidden: int) -> Any:
    """Return both biases as [1, 2 * gates * H] with their gates in ONNX's order."""
    both = op.Concat(of_input, of_state, axis=0)
    if len(cell.gates) > 1:
        both = op.Gather(op.Reshape(both, [2, len(cell.gates), hidden]), list(cell.gates), axis=1)
    return op.Reshape(both, [1, -1])


def _states(state: Any, first: int, count: int, layers: int) -> Any:
    return state if layers == 1 else op.Slice(state, [first], [first + count], [0])


def _joined(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else op.Concat(*values, axis=0)
