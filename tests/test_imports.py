"""Every module can be the first one that is imported: no cycle that only the order of imports hides."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# One process for all: torch and the like stay loaded, ours are forgotten before each import.
SCRIPT = """
import importlib, sys
for name in sys.argv[1:]:
    for loaded in [m for m in sys.modules if m.partition(".")[0].startswith("qcompress")]:
        del sys.modules[loaded]
    try:
        importlib.import_module(name)
    except ImportError as e:
        sys.exit(f"import {name}: {e}")
"""


@pytest.mark.slow  # lint-imports finds cycles too
def test_every_module_imports_alone() -> None:
    folders = [ROOT / "qcompress", ROOT / "exporters" / "qcompress_exporters", ROOT / "cli" / "qcompress_cli"]
    names = [
        ".".join(path.relative_to(folder.parent).with_suffix("").parts)
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
        if path.name not in ("__init__.py", "__main__.py")
    ]
    assert len(names) > 50
    environment = {"PYTHONPATH": ":".join(str(f.parent) for f in folders)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
