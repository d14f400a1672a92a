"""What every deployment format does, and what is asked of its files."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from qcompress.compressed.model import CompressedModel
    from qcompress.data.dataset import Dataset
    from qcompress.deployment import Deployment
    from qcompress.gate.validation import Validation
    from qcompress.graph.options import ProgramOptions
    from qcompress.graph.program import FloatProgram
    from qcompress_exporters.options import BuildOptions, Measuring
    from qcompress_exporters.parity.report import ParityReport
    from qcompress_exporters.report import Built


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

    def build(self, model: "CompressedModel", target: "Deployment", options: "BuildOptions") -> "Built":
        """Return the file of a compressed model, for one of this format's targets."""

    def proof(self, data: bytes) -> dict[str, Any] | None:
        """Return what a runtime found when it decoded all tensors of a new file; None without a runtime."""

    def read(self, path: Path) -> DeployedFile | None:
        """Return a file of this format; None if the file has another one. Raise a SourceError if it is unreadable."""

    def validate(
        self, program: "FloatProgram", file: DeployedFile, data: "Dataset", how: "Measuring"
    ) -> "ParityReport":
        """Return the measurements of a file that `read` returned against its original."""
