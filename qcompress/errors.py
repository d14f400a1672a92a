"""One tree of exceptions: catchable as ours and, where it fits, as Python's.

Every message says who, what was required, what came, and what to do about it. The command line prints the message
alone and exits with `exit_code`; no traceback of these ever reaches a user.
"""

import difflib
from collections.abc import Iterable
from typing import Final


class QCompressError(Exception):
    """Base of everything that qcompress raises on purpose."""

    exit_code = 2


class ConfigError(QCompressError, ValueError):
    """A parameter, flag, plan or config file is wrong."""


class SourceError(QCompressError, ValueError):
    """A model file cannot be read, or not for what was asked of it."""


class UnsafeFileError(SourceError):
    """Reading the file as asked would run code that it carries."""


class DataError(QCompressError, ValueError):
    """A data file (calibration, labels) does not fit the model or itself."""


class DivergenceError(QCompressError, ArithmeticError):
    """Training went where no number is."""

    exit_code = 1


class OutputError(QCompressError, OSError):
    """A file cannot be written where it was asked for."""


class DependencyError(QCompressError, ImportError):
    """A package that this command needs is not installed."""


_EXTRA_OF: Final = {"onnxruntime": "validate"}


def missing(package: str, what: str) -> DependencyError:
    """The error for a package that is not installed, with the pip line that installs it.

    >>> str(missing("onnxruntime", "validate"))
    "validate needs the package onnxruntime, which is not installed: pip install 'qcompress[validate]'"
    """
    extra = _EXTRA_OF.get(package, "all")
    return DependencyError(
        f"{what} needs the package {package}, which is not installed: pip install 'qcompress[{extra}]'"
    )


def did_you_mean(word: str, known: Iterable[str], limit: int = 3) -> str:
    """A trailing sentence that names the nearest legal words, or nothing.

    >>> did_you_mean("layer1.weigth", ["layer1.weight", "fc.bias"])
    ' Did you mean layer1.weight?'
    >>> did_you_mean("xyz", ["layer1.weight"])
    ''
    """
    near = difflib.get_close_matches(word, sorted(known), n=limit, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""
