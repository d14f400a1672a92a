"""Compress trained PyTorch models to packed 1- to 8-bit weights.

`import qcompress as qc` costs nothing: every name is imported when it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from qcompress import finetune, quantizers, regularizers
    from qcompress.analysis import analyze
    from qcompress.artifacts import FloatWeight, IntegerWeight, PalettizedWeight
    from qcompress.compressed.model import CompressedModel
    from qcompress.data.dataset import Dataset, load_data
    from qcompress.errors import QCompressError
    from qcompress.finetune import prepare
    from qcompress.openers import load_source
    from qcompress.plan.plan import Plan, load_plan
    from qcompress.posthoc.compress import compress

# Every public name and the module that holds it.
_HOME: Final = {
    "CompressedModel": "qcompress.compressed.model",
    "Dataset": "qcompress.data.dataset",
    "FloatWeight": "qcompress.artifacts",
    "IntegerWeight": "qcompress.artifacts",
    "PalettizedWeight": "qcompress.artifacts",
    "Plan": "qcompress.plan.plan",
    "QCompressError": "qcompress.errors",
    "analyze": "qcompress.analysis",
    "compress": "qcompress.posthoc.compress",
    "load_data": "qcompress.data.dataset",
    "load_plan": "qcompress.plan.plan",
    "load_source": "qcompress.openers",
    "prepare": "qcompress.finetune",
}

# Public packages: what is in them is public, too.
_PACKAGES: Final = ("finetune", "quantizers", "regularizers")

__all__ = [
    "CompressedModel",
    "Dataset",
    "FloatWeight",
    "IntegerWeight",
    "PalettizedWeight",
    "Plan",
    "QCompressError",
    "analyze",
    "compress",
    "finetune",
    "load_data",
    "load_plan",
    "load_source",
    "prepare",
    "quantizers",
    "regularizers",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"qcompress.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
