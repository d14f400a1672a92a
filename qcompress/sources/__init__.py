"""Whatever a model comes in becomes a Source: a file told by its content, or an object in memory."""

from qcompress.sources.base import (
    KINDS,
    UNKNOWN,
    WEIGHT_KINDS,
    LazyArray,
    ProgramOptions,
    Source,
    SourceOptions,
    SourceTensor,
)
from qcompress.sources.openers import DEFAULT_OPENERS, Opener, load_source

__all__ = [
    "DEFAULT_OPENERS",
    "KINDS",
    "UNKNOWN",
    "WEIGHT_KINDS",
    "LazyArray",
    "Opener",
    "ProgramOptions",
    "Source",
    "SourceOptions",
    "SourceTensor",
    "load_source",
]
