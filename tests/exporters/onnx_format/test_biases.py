"""Biases at whole steps: made by the export, finer for few bits, and not changed when they are made again."""

import dataclasses

import numpy as np
import pytest
import torch

from qcompress.artifacts import IntegerWeight, PalettizedWeight
from qcompress.compressed.model import CompressedModel
from qcompress.finetune import prepare
from qcompress.plan.plan import Plan
from qcompress_exporters import build
from qcompress_exporters.onnx_format.int8.stepped_biases import stepped


def trained(bits):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    with torch.no_grad():
        net[0].bias.mul_(1e-3)
    plan = Plan.from_flags(bits=bits, activation_bits=2)
    return net, prepare(net, plan, example_inputs=(torch.randn(32, 64),))


@pytest.mark.parametrize(("bits", "finer"), [(2, 32), (3, 16), (4, 8), (5, 1)])
def test_few_bits_get_finer_steps_for_their_biases(bits, finer):
    """With steps of s_x * s_w, 2-bit weights behind 2-bit activations lost biases, and ResNet-20 0.9 points."""
    net, tuned = trained(bits)
    small = tuned.finalize()
    wanted, bias = net[0].weight.detach().numpy(), net[0].bias.detach().numpy()
    assert isinstance(small.artifacts["0.weight"], IntegerWeight)
    assert np.array_equal(small.artifacts["0.weight"].dequantize(), wanted)
    assert np.array_equal(small.artifacts["0.bias"].dequantize(), bias)
    written = stepped(small)
    stored = written.artifacts["0.weight"]
    assert isinstance(stored, IntegerWeight if finer == 1 else PalettizedWeight)
    assert np.array_equal(stored.dequantize(), wanted)
    codes, scale, _ = stored.integers()
    learned = tuned.quantizers()["0.weight"].scale.value().detach().numpy()
    assert np.array_equal(scale * np.float32(finer), learned)
    assert np.abs(codes).max() <= 64
    off = written.artifacts["0.bias"].dequantize() - bias
    grid = next(iter(small.activations.values()))
    assert (np.abs(off) <= 0.501 * grid.scale * scale).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_a_folder_of_an_older_version_keeps_its_bytes(bits, tmp_path):
    """Folders of formats up to 4 hold biases at whole steps and palettes in place of even grids."""
    small = trained(bits)[1].finalize()
    stepped(small).save(tmp_path / "old")
    old = CompressedModel.load(tmp_path / "old")
    again = stepped(old)
    for name, artifact in old.artifacts.items():
        assert np.array_equal(again.artifacts[name].dequantize(), artifact.dequantize())
        assert type(again.artifacts[name]) is type(artifact)
    assert build(small).data == build(old).data


def test_a_model_without_activation_grids_is_left_as_it_is():
    small = trained(2)[1].finalize()
    plain = dataclasses.replace(small, activations={}, compute="float")
    assert stepped(plain) is plain
