"""Modules that hold more than float tensors: quantized ones are refused, extra state is left as it is."""

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress import compress
from qcompress.errors import SourceError
from qcompress.finetune.attach import prepare
from qcompress.finetune.config import LoopConfig
from qcompress.finetune.losses import Objective
from qcompress.finetune.trainer import Trainer
from qcompress.plan.plan import Plan
from tests.helpers.nets import traced


class Extra(nn.Module):
    """Extra state that is no tensor, and that JSON cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.meta = nn.Linear(6, 3), {"version": {3}}

    def get_extra_state(self) -> Any:
        return self.meta

    def set_extra_state(self, state: Any) -> None:
        self.meta = state

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_extra_state_is_left_as_it_is() -> None:
    net, x = Extra().eval(), torch.randn(4, 6)
    small = compress(net, Plan.from_flags(bits=4), example_inputs=(x,))
    assert set(small.artifacts) == {"layer.weight", "layer.bias"}
    tuned = prepare(net, Plan.from_flags(bits=4), example_inputs=(x,))
    tuned(x).sum().backward()
    assert tuned.finalize().artifacts["layer.weight"].bits == 4
    objective = Objective(nn.functional.mse_loss)
    trainer = Trainer(tuned, LoopConfig(epochs=1), 2, objective, forward=lambda model, x: model(x))
    state = trainer.state()
    assert "version" not in json.dumps(state.values)
    trainer.restore(state)
    assert net.meta == {"version": {3}}


class Codes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.quantize_per_tensor(torch.randn(3, 6), 0.1, 0, torch.qint8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.codes.dequantize().T


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_quantized_models_are_refused() -> None:
    linear = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(6, 3)), {nn.Linear}, dtype=torch.qint8)
    x = np.zeros((2, 6), np.float32)
    with pytest.raises(SourceError, match=r"^The model is quantized already: 0 is a torch\.ao\.nn\.quantized\.dynamic"):
        traced(linear, x=x)
    with pytest.raises(SourceError, match=r"^The model is quantized already: codes is a tensor of torch\.qint8\."):
        traced(Codes(), x=x)
    with pytest.raises(SourceError, match=r"^The model is quantized already"):
        prepare(linear, Plan.from_flags(bits=4), example_inputs=(torch.zeros(2, 6),))


class Random(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.draw = nn.Linear(6, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.draw(x))


def dropped(x: Tensor) -> Tensor:
    return nn.functional.dropout(x, 0.5, training=True)


def attended(x: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1)


def initialised(x: Tensor) -> Tensor:
    return x + torch.zeros_like(x).normal_()


DRAWS = (dropped, attended, initialised, lambda x: x + torch.rand(6), lambda x: x * torch.bernoulli(x.sigmoid()))


@pytest.mark.parametrize("draw", DRAWS)
def test_models_with_random_outputs_are_refused(draw: Callable[[Tensor], Tensor]) -> None:
    message = r"^The model's outputs are random, in eval mode too: [\w.]+ draws random numbers at .*test_odd_modules"
    with pytest.raises(SourceError, match=message):
        traced(Random(draw).eval(), x=np.ones((2, 6), np.float32))


QUIET = (
    lambda x: nn.functional.dropout(x, 0.5, training=False),
    lambda x: nn.functional.dropout(x, 0.0, training=True),
    lambda x: nn.functional.scaled_dot_product_attention(x, x, x),
    lambda x: (torch.rand(6), x)[1],
)


@pytest.mark.parametrize("quiet", QUIET)
def test_what_draws_nothing_is_taken(quiet: Callable[[Tensor], Tensor]) -> None:
    assert traced(Random(quiet).eval(), x=np.ones((2, 6), np.float32)).output_names


def ends(x: Tensor) -> Tensor:
    sys.exit(0)


def test_a_forward_that_ends_the_process_is_an_error() -> None:
    with pytest.raises(SourceError, match=r"^The model's forward ends the process \(sys\.exit\(0\)\): it must return"):
        traced(Random(ends).eval(), x=np.ones((2, 6), np.float32))
