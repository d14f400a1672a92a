"""Modules as users write them, in the working directory."""

from pathlib import Path


def code(text: str, name: str = "mine") -> str:
    """Write a module that has numpy as np; returns its name."""
    Path(f"{name}.py").write_text(f"import numpy as np\n{text}\n")
    return name
