"""Inputs synthesised from BatchNorm statistics: what they match, when there are none, and what they buy."""

import numpy as np
import pytest
import torch
from torch import nn

from qcompress.data.dataset import Dataset
from qcompress.errors import ConfigError
from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress, compress_program
from qcompress.posthoc.settings import PosthocSettings
from qcompress.posthoc.synthesis import synthesize
from qcompress_exporters import build
from tests.helpers.nets import image, randomized, residual, traced


class Small(nn.Module):
    """Two convolutions with BatchNorm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.body, self.body_bn = nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem_bn(self.stem(x)).relu()
        x = self.body_bn(self.body(x)).relu()
        return self.head(x.mean((2, 3)))


def smooth_images(samples: int, seed: int) -> torch.Tensor:
    """Something that is not white noise: each channel a wave of its own, brighter than it is dark."""
    random = torch.Generator().manual_seed(seed)
    phase = torch.rand(samples, 3, 1, 1, generator=random) * 6
    along = torch.linspace(0, 6, 12)
    return (along[:, None] * torch.rand(samples, 3, 1, 1, generator=random) + along + phase).sin() + 0.5


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """Weights at random, statistics those of the images."""
    torch.manual_seed(0)
    net = Small().train()
    for layer in (net.stem_bn, net.body_bn):
        layer.momentum = 1.0
    net(smooth_images(256, seed=1))
    return net.eval()


def mismatch(net: nn.Module, x: torch.Tensor) -> float:
    """Mean over BatchNorms of the divergence between the statistics of what they take and what they stored."""
    total = []

    def look(layer: nn.BatchNorm2d, taken: tuple[torch.Tensor]) -> None:
        over = [axis for axis in range(taken[0].ndim) if axis != 1]
        m, v = taken[0].double().mean(over), taken[0].double().var(over, unbiased=False)
        mean, var = layer.running_mean.double(), layer.running_var.double()
        total.append(float((((m - mean) ** 2 + v) / var - 1 - (v / var).log()).mean() / 2))

    hooks = [m.register_forward_pre_hook(look) for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return float(np.mean(total))


def test_statistics_are_those_of_the_batchnorms(small):
    program = traced(small, x=smooth_images(2, seed=0).numpy())
    made = synthesize(program)
    x = torch.tensor(made.inputs["x"])
    assert x.shape == (128, 3, 12, 12)
    assert made.labels is None
    assert mismatch(small, x) < 0.05 < 0.2 < mismatch(small, torch.randn(x.shape))


@pytest.mark.usefixtures("all_cores")
def test_they_are_the_same_each_time(small, monkeypatch):
    monkeypatch.setattr("qcompress.posthoc.synthesis._STEPS", 3)
    program = traced(small, x=smooth_images(2, seed=0).numpy())
    assert synthesize(program).digest == synthesize(program).digest == synthesize(program, seed=0).digest
    assert synthesize(program, seed=1).digest == synthesize(program, seed=1).digest != synthesize(program).digest


@pytest.mark.parametrize(
    ("module", "example"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.zeros(2, 4)),
        (nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)), torch.zeros(2, 2, 9)),
        (nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4)), torch.zeros(2, 2, 5, 5, 5)),
    ],
)
def test_inputs_of_any_rank(module, example):
    made = synthesize(traced(randomized(module), x=example.numpy()))
    assert next(iter(made.inputs.values())).shape == (128, *example.shape[1:])
    assert all(np.isfinite(x).all() for x in made.inputs.values())


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
def test_another_seed_makes_another_file(small, monkeypatch):
    """`export --seed` changed nothing."""
    monkeypatch.setattr("qcompress.posthoc.synthesis._STEPS", 3)
    example = (smooth_images(2, seed=0),)

    def data(**seed: int) -> bytes:
        return build(compress(small, Plan.from_flags(bits=2), example_inputs=example, **seed)).data

    zero, one = data(), data(seed=1)
    assert data(seed=0) == zero
    assert data(seed=1) == one != zero


def test_large_inputs_are_fewer():
    net = nn.Sequential(nn.Conv2d(3, 2, 8, stride=8), nn.BatchNorm2d(2)).eval()
    assert synthesize(traced(net, x=np.zeros((2, 3, 80, 80), np.float32))).samples == 32


@pytest.mark.parametrize(
    ("module", "example"),
    [
        (nn.Linear(4, 4), torch.zeros(2, 4)),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)), torch.zeros(2, 4)),
        (nn.Sequential(nn.Embedding(9, 4), nn.BatchNorm1d(3)), torch.zeros(2, 3, dtype=torch.int64)),
    ],
)
def test_nothing_where_nothing_is_stored_of_float_inputs(module, example):
    assert synthesize(traced(module.eval(), x=example.numpy())) is None


def test_weights_are_solved_on_them(small):
    example, test = (smooth_images(2, seed=0),), smooth_images(64, seed=2)
    with torch.no_grad():
        wanted = small(test)

    def error(**how: object) -> float:
        model = compress(small, Plan.from_flags(bits=2), example_inputs=example, **how)
        with torch.no_grad():
            return float((model.to_module()(test) - wanted).square().mean())

    nearest, solved = error(synthetic=False), error()
    assert solved < 0.3 * nearest
    assert error(effort="fast") == nearest


def test_the_source_is_named():
    program = residual()
    plan = Plan.from_flags(bits=4)
    found = compress_program(program, plan)
    assert found.solved_on == "128 inputs synthesised from BatchNorm statistics"
    assert found.gains
    given = compress_program(program, plan, calibration=Dataset(inputs={"x": image(4)}, name="c.npz"))
    assert given.solved_on == "4 samples of c.npz"


def test_without_batchnorm_a_note_says_what_is_left():
    linear = traced(nn.Linear(64, 32).eval(), x=np.zeros((2, 64), np.float32))
    found = compress_program(linear, Plan.from_flags(bits=4))
    assert not found.solved_on
    assert any("no BatchNorm" in note and "--calibration" in note for note in found.notes)
    with pytest.raises(
        ConfigError,
        match=r"^effort \"balanced\" needs inputs .* no BatchNorm to synthesise inputs from; pass --calibration\.$",
    ):
        compress_program(linear, Plan.from_flags(bits=4), PosthocSettings(effort="balanced"))
    with pytest.raises(ConfigError, match=r"but synthesising inputs is switched off; pass --calibration\.$"):
        compress_program(linear, Plan.from_flags(bits=4), PosthocSettings(effort="balanced", synthetic=False))
