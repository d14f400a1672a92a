"""Modules that hold more than float tensors: quantized ones are refused, extra state is left as it is."""

import json
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
