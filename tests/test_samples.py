"""The samples that train run, and reach what they say."""

import os
import re
import shutil
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
def test_digits_finetune(digits, tmp_path):
    shutil.copytree(digits, tmp_path, dirs_exist_ok=True)
    commands = tmp_path / "bin"
    commands.mkdir()
    run = "from qcompress_cli.main import main; main()"
    for name, code in {"python": "", "qcompress": f' -c "{run}"'}.items():
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{code} "$@"\n')
        (commands / name).chmod(0o755)
    path = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(part for part in sys.path if part),
    }
    command = ["bash", str(SAMPLES / "digits_finetune" / "run.sh"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **path})
    assert done.returncode == 0, done.stderr
    found = re.search(
        r"^top1 ([\d.]+) % with the weights of epoch \d as stored, ([\d.]+) % in float", done.stdout, re.M
    )
    assert found is not None
    assert float(found[1]) >= float(found[2]) - 1.5
    assert (tmp_path / "digits.onnx").stat().st_size < 50_000


@pytest.mark.slow
def test_range_regularized_training(tmp_path):
    plain, ranged = ran("range_regularized_training", tmp_path).splitlines()[1:]
    assert float(ranged.split()[1]) < 0.9 * float(plain.split()[1])
