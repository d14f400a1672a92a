"""Weights that a file stores in another form than the module does: validate compares them all the same."""

import numpy as np
import onnx
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


def metadata_of(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


@pytest.mark.parametrize(("factory", "data"), [("normed", "rows.npz"), ("grouped", "images.npz")])
def test_exported_and_validated(run, factory, data):
    weights_of(factory)
    arch = ("m.pt", "--arch", f"nets.py:{factory}")
    run("export", *arch, "--bits", "4", "--rows-per-lut", "1", "--calibration", data, "-o", "m.onnx")
    run("validate", arch[0], "m.onnx", *arch[1:], "--data", data, "--no-timing")
    stored = {"normed": None, "grouped": '["0.weight"]'}
    assert metadata_of("m.onnx").get("qcompress.channels_first") == stored[factory]
    assert "qcompress.uncomputed" not in metadata_of("m.onnx")


def test_damaged_metadata(run, qcompress):
    weights_of("grouped")
    arch = ("--arch", "nets.py:grouped")
    run("export", "m.pt", *arch, "--bits", "4", "--rows-per-lut", "1", "--input-shape", "2,8,4,4", "-o", "m.onnx")
    model = onnx.load("m.onnx")
    for text in ("[1", "[1]", "9" * 5000, "{}"):
        next(e for e in model.metadata_props if e.key == "qcompress.channels_first").value = text
        onnx.save(model, "bad.onnx")
        result = qcompress("validate", "m.pt", "bad.onnx", *arch, "--data", "images.npz", "--no-timing")
        assert result.exit_code == 2
        assert "metadata qcompress.channels_first is damaged: export it again." in result.stderr


def test_trained_from_the_module_and_validated(run):
    weights_of("normed")
    arch = ("m.pt", "--arch", "nets.py:normed")
    run("finetune", *arch, "--data", "rows.npz", "--bits", "4", "--epochs", "1", "--batch-size", "16", "-o", "ckpt")
    run("export", "ckpt", "-o", "m.onnx")
    assert metadata_of("m.onnx")["qcompress.uncomputed"] == "1"
    run("validate", arch[0], "m.onnx", *arch[1:], "--data", "rows.npz", "--no-timing")
    run("validate", "ckpt", "m.onnx", "--data", "rows.npz", "--no-timing")
