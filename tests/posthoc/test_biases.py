"""Scales that are large enough for a bias in 32 bits, whatever their sign."""

import numpy as np
import pytest
import torch

from qcompress.artifacts import IntegerWeight, PalettizedWeight
from qcompress.finetune import prepare
from qcompress.plan.plan import Plan

LEAST_O = np.array([2.0, 0.5], np.float32)


def test_a_negative_scale_stays_negative():
    """Training makes such: a BatchNorm's negative γ, folded. They were taken for small ones, and all codes lost."""
    weight = IntegerWeight(
        codes=np.array([[4, -2], [7, 1]], np.int8), scale=np.array([-1, -1], np.float32), bits=4, axis=0
    )
    found = weight.raised(LEAST_O)
    assert found.scale.tolist() == [-2, -1]
    assert found.codes.tolist() == [[2, -1], [7, 1]]
    assert np.array_equal(found.dequantize(), weight.dequantize())


@pytest.mark.parametrize("sign", [1, -1])
def test_a_palette_takes_the_nearest_entries(sign):
    lut = np.array([[-8, -4, -1, 2]], np.int8)
    codes = np.array([[0, 1, 3], [0, 1, 3]], np.uint8)
    weight = PalettizedWeight(codes=codes, lut=lut, bits=2, scale=np.array([sign, sign], np.float32))
    found = weight.raised(LEAST_O)
    assert found.scale.tolist() == [2 * sign, sign]
    assert found.codes.tolist() == [[1, 2, 3], [0, 1, 3]]  # of -4, -2 and 1 steps


@pytest.mark.parametrize(("bits", "finer"), [(2, 32), (3, 16), (4, 1)])
def test_few_bits_get_finer_steps_for_their_biases(bits, finer):
    """With steps of s_x * s_w, 2-bit weights behind 2-bit activations lost biases, and ResNet-20 0.9 points."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    with torch.no_grad():
        net[0].bias.mul_(1e-3)
    plan = Plan.from_flags(bits=bits, activation_bits=2)
    tuned = prepare(net, plan, example_inputs=(torch.randn(32, 64),))
    small = tuned.finalize()
    stored, wanted = small.artifacts["0.weight"], net[0].weight.detach().numpy()
    assert isinstance(stored, IntegerWeight if finer == 1 else PalettizedWeight)
    assert np.array_equal(stored.dequantize(), wanted)
    codes, scale, _ = stored.integers()
    learned = tuned.quantizers()["0.weight"].scale.value().detach().numpy()
    assert np.array_equal(scale * np.float32(finer), learned)
    assert np.abs(codes).max() <= 64
    off = small.artifacts["0.bias"].dequantize() - net[0].bias.detach().numpy()
    grid = next(iter(small.activations.values()))
    assert (np.abs(off) <= 0.501 * grid.scale * scale).all()
