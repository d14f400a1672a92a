"""Recurrent layers take sequences of any length where the length is dynamic."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress.graph.options import ProgramOptions
from qcompress.graph.tracing import from_module
from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.settings import PosthocSettings
from qcompress_exporters import build
from qcompress_exporters.parity.sessions import run, session


class LastStep(nn.Module):
    """What a recurrent layer returns at the last step, and all its steps in one row."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        steps = self.layer(x)[0]
        return steps[:, -1], steps.reshape(x.shape[0], -1)


LAYERS: dict[str, Callable[..., nn.RNNBase]] = {"gru": nn.GRU, "rnn": nn.RNN, "lstm": nn.LSTM}
TWO_WAYS = {"bidirectional": True, "num_layers": 2}


@pytest.mark.parametrize(("kind", "options"), [("gru", {}), ("rnn", {}), ("gru", TWO_WAYS), ("lstm", TWO_WAYS)])
def test_files_take_any_length(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = LastStep(LAYERS[kind](8, 16, batch_first=True, **options)).eval()
    inputs = {"x": np.random.default_rng(0).standard_normal((3, 11, 8)).astype(np.float32)}
    program = from_module(net, ProgramOptions(inputs=inputs, dynamic={("x", 1): "length"}))
    assert program.dynamic == {("x", 0): "batch", ("x", 1): "length"}
    small = compress_program(program, Plan.from_flags(bits=8), PosthocSettings(effort="fast"))
    file = session(build(small).data, "exact")
    decoded = small.to_module()
    for batch, length in ((1, 5), (3, 11), (2, 1)):
        x = inputs["x"][:batch, :length]
        wanted = decoded(torch.tensor(x))
        for found, output in zip(run(file, {"x": x}).values(), wanted, strict=True):
            np.testing.assert_allclose(found, output.detach(), atol=1e-5)
