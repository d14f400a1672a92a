"""Grouped transposed convolutions are stored with their output channels first, and compute what they did."""

import numpy as np
import pytest
import torch
from torch import nn

from qcompress.compressed.model import CompressedModel
from qcompress.graph.channels_first import channels_first
from qcompress.graph.options import ProgramOptions
from qcompress.graph.tracing import from_module
from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress
from qcompress_exporters import export, validate

LAYERS = {
    "grouped": (lambda: nn.ConvTranspose2d(8, 12, (3, 2), stride=2, groups=4), (2, 8, 5, 5)),
    "depthwise": (lambda: nn.ConvTranspose1d(6, 6, 4, groups=6, bias=False), (2, 6, 7)),
    "before a norm": (lambda: nn.Sequential(nn.ConvTranspose2d(8, 8, 3, groups=2), nn.BatchNorm2d(8)), (2, 8, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_program_computes_what_it_did(name: str) -> None:
    make, shape = LAYERS[name]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    program = from_module(make().eval(), ProgramOptions(inputs={"x": x}))
    (weight,) = (n for n, t in program.state().items() if t.ndim > 2)
    moved = channels_first(program, [weight])
    np.testing.assert_array_equal(moved.run({"x": x})["output"], program.run({"x": x})["output"])
    groups = {"grouped": 4, "depthwise": 6, "before a norm": 2}[name]
    inputs, outputs, *kernel = program.state()[weight].shape
    assert moved.state()[weight].shape == (groups * outputs, inputs // groups, *kernel)
    g, o = groups - 1, outputs - 1  # the last channel's weights, one by one
    for i in range(inputs // groups):
        old = program.state()[weight][g * (inputs // groups) + i, o]
        assert torch.equal(moved.state()[weight][g * outputs + o, i], old)
    assert channels_first(program, []) is program


@pytest.mark.parametrize("flags", [{"bits": 8, "scheme": "uniform"}, {"bits": 4, "rows_per_lut": 1}])
def test_channels_of_different_size_are_all_near(flags: dict[str, object], tmp_path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose2d(8, 8, 3, groups=4), nn.BatchNorm2d(8)).eval()
    size = 10.0 ** -torch.arange(8) / 2
    with torch.no_grad():
        net[0].weight.mul_(size.reshape(4, 1, 2, 1, 1).expand(4, 2, 2, 3, 3).reshape(8, 2, 3, 3))
        net[0].bias.zero_()
    x = torch.randn(4, 8, 6, 6)
    small = compress(net, Plan.from_flags(**flags), example_inputs=(x,), effort="fast")
    small.save(tmp_path / "folder")
    again = CompressedModel.load(tmp_path / "folder")
    export(again, tmp_path / "m.onnx")
    assert validate(again, tmp_path / "m.onnx", [x]).ok
    wanted, got = net(x).detach(), again.to_module()(x).detach()
    worst = ((got - wanted).square().sum((0, 2, 3)) / wanted.square().sum((0, 2, 3))).sqrt().max()
    assert float(worst) < 0.2
    export(small, tmp_path / "n.onnx")
    assert (tmp_path / "n.onnx").read_bytes() == (tmp_path / "m.onnx").read_bytes()
