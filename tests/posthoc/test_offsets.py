"""Offsets moved onto their grids: what the layers behind them are off by, and what their biases make good."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from qcompress.artifacts import ActivationGrid, FloatWeight
from qcompress.compressed.model import CompressedModel
from qcompress.data.dataset import Dataset
from qcompress.graph.program import FloatProgram
from qcompress.plan.plan import Plan
from qcompress.posthoc.offsets import snap_offsets
from tests.helpers.nets import traced


class Padded(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=bias)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.nn.functional.silu(self.conv(x)).mean((2, 3)))


def images(samples: int = 40) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((samples, 4, 8, 8)).astype(np.float32)


def model_of(program: FloatProgram, grids: list[ActivationGrid]) -> CompressedModel:
    artifacts = {n: FloatWeight(values=v.detach().numpy(), reason="test") for n, v in program.state().items()}
    return CompressedModel(
        program=program, artifacts=artifacts, plan=Plan(), source_digest="", plan_digest="", compute="int8",
        activations={grid.site: grid for grid in grids},
    )  # fmt: skip


def free(site: tuple[str, int], scale: float = 0.5, offset: float = -1.3) -> ActivationGrid:
    return ActivationGrid(
        site=site, scale=np.asarray(np.float32(scale)), offset=np.asarray(np.float32(offset)), bits=4, signed=False
    )


@pytest.fixture(scope="module")
def program() -> FloatProgram:
    return traced(Padded().eval(), x=images(2))


def test_the_bias_makes_good_what_the_output_changes_by_on_average(program):
    model, x = model_of(program, [free(("x", -1))]), images()
    snapped = snap_offsets(model, Dataset(inputs={"x": x}))
    old, new = model.activations["x", -1], snapped.activations["x", -1]
    assert old.zero_point is None
    assert new.zero_point == 3

    def convolved(grid: ActivationGrid, bias: np.ndarray) -> np.ndarray:
        weight = torch.from_numpy(model.artifacts["conv.weight"].dequantize())
        seen = torch.from_numpy(grid.dequantize(grid.quantize(x)))
        return nn.functional.conv2d(seen, weight, torch.from_numpy(bias), padding=1, groups=2).double().numpy()

    before = convolved(old, model.artifacts["conv.bias"].dequantize())
    after = convolved(new, snapped.artifacts["conv.bias"].dequantize())
    uncorrected = convolved(new, model.artifacts["conv.bias"].dequantize())
    means = np.abs((after - before).mean((0, 2, 3))), np.abs((uncorrected - before).mean((0, 2, 3)))
    assert means[0].max() < 1e-6
    assert means[1].max() > 1e-3
    error = np.sqrt(np.square(after - before).mean()) / before.std()
    assert snapped.snapped == {"conv.weight": pytest.approx(error, rel=1e-4)}


def test_grids_with_zero_points_and_other_layers_stay(program):
    on_grid = ActivationGrid.from_zero_point(("x", -1), 0.25, 8, 4)
    model = model_of(program, [on_grid])
    assert snap_offsets(model, Dataset(inputs={"x": images(4)})) is model

    model = model_of(program, [on_grid, free(("silu", -1), 0.1, -0.33)])
    snapped = snap_offsets(model, Dataset(inputs={"x": images(4)}))
    assert snapped.activations["x", -1] == on_grid
    assert snapped.activations["silu", -1].zero_point == 3
    assert snapped.artifacts["conv.bias"] is model.artifacts["conv.bias"]


def test_only_the_named_sites_move(program):
    model = model_of(program, [free(("x", -1)), free(("silu", -1), 0.1, -0.33)])
    snapped = snap_offsets(model, Dataset(inputs={"x": images(4)}), [("x", -1)])
    assert snapped.activations["silu", -1] == model.activations["silu", -1]
    assert list(snapped.snapped) == ["conv.weight"]


def test_without_a_bias_the_whole_change_is_left(program):
    bare = traced(Padded(bias=False).eval(), x=images(2))
    with_bias = snap_offsets(model_of(program, [free(("x", -1))]), Dataset(inputs={"x": images()}))
    without = snap_offsets(model_of(bare, [free(("x", -1))]), Dataset(inputs={"x": images()}))
    assert without.snapped["conv.weight"] > with_bias.snapped["conv.weight"]


def test_it_is_saved(program, tmp_path):
    model = replace(model_of(program, [free(("x", -1))]), snapped={"conv.weight": 0.25})
    model.save(tmp_path / "small")
    loaded = CompressedModel.load(tmp_path / "small")
    assert loaded.snapped == {"conv.weight": 0.25}
    assert loaded.activations == model.activations
