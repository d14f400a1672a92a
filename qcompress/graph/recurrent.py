"""Recurrent layers in a trace: torch goes through them step by step, and so allows the length of the example alone.

While a model is traced, its layers are operators of our own with the same arguments, which know their shapes; torch's
own operators then take their places in the graph.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from qcompress.graph.program import copy_graph, rebuild

_OPTIONS: Final = (
    "Tensor[] params, bool has_biases, int num_layers, float dropout, bool train, bool bidirectional, bool batch_first"
)


def _output(x: torch.Tensor, state: torch.Tensor, bidirectional: bool, batch_first: bool) -> torch.Tensor:
    """Return an empty output: what torch returns for the batch in front is transposed."""
    width = state.shape[-1] * (2 if bidirectional else 1)
    steps_first = x.transpose(0, 1) if batch_first else x
    out = x.new_empty([*steps_first.shape[:2], width])
    return out.transpose(0, 1) if batch_first else out


def _lstm_shapes(
    x: torch.Tensor, hx: Sequence[torch.Tensor], params: Sequence[torch.Tensor], has_biases: bool,
    num_layers: int, dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return _output(x, hx[0], bidirectional, batch_first), hx[0].new_empty(hx[0].shape), hx[1].new_empty(hx[1].shape)


def _shapes(
    x: torch.Tensor, hx: torch.Tensor, params: Sequence[torch.Tensor], has_biases: bool,
    num_layers: int, dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return _output(x, hx, bidirectional, batch_first), hx.new_empty(hx.shape)


def _operator(name: str, state: str, outputs: int, shapes: Callable[..., Any]) -> Any:
    library: Any = torch.ops.qcompress
    if not hasattr(library, name):  # torch keeps operators for the life of the process
        returned = ", ".join(["Tensor"] * outputs)
        torch.library.define(f"qcompress::{name}", f"(Tensor input, {state} hx, {_OPTIONS}) -> ({returned})")
        torch.library.register_fake(f"qcompress::{name}")(shapes)
    return getattr(library, name).default


_OWN: Final = {
    "lstm": _operator("lstm", "Tensor[]", 3, _lstm_shapes),
    "gru": _operator("gru", "Tensor", 2, _shapes),
    "rnn_tanh": _operator("rnn_tanh", "Tensor", 2, _shapes),
    "rnn_relu": _operator("rnn_relu", "Tensor", 2, _shapes),
}
OWN_LAYERS: Final[Mapping[Any, Any]] = {getattr(torch.ops.aten, name).input: own for name, own in _OWN.items()}
_BUILTIN: Final = type(torch.lstm)
_ARGUMENTS: Final = 9


class RecurrentLayers(TorchFunctionMode):
    """While active, recurrent layers are called as operators of our own; not those of packed sequences."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        own = _OWN.get(func.__name__) if isinstance(func, _BUILTIN) else None
        is_packed = len(args) > 3 and not isinstance(args[3], bool)  # lengths stand in front of the state
        if own is not None and len(args) == _ARGUMENTS and not kwargs and not is_packed:
            return own(*args)
        return func(*args, **(kwargs or {}))


def with_torchs_layers(exported: ExportedProgram) -> ExportedProgram:
    """Return the program with torch's own recurrent layers for ours, with which it can run."""
    return _replaced(exported, {own: torchs for torchs, own in OWN_LAYERS.items()})


def with_own_layers(exported: ExportedProgram) -> ExportedProgram:
    """Return the program with our recurrent layers for torch's, with which torch can trace it again at any length."""
    return _replaced(exported, OWN_LAYERS)


def _replaced(exported: ExportedProgram, operators: Mapping[Any, Any]) -> ExportedProgram:
    if not any(node.target in operators for node in exported.graph.nodes):
        return exported
    module = copy_graph(exported)
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in operators:
            node.target = operators[node.target]
    module.recompile()
    return rebuild(exported, module=module)
