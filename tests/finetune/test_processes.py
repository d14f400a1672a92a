"""Training in several processes computes what one process computes with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qcompress.errors import ConfigError
from qcompress.finetune.processes import Processes

SCRIPT = Path(__file__).parents[1] / "helpers" / "shared_steps.py"


def trained(method, file, count):
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={count}", "--master_port=0", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, *(launcher if count > 1 else []), str(SCRIPT), method, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(file)


def apart(some, others):
    """Returns the largest relative distance of two tensors of the same name."""
    assert some.keys() == others.keys()
    floats = [(some[name].double(), others[name].double()) for name in some if some[name].is_floating_point()]
    return max(float((a - b).norm() / a.norm().clamp_min(1e-30)) for a, b in floats)


@pytest.mark.parametrize(
    "method", [pytest.param("float", marks=pytest.mark.slow), "lsq", pytest.param("dkm", marks=pytest.mark.slow)]
)
def test_two_processes_with_half_the_batch_each_are_one_process(tmp_path, method):
    (alone, first), (shared, shared_first) = (trained(method, tmp_path / f"{n}.pt", n) for n in (1, 2))
    assert apart(first, shared_first) < (1e-5 if method == "dkm" else 1e-12)
    if method != "dkm":  # float64
        assert apart(alone, shared) < 1e-9


def test_one_process_needs_no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Processes.launched("cpu")
    assert (alone.rank, alone.size, alone.is_first) == (0, 1, True)
    values = [torch.ones(2)]
    alone.average(values)
    assert values[0].tolist() == [1, 1]
    assert alone.any(True) and not alone.any(False) and alone.first_of(7) == 7  # noqa: PT018
    alone.close()


def test_sharded_models_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"^finetune does not shard models \(FSDP\): .*; launch it with DDP\.$"):
        Processes.launched("cpu")
