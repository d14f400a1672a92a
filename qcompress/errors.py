"""One tree of exceptions: catchable as ours and, where it fits, as Python's.

Every message says what was required, what came, and what to do about it. The command line prints only the message and
exits with `exit_code`; it never shows a traceback of these errors.
"""

import difflib
from collections.abc import Iterable
from typing import Final


class QCompressError(Exception):
    """Base of all errors that qcompress raises on purpose."""

    exit_code = 2


class ConfigError(QCompressError, ValueError):
    """An argument, option, plan or config file is invalid."""


class SourceError(QCompressError, ValueError):
    """A model cannot be read, or cannot be used for the request."""


class UnsafeFileError(SourceError):
    """Reading a file as requested would run code from it."""


class DataError(QCompressError, ValueError):
    """Calibration or test data does not fit the model, or contradicts itself."""


class DivergenceError(QCompressError, ArithmeticError):
    """Training produced NaN or Inf."""

    exit_code = 1


class OutputError(QCompressError, OSError):
    """A file cannot be written to the given path."""


class DependencyError(QCompressError, ImportError):
    """A required package is not installed."""


_EXTRA_OF: Final = {"onnxruntime": "validate", "pillow": "images"}  # others belong to `all`


def missing(package: str, what: str) -> DependencyError:
    """Return the error for a package that is not installed, with the pip line that installs it.

    >>> str(missing("onnxruntime", "validate"))
    "validate needs the package onnxruntime, which is not installed: pip install 'qcompress[validate]'"
    """
    extra = _EXTRA_OF.get(package, "all")
    return DependencyError(
        f"{what} needs the package {package}, which is not installed: pip install 'qcompress[{extra}]'"
    )


def did_you_mean(word: str, known: Iterable[str], limit: int = 3) -> str:
    """Return a trailing sentence that names the most similar known words, or an empty string.

    >>> did_you_mean("layer1.weigth", ["layer1.weight", "fc.bias"])
    ' Did you mean layer1.weight?'
    >>> did_you_mean("xyz", ["layer1.weight"])
    ''
    """
    near = difflib.get_close_matches(word, sorted(known), n=limit, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""
