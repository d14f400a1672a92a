"""Fixtures and settings for all tests: a deterministic hypothesis profile, and the digits sample, trained once."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.helpers.examples import THOROUGH

ROOT = Path(__file__).parents[1]

# Set before torch is imported. On nets this small, several threads are slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Use the same examples on every run and machine, and no time limits, because the machine may be busy.
for profile, count in {"thorough": THOROUGH, "quick": THOROUGH // 3}.items():
    hypothesis.settings.register_profile(profile, deadline=None, derandomize=True, max_examples=count)


def pytest_configure(config: pytest.Config) -> None:
    """Try all examples where slow tests run, too, and a third of them elsewhere."""
    hypothesis.settings.load_profile("quick" if config.option.markexpr == "not slow" else "thorough")


@pytest.fixture
def all_cores() -> Iterator[None]:
    """Run a test with all cores, to check that results do not depend on the order in which threads end."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits(request: pytest.FixtureRequest) -> Path:
    """Return a read-only folder with the output of `samples/digits/train.py`, kept until the sample changes."""
    sample = ROOT / "samples" / "digits"
    key = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(sample.glob("*.py")))).hexdigest()[:12]
    cache = request.config.cache
    assert cache is not None
    folder = Path(cache.mkdir("digits")) / key
    if not folder.is_dir():
        training = folder.with_name(f"{key}.{os.getpid()}")
        training.mkdir()
        subprocess.run([sys.executable, str(sample / "train.py"), "--out", str(training)], check=True)
        shutil.rmtree(folder, ignore_errors=True)
        training.rename(folder)
    return folder
