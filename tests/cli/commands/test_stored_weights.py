"""Weights that a file stores in another form than the module does: validate compares them all the same."""

import numpy as np
import pytest

NETS = """
import torch
from torch import nn


def normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 24)), nn.ReLU(), nn.Linear(24, 4))


def grouped():
    return nn.Sequential(nn.ConvTranspose2d(8, 8, 3, groups=4), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4))
"""


@pytest.fixture
def run(qcompress, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    random = np.random.default_rng(0)
    np.savez("rows.npz", x=random.standard_normal((64, 16)).astype(np.float32))
    np.savez("images.npz", x=random.standard_normal((64, 8, 4, 4)).astype(np.float32))

    def checked(*arguments):
        result = qcompress(*arguments, "--quiet")
        assert result.exit_code == 0, result.output

    return checked


def weights_of(factory, name="m.pt"):
    import sys

    import torch

    sys.path.insert(0, ".")
    try:
        import nets
    finally:
        sys.path.pop(0)
        sys.modules.pop("nets", None)
    torch.manual_seed(0)
    torch.save(getattr(nets, factory)().state_dict(), name)


@pytest.mark.parametrize(("factory", "data"), [("normed", "rows.npz"), ("grouped", "images.npz")])
def test_exported_and_validated(run, factory, data):
    weights_of(factory)
    arch = ("m.pt", "--arch", f"nets.py:{factory}")
    run("export", *arch, "--bits", "4", "--rows-per-lut", "1", "--calibration", data, "-o", "m.onnx")
    run("validate", arch[0], "m.onnx", *arch[1:], "--data", data, "--no-timing")


def test_trained_from_the_module_and_validated(run):
    weights_of("normed")
    arch = ("m.pt", "--arch", "nets.py:normed")
    run("finetune", *arch, "--data", "rows.npz", "--bits", "4", "--epochs", "1", "--batch-size", "16", "-o", "ckpt")
    run("export", "ckpt", "-o", "m.onnx")
    run("validate", arch[0], "m.onnx", *arch[1:], "--data", "rows.npz", "--no-timing")
    run("validate", "ckpt", "m.onnx", "--data", "rows.npz", "--no-timing")
