"""Modules as users write them, in the working directory."""

import sys
from pathlib import Path


def code(text: str, name: str = "mine") -> str:
    """Write a module that has numpy as np, in place of one that was imported under its name; returns its name."""
    sys.modules.pop(name, None)
    Path(f"{name}.py").write_text(f"import numpy as np\n{text}\n")
    return name
