"""The samples that train run, and reach what they say."""

import re
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.slow
def test_range_regularized_training(tmp_path):
    plain, ranged = ran("range_regularized_training", tmp_path).splitlines()[1:]
    assert float(ranged.split()[1]) < 0.9 * float(plain.split()[1])
