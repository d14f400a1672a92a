"""Activations with thresholds in a file: where they stand, ties, what moves their codes, what validate must not pass."""

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import agreement
import small_models
from agreement import FORMATS, Agreement
from nets import image, randomized, traced
from qcompress.artifacts import AnyGrid, ThresholdGrid
from qcompress.compressed import CompressedModel
from qcompress.data import Dataset
from qcompress.errors import SourceError
from qcompress.plan import Plan
from qcompress.posthoc.biases import in_steps
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.offsets import snap_offsets
from qcompress_exporters import onnx_file, parity, validate
from qcompress_exporters.lower import serialize
from qcompress_exporters.onnx_file import build
from qcompress_exporters.sessions import run, session


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (parity, onnx_file, agreement):
        monkeypatch.setattr(module, "trace", small_models.trace_once)


class Moves(nn.Module):
    """Codes that are pooled, padded, reshaped and taken twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 1, bias=False)
        self.left, self.right = nn.Linear(36, 5), nn.Linear(36, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.first(x).relu(), 2)
        x = nn.functional.pad(self.third(self.second(x)).relu(), (0, -1, 0, -1)).flatten(1)
        return self.left(x) + self.right(x)


def thresholds(grid: AnyGrid, seed: int) -> ThresholdGrid:
    """Uneven thresholds over the range of a grid, one twice, levels as far apart as its own."""
    bits = min(grid.bits, 4)
    ends = grid.dequantize(np.array([0, grid.levels], np.uint8))
    found = np.sort(np.random.default_rng(seed).uniform(*ends, (1 << bits) - 1)).astype(np.float32)
    found[1] = found[0]
    return ThresholdGrid(site=grid.site, thresholds=found, scale=np.asarray(grid.scale), bits=bits)


def with_thresholds(model: CompressedModel, *, same: bool = False) -> CompressedModel:
    """The model, each activation of at most 4 bits on thresholds instead of an even grid."""
    grids = {
        site: thresholds(grid, 0 if same else index) if grid.bits <= 4 else grid
        for index, (site, grid) in enumerate(model.activations.items())
    }
    return in_steps(dataclasses.replace(model, activations=grids))


def compressed(placement: str = "deploy", activation_bits: int = 4) -> CompressedModel:
    x = image(16, shape=(3, 6, 6))
    plan = Plan.from_flags(bits=4, scheme="uniform", activation_bits=activation_bits)
    data = Dataset(inputs={"x": x}, name="c.npz")
    program = traced(randomized(Moves()), x=x[:2])
    return compress_program(program, plan, calibration=data, effort="fast", placement=placement)


@pytest.mark.parametrize("activation_bits", [2, 4])
def test_codes_are_moved_as_codes(activation_bits):
    found = Agreement(with_thresholds(compressed(activation_bits=activation_bits)), {"x": image(24, 1, (3, 6, 6))})
    assert [text for form in FORMATS for text in found.failures(form)] == []
    assert sum(isinstance(g, ThresholdGrid) for g in found.small.activations.values()) >= 3
    model = found.model("qdq")
    (pool,) = (n for n in model.graph.node if n.op_type == "MaxPool")
    assert pool.input[0].startswith("q")
    assert {r.compute for name, r in found.layers().items() if name in ("left.weight", "right.weight")} == {"int8"}
