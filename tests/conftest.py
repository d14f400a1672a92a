"""What all tests share: a quiet hypothesis, and the digits sample trained once."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parents[1]

# Before torch is imported: on nets as small as these, threads that wait for each other cost more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples on every run and machine; time limits belong to no test that a busy machine may run.
hypothesis.settings.register_profile("qcompress", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("qcompress")


@pytest.fixture
def all_cores() -> Iterator[None]:
    """As many threads as torch takes by itself: for what must not depend on the order in which they end."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits(request: pytest.FixtureRequest) -> Path:
    """A folder with what `samples/digits/train.py` writes; kept between runs until the sample changes. Read-only."""
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
