"""Counting the float operators between integer layers."""

import numpy as np
import pytest
import torch
from torch import nn

from qcompress.data.dataset import as_dataset
from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.settings import PosthocSettings
from qcompress_exporters import build
from tests.helpers.nets import randomized, traced


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.inner(x).chunk(3, -1)
        mixed = self.outer(torch.softmax(q @ k.transpose(1, 2) * 0.25, -1) @ v)
        return self.head(self.norm(x + mixed))


def convs(function: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), function, nn.Conv2d(8, 4, 3))


pooled = nn.Sequential(nn.ELU(), nn.MaxPool2d(2))
squeezed = nn.Sequential(convs(nn.Hardswish()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
NETS = {
    "attention": (Attention(), (4, 6, 16), {"MatMul": 2, "Mul": 1, "Softmax": 1, "LayerNormalization": 1}),
    "relu": (convs(nn.ReLU()), (4, 3, 8, 8), {}),
    "tanh": (convs(nn.Tanh()), (4, 3, 8, 8), {"Tanh": 1}),
    "elu and pooling": (convs(pooled), (4, 3, 12, 12), {"Elu": 1}),
    "squeezed": (squeezed, (4, 3, 8, 8), {}),
}


@pytest.mark.parametrize("way", ["qdq", "integer"])
@pytest.mark.parametrize("name", NETS)
def test_operators_between_layers_are_counted(name: str, way: str) -> None:
    module, shape, wanted = NETS[name]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    plan = Plan.from_flags(bits=8, activation_bits=8)
    inputs = {"x" if name == "attention" else "input": x}
    program, data = traced(randomized(module).eval(), **inputs), as_dataset(inputs)
    small = compress_program(program, plan, PosthocSettings(effort="fast"), calibration=data)
    report = build(small, format=way).report
    assert all(layer.compute == "int8" for layer in report.layers)
    assert report.float_operators == wanted
