"""Functions of single values between integer layers are computed on codes."""

import numpy as np
import pytest
import torch
from torch import nn

from qcompress.data.dataset import as_dataset
from qcompress.graph.marks import mark
from qcompress.graph.sites import activation_sites
from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.settings import PosthocSettings
from qcompress_exporters import build
from qcompress_exporters.parity.sessions import optimized_ops, run, session
from tests.helpers.nets import randomized, traced


class Steps(nn.Module):
    """A HardSwish in steps, as older code has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * nn.functional.relu6(x + 3) * 0.5


class Shifted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -2.0 * x + -0.5


FUNCTIONS = {
    "silu": (nn.SiLU(), {"QLinearSigmoid": 2, "QLinearMul": 2}),
    "silu in place": (nn.SiLU(inplace=True), {"QLinearSigmoid": 2, "QLinearMul": 2}),
    "sigmoid": (nn.Sigmoid(), {"QLinearSigmoid": 2}),
    "hardswish": (nn.Hardswish(), {"QLinearAdd": 2, "QLinearMul": 2}),
    "hardsigmoid": (nn.Hardsigmoid(), {"QLinearAdd": 2}),
    "steps": (Steps(), {"QLinearAdd": 2, "QLinearMul": 4}),
    "shifted": (Shifted(), {"QLinearAdd": 2, "QLinearMul": 2}),
    "mish": (nn.Mish(), {"Gather": 2}),
    "leaky relu": (nn.LeakyReLU(0.2), {"QLinearLeakyRelu": 2}),
}


def net(function: nn.Module) -> nn.Module:
    return randomized(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), function, nn.Conv2d(8, 8, 3, padding=1), function, nn.Conv2d(8, 4, 3)
        )
    ).eval()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_they_run_on_codes(name: str) -> None:
    function, wanted = FUNCTIONS[name]
    x = np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32)
    program = traced(net(function), input=x)
    plan = Plan.from_flags(bits=8, activation_bits=8)
    data = as_dataset({"input": x})
    small = compress_program(program, plan, PosthocSettings(effort="fast", reduce_range=True), calibration=data)
    built = build(small)
    ops = optimized_ops(built.data)
    assert {op: ops[op] for op in wanted} == wanted
    floats = {"Sigmoid", "HardSigmoid", "Add", "Mul", "LeakyRelu", "Mish"}
    assert not floats & {op for op, count in ops.items() if count}
    got, floats = run(session(built.data, "deployed"), {"input": x})["output"], program.run({"input": x})["output"]
    assert np.square(got - floats).sum() < 1e-2 * np.square(floats).sum()


def test_a_silu_has_the_name_of_its_site_and_the_values_of_torch() -> None:
    x = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    module = net(nn.SiLU())
    program = traced(module, input=x)
    wanted = module(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(program.run({"input": x})["output"], wanted, rtol=1e-5, atol=1e-5)
    sites = activation_sites(program, {"2.weight": 4, "4.weight": 8, "0.weight": 8})
    assert [(s.name, s.bits) for s in sites] == [
        ("input", 8), ("conv2d", 8), ("sigmoid", 8), ("silu", 4), ("conv2d_1", 8), ("sigmoid_1", 8), ("silu_1", 8),
        ("conv2d_2", 8),
    ]  # fmt: skip
    assert mark(program, [site.key for site in sites]) is not program
