"""Writes compressed models in deployment formats, and proves the files right."""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from qcompress_exporters.deploy import build, export, validate
    from qcompress_exporters.parity.report import ParityReport
    from qcompress_exporters.report import ExportReport

# Every public name and the module that holds it.
_HOME: Final = {
    "ExportReport": "qcompress_exporters.report",
    "ParityReport": "qcompress_exporters.parity.report",
    "build": "qcompress_exporters.deploy",
    "export": "qcompress_exporters.deploy",
    "validate": "qcompress_exporters.deploy",
}

__all__ = [
    "ExportReport",
    "ParityReport",
    "build",
    "export",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
