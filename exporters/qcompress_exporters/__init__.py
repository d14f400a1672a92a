"""Compressed models as ONNX files, and the proof that they are right."""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from qcompress_exporters.onnx_format.file import ExportReport, build, export
    from qcompress_exporters.parity.report import ParityReport, validate

# Every public name and the module that holds it.
_HOME: Final = {
    "ExportReport": "qcompress_exporters.onnx_format.file",
    "ParityReport": "qcompress_exporters.parity.report",
    "build": "qcompress_exporters.onnx_format.file",
    "export": "qcompress_exporters.onnx_format.file",
    "validate": "qcompress_exporters.parity.report",
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
