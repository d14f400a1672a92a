"""The samples that train run, and reach what they say."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

SAMPLES = Path(__file__).parents[1] / "samples"


def ran(sample: str, folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(SAMPLES / sample / "train.py"), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_own_training_loop(digits, tmp_path):
    text = ran("own_training_loop", tmp_path, "--digits", str(digits))
    found = re.search(r"parity ok; top-1 ([\d.]+)%, float ([\d.]+)%", text)
    assert found is not None
    assert float(found[1]) >= float(found[2]) - 1.5
    assert (tmp_path / "digits.w2a4.onnx").stat().st_size < 50_000


def commands_ran(sample: str, folder: Path) -> str:
    """Run the sample's run.sh with this Python and this checkout; return what it said."""
    commands = folder / "bin"
    commands.mkdir()
    run = "from qcompress_cli.main import main; main()"
    for name, code in {"python": "", "qcompress": f' -c "{run}"'}.items():
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{code} "$@"\n')
        (commands / name).chmod(0o755)
    path = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(part for part in sys.path if part),
    }
    command = ["bash", str(SAMPLES / sample / "run.sh"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **path})
    assert done.returncode == 0, done.stderr
    return done.stdout


def top1_of(text: str) -> tuple[float, float]:
    """Return what a run of `finetune` said of its model as stored, and of the float model, in percent."""
    found = re.search(r"^top1 ([\d.]+) % with the weights of epoch \d as stored, ([\d.]+) % in float", text, re.M)
    assert found is not None
    return float(found[1]), float(found[2])


@pytest.mark.slow
def test_digits_finetune(digits, tmp_path):
    shutil.copytree(digits, tmp_path, dirs_exist_ok=True)
    stored, in_float = top1_of(commands_ran("digits_finetune", tmp_path))
    assert stored >= in_float - 1.5
    assert (tmp_path / "digits.onnx").stat().st_size < 50_000


@pytest.mark.slow
def test_hf_encoder(tmp_path):
    """Embeddings have 2 bits too, and the file takes sentences of any length."""
    text = commands_ran("hf_encoder", tmp_path)
    stored, in_float = top1_of(text)
    assert stored >= in_float - 1.5
    assert "17 weights compressed (17 at 2 bits)" in text
    path = tmp_path / "encoder.onnx"
    assert path.stat().st_size < (tmp_path / "model" / "model.safetensors").stat().st_size / 7
    deployed = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with np.load(tmp_path / "test.npz") as test:
        inputs = {name: test[name][:64] for name in ("input_ids", "attention_mask")}
    longer = {name: np.pad(values, ((0, 0), (0, 8))) for name, values in inputs.items()}
    for logits, with_padding in zip(deployed.run(None, inputs), deployed.run(None, longer), strict=True):
        np.testing.assert_allclose(with_padding, logits, atol=1e-4)


@pytest.mark.slow
def test_range_regularized_training(tmp_path):
    plain, ranged = ran("range_regularized_training", tmp_path).splitlines()[1:]
    assert float(ranged.split()[1]) < 0.9 * float(plain.split()[1])
