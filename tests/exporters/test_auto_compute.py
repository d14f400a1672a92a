"""Measuring which layers are worth computing in int8."""

import numpy as np
import pytest
from torch import nn

from qcompress.data.dataset import as_dataset
from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress_program, resolved_plan
from qcompress.posthoc.settings import PosthocSettings
from qcompress_exporters import auto_compute, build
from qcompress_exporters.auto_compute import ALL, BUT_DEPTHWISE, NONE, choose, pick
from qcompress_exporters.onnx_format.targets import PORTABLE
from qcompress_exporters.parity.profile import layer_costs
from tests.helpers.nets import randomized, traced


def net() -> nn.Module:
    depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    return randomized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), depthwise, head)).eval()


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((20, 3, 12, 12)).astype(np.float32)


def test_it_picks_what_it_measured_as_fastest(x: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_compute, "_SECONDS", 0.2)
    program = traced(net(), input=x)
    resolved = resolved_plan(program, Plan.from_flags(bits=8, activation_bits=8))
    found = choose(program, resolved, PosthocSettings(effort="fast"), as_dataset({"input": x}), PORTABLE)
    layers = {c.name: c.weights for c in found.candidates}
    assert layers[ALL] == ("0.weight", "2.0.weight", "2.2.weight", "3.2.weight")
    assert layers[NONE] == ()
    assert layers[BUT_DEPTHWISE] == ("0.weight", "2.2.weight", "3.2.weight")
    assert all(c.speed > 0 for c in found.candidates)
    assert found.picked == pick({c.name: c.speed for c in found.candidates}, found.spread)
    assert {*found.float_layers} == {*layers[ALL]} - {*layers[found.picked]}
    settled = found.settle(resolved)
    assert {t.name for t in settled.compressed if t.activation_bits is None} == {*found.float_layers}
    assert resolved_plan(program, settled.as_plan()).digest == settled.digest  # a saved plan says the same


@pytest.mark.parametrize("activation_bits", [8, None])
def test_every_layer_has_a_cost(x: np.ndarray, activation_bits: int | None) -> None:
    program = traced(net(), input=x)
    plan = Plan.from_flags(bits=8, activation_bits=activation_bits)
    small = compress_program(program, plan, PosthocSettings(effort="fast"), calibration=as_dataset({"input": x}))
    costs = layer_costs(build(small).data, {"input": x[:1]}, list(small.artifacts), rounds=3)
    assert list(costs) == ["0.weight", "2.0.weight", "2.2.weight", "3.2.weight"]
    assert all(cost > 0 for cost in costs.values())
