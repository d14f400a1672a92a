"""Every large tensor becomes small, whatever uses it, and the file computes what its decoded values say."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qcompress.data.dataset import as_dataset
from qcompress.errors import SourceError
from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.settings import PosthocSettings
from qcompress_exporters import build
from qcompress_exporters.parity.sessions import run, session
from tests.helpers.nets import traced


class Net(nn.Module):
    """A function of the input, tensors and layers, and a layer behind it."""

    def __init__(self, function: Callable[["Net", Tensor], Tensor], **parts: tuple[int, ...] | nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(0.2 * torch.randn(part)) if isinstance(part, tuple) else part)
        self.register_buffer("table", torch.randn(32, 32))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self, x).tanh())


def cells(m: Net, x: Tensor) -> Tensor:
    h = torch.zeros(x.shape[0], 32)
    c = torch.zeros(x.shape[0], 32)
    for t in range(2):
        h, c = m.lstm(x[:, t], (h, c))
        h = m.gru(x[:, t], h)
    return h


SEQUENCE, ROWS = (3, 6, 32), (3, 32)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "bmm": (lambda: Net(lambda m, x: torch.bmm(x.transpose(0, 1), m.w).mean(0), w=(6, 32, 32)), SEQUENCE),
    "baddbmm": (
        lambda: Net(lambda m, x: torch.baddbmm(m.b, x.transpose(0, 1), m.w).mean(0), w=(6, 32, 32), b=(6, 1, 32)),
        SEQUENCE,
    ),
    "einsum": (lambda: Net(lambda m, x: torch.einsum("bti,tio->bo", x, m.w), w=(6, 32, 32)), SEQUENCE),
    "experts": (lambda: Net(lambda m, x: torch.matmul(x[:, None, None], m.w).mean((1, 2)), w=(8, 32, 32)), ROWS),
    "bilinear": (lambda: Net(lambda m, x: m.two(x, x), two=nn.Bilinear(32, 32, 32)), ROWS),
    "from the left": (lambda: Net(lambda m, x: (m.w @ x.t()).t(), w=(32, 32)), ROWS),
    "unfolded": (lambda: Net(lambda m, x: x.unfold(1, 3, 1).flatten(2) @ m.w, w=(96, 32)), SEQUENCE),
    "a table": (lambda: Net(lambda m, x: m.w[(x > 0).sum(1)], w=(33, 32)), ROWS),
    "positions": (lambda: Net(lambda m, x: (x + m.w).mean(1), w=(1, 6, 32)), SEQUENCE),
    "a buffer": (lambda: Net(lambda m, x: x * m.table[0] + x.roll(1, 0) * m.table.mean(0)), ROWS),
    "repeated": (lambda: Net(lambda m, x: functional.linear(x, m.w.repeat(4, 1)), w=(8, 32)), ROWS),
    "lstm": (
        lambda: Net(lambda m, x: m.r(x)[0].mean(1), r=nn.LSTM(32, 16, 2, batch_first=True, bidirectional=True)),
        SEQUENCE,
    ),
    "projected lstm": (
        lambda: Net(
            lambda m, x: m.r(x)[0].mean(1) + m.r(x)[1][0].sum(0).repeat(1, 2),
            r=nn.LSTM(32, 40, 2, batch_first=True, proj_size=16, bidirectional=True),
        ),
        SEQUENCE,
    ),
    "gru": (lambda: Net(lambda m, x: m.r(x)[1][0], r=nn.GRU(32, 32, batch_first=True)), SEQUENCE),
    "rnn": (lambda: Net(lambda m, x: m.r(x)[1][0], r=nn.RNN(32, 32, batch_first=True)), SEQUENCE),
    "cells": (lambda: Net(cells, lstm=nn.LSTMCell(32, 32), gru=nn.GRUCell(32, 32)), SEQUENCE),
}


@pytest.mark.parametrize("name", NETS)
def test_every_large_tensor_is_small_and_right(name: str) -> None:
    torch.manual_seed(0)
    make, shape = NETS[name]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    program = traced(make().eval(), x=x)
    data = as_dataset({"x": np.repeat(x, 4, 0)})
    small = compress_program(program, Plan.from_flags(bits=4), PosthocSettings(), calibration=data)
    left = {n: a.nbytes for n, a in small.artifacts.items() if a.reason}
    assert max(left.values()) <= 4 * 160, left  # biases
    floats = small.program.with_state({n: a.dequantize() for n, a in small.artifacts.items()})
    inputs = {"x": x}
    got = run(session(build(small).data, "exact"), inputs)["output"]
    np.testing.assert_allclose(got, floats.run(inputs)["output"], rtol=1e-4, atol=1e-5)
    wanted = program.run(inputs)["output"]
    assert np.square(got - wanted).sum() < 0.2 * np.square(wanted).sum()


class Continued(nn.Module):
    """An LSTM with projections that is given its first state."""

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.LSTM(32, 40, batch_first=True, proj_size=16)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.r(x, (h, torch.zeros(1, x.shape[0], 40)))[0]


def test_a_projected_lstm_that_is_given_a_state_is_refused() -> None:
    x, h = np.zeros((3, 6, 32), np.float32), np.zeros((1, 3, 16), np.float32)
    small = compress_program(traced(Continued().eval(), x=x, h=h), Plan.from_flags(bits=4))
    with pytest.raises(SourceError, match=r"an LSTM with proj_size must begin with zeros.*leave the state out"):
        build(small)
