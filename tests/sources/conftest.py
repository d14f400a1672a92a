"""A small network, and a trap that a hostile file would spring."""

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.archives import Archive, Small, Trap


@pytest.fixture
def small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="session")
def pt2_bytes() -> bytes:
    """An exported program with a dynamic batch."""
    torch.manual_seed(0)
    exported = torch.export.export(
        Small().eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    return buffer.getvalue()


@pytest.fixture
def sprung(tmp_path: Path) -> Path:
    """The file that exists once a trap was sprung."""
    return tmp_path / "sprung"


@pytest.fixture
def traps(sprung: Path) -> dict[str, Trap]:
    """Objects that create `sprung` when they are unpickled."""
    touch = f"open({str(sprung)!r}, 'w').close()"
    return {
        "system": Trap(os.system, f"touch '{sprung}'"),
        "exec": Trap(exec, touch),
        "eval": Trap(eval, touch),
        "open": Trap(open, str(sprung), "w"),
        "torch": Trap(torch.save, 1, str(sprung)),
        "mkdir": Trap(os.mkdir, str(sprung)),
    }


@pytest.fixture(autouse=True)
def _same_import_path() -> Iterator[None]:
    before, loaded = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = before
    for name in set(sys.modules) - loaded:
        if name.startswith("_qcompress_arch_") or name in ("my_nets", "evil_module"):
            del sys.modules[name]


@pytest.fixture
def pt2(pt2_bytes: bytes) -> Archive:
    """An exported program with a dynamic batch, to be changed."""
    return Archive(pt2_bytes)
