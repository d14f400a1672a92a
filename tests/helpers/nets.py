"""Small networks that together contain every kind of layer, and functions that trace them and make inputs."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from qcompress.graph.options import ProgramOptions
from qcompress.graph.program import FloatProgram
from qcompress.graph.tracing import from_module


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Return the module in eval mode with BatchNorm statistics and scales as after training, some scales negative."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 2.0, generator=generator)
            if layer.affine:
                nn.init.normal_(layer.weight, generator=generator)
                nn.init.normal_(layer.bias, generator=generator)
    return module.eval()


class Residual(nn.Module):
    """Convolutions of every kind, most with BatchNorm, a residual add and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.depthwise_bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 3, groups=2)
        self.up_bn = nn.BatchNorm2d(6, affine=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem_bn(self.stem(x)).relu()
        x = (x + self.depthwise_bn(self.depthwise(x))).relu()
        x = self.up_bn(self.up(self.grouped(x).relu())).relu()
        return self.head(x.mean((2, 3)))


class Tied(nn.Module):
    """An embedding tied to the output layer, attention and a recurrent layer; takes and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recur = nn.LSTM(8, 8, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x = self.embed(batch["ids"]) * batch["mask"].unsqueeze(-1)
        y, _ = self.attend(x, x, x)
        z, _ = self.recur(x)
        hidden = self.norm(y + z)
        return {"logits": self.head(hidden), "hidden": hidden}


def traced(module: nn.Module, **inputs: Any) -> FloatProgram:
    """Trace a module to a float program, with example arrays by input name."""
    return from_module(module, ProgramOptions(inputs={n: np.asarray(v) for n, v in inputs.items()}))


def image(batch: int = 3, seed: int = 0, shape: tuple[int, ...] = (3, 9, 9)) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return random input images."""
    return np.random.default_rng(seed).standard_normal((batch, *shape)).astype(np.float32)


def sentences(batch: int = 3, seed: int = 0) -> Mapping[str, np.ndarray[Any, Any]]:
    """Return inputs of `Tied`."""
    random = np.random.default_rng(seed)
    return {"ids": random.integers(0, 40, (batch, 5)), "mask": (random.random((batch, 5)) < 0.8).astype(np.float32)}


@functools.cache
def residual() -> FloatProgram:
    """Return `Residual`, traced once, with the same weights each time."""
    return seeded(Residual, x=image())


@functools.cache
def tied() -> FloatProgram:
    """Return `Tied`, traced once, with the same weights each time."""
    return seeded(Tied, **sentences())


def seeded(make: type[nn.Module], **inputs: Any) -> FloatProgram:
    """Trace a net of the given class with the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return traced(randomized(make()), **inputs)
