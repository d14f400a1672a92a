"""The deployment formats: a format is a folder of its own, a file here that makes it a `Format`, and a line below.

No format's libraries are imported here: `--help` and `gate` start at once.
"""

import difflib
from pathlib import Path
from typing import Final

from qcompress.errors import ConfigError, SourceError
from qcompress_exporters.formats.onnx import OnnxFormat
from qcompress_exporters.formats.protocol import DeployedFile, Format

__all__ = ["FORMATS", "DeployedFile", "Format", "choose", "read"]

# The first one is the default.
FORMATS: Final[dict[str, Format]] = {
    OnnxFormat.name: OnnxFormat(),
}


def choose(text: str | None) -> tuple[Format, str | None]:
    """Return the format that `--format` means, and the way to write int8 compute if it names one.

    Args:
        text: name of a format, or one of its ways to write int8 compute; None: the first format.

    Raises:
        ConfigError: neither.

    >>> choose("integer")[0].name, choose("integer")[1], choose("onnx")[1], choose(None)[0].name
    ('onnx', 'integer', None, 'onnx')
    """
    if text is None:
        return next(iter(FORMATS.values())), None
    if text in FORMATS:
        return FORMATS[text], None
    for format in FORMATS.values():
        if text in format.ways:
            return format, text
    known = [word for name, format in FORMATS.items() for word in (name, *format.ways)]
    near = difflib.get_close_matches(text, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(f"format must be one of {', '.join(known)}, got {text!r}.{hint}")


def read(path: Path) -> tuple[Format, DeployedFile]:
    """Return a file and its format; its content decides which, not its suffix.

    Raises:
        SourceError: the file is unreadable, or of no known format.
    """
    for format in FORMATS.values():
        found = format.read(path)
        if found is not None:
            return format, found
    raise SourceError(f"{path} is not {' or '.join(format.noun for format in FORMATS.values())}.")
