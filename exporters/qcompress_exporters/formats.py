"""The deployment formats: a format is a folder beside this file and a line in FORMATS.

This module imports no format's libraries: `--help` and `gate` start at once.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Protocol, final

from qcompress.errors import ConfigError, SourceError
from qcompress.progress import Track, untracked
from qcompress_exporters.onnx_format.format import OnnxFormat

if TYPE_CHECKING:
    from qcompress.compressed.model import CompressedModel
    from qcompress.data.dataset import Dataset
    from qcompress.deployment import Deployment
    from qcompress.gate.validation import Validation
    from qcompress.graph.options import ProgramOptions
    from qcompress.graph.program import FloatProgram
    from qcompress.metrics.metric import Metric
    from qcompress_exporters.parity.report import ParityReport
    from qcompress_exporters.report import Built

Leftovers = Literal["float32", "float16"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How a file is written.

    Args:
        way: how int8 compute is written, one of `Format.ways`; None: the first of them.
        float_leftovers: type on disk of tensors that are left in float.

    Raises:
        ConfigError: an unknown type.
    """

    way: str | None = None
    float_leftovers: Leftovers = "float32"

    def __post_init__(self) -> None:
        if self.float_leftovers not in ("float32", "float16"):
            raise ConfigError(f"float_leftovers must be float32 or float16, got {self.float_leftovers!r}.")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """How a file is measured.

    Args:
        metric: computed where there are labels.
        source_digest: short digest of the original's file; empty if unknown.
        seed: of the bootstrap.
        device: where the original runs.
        timing: seconds spent on latency, besides two loads; 0: latency and loading are not measured.
        track: wraps the iterator over batches: a progress bar.
    """

    metric: "Metric | None" = None
    source_digest: str = ""
    seed: int = 0
    device: str = "cpu"
    timing: float = 0.0
    track: Track = untracked


class DeployedFile(Protocol):
    """A file of some format, as `gate` and `validate` read it."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""

    @property
    def whole_nbytes(self) -> int:
        """Bytes of the file and of those that it keeps weights in."""

    @property
    def is_ours(self) -> bool:
        """Whether qcompress wrote it."""

    @property
    def original_bytes(self) -> int | None:
        """Bytes of the float file of the same graph, as export measured them; None if it does not say."""

    @property
    def compute(self) -> str:
        """What its layers compute in."""

    @property
    def options(self) -> "ProgramOptions":
        """Names of its inputs, outputs and dynamic axes: how the original is traced to compare with it."""

    def validation(self) -> "Validation | None":
        """Return the stored measurements of `validate`; None if there are none."""

    def validate(self, program: "FloatProgram", data: "Dataset", how: Measuring) -> "ParityReport":
        """Return the measurements of the file against its original."""

    def with_validation(self, document: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
        """Return the file's bytes with measurements in it, and the measurements with the file's new size."""


class Format(Protocol):
    """A deployment format. All methods import what they need when they are called."""

    name: ClassVar[str]
    noun: ClassVar[str]  # in messages: `an ONNX model`
    suffix: ClassVar[str]  # of default file names: `.onnx`
    ways: ClassVar[tuple[str, ...]]  # to write int8 compute, the default first; `--format` takes them, too
    targets: ClassVar[tuple[str, ...]]  # for help, the default first

    def target(self, text: str | None) -> "Deployment":
        """Return the target of that name, the default one for None; raise a ConfigError for an unknown one."""

    def build(self, model: "CompressedModel", target: "Deployment", options: BuildOptions) -> "Built":
        """Return the file of a compressed model, for one of this format's targets."""

    def proof(self, data: bytes) -> dict[str, Any] | None:
        """Return what a runtime found when it decoded all tensors of a new file; None without a runtime."""

    def read(self, path: Path) -> DeployedFile | None:
        """Return a file of this format; None if the file has another one. Raise a SourceError if it is unreadable."""


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


def read(path: Path) -> DeployedFile:
    """Return a file of any format; its content decides which, not its suffix.

    Raises:
        SourceError: the file is unreadable, or of no known format.
    """
    for format in FORMATS.values():
        found = format.read(path)
        if found is not None:
            return found
    raise SourceError(f"{path} is not {' or '.join(format.noun for format in FORMATS.values())}.")
