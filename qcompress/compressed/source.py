"""The source for a folder that `CompressedModel.save` wrote: its dequantized tensors and its float program."""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, final

from qcompress.files import read_plain
from qcompress.graph.options import ProgramOptions
from qcompress.kinds import UNKNOWN
from qcompress.sources.base import LazyArray, SourceOptions, SourceTensor

# qcompress.compressed is imported where it is used, because it imports the plan, which imports the sources.

if TYPE_CHECKING:
    from qcompress.compressed.model import CompressedModel
    from qcompress.graph.program import FloatProgram


@final
class CompressedSource:
    """The tensors and the program of a compressed model.

    Args:
        path: the folder.
        options: unused.
    """

    def __init__(self, path: Path, options: SourceOptions | None = None) -> None:
        self.path = path

    @property
    def label(self) -> str:
        """The path as given."""
        return str(self.path)

    @property
    def original_bytes(self) -> int:
        """Size in bytes of the files that hold weights."""
        from qcompress.compressed.folder import PROGRAM, WEIGHTS

        return sum((self.path / name).stat().st_size for name in (WEIGHTS, PROGRAM) if (self.path / name).exists())

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights file."""
        from qcompress.compressed.folder import WEIGHTS

        return hashlib.sha256(read_plain(self.path / WEIGHTS)).hexdigest()

    def tensors(self) -> Iterator[SourceTensor]:
        """Yield every tensor, dequantized."""
        from qcompress.compressed.folder import read_artifacts

        for name, artifact in read_artifacts(self.path)[1].items():
            lazy = LazyArray(artifact.shape, artifact.decoded_dtype.name, artifact.dequantize)
            yield SourceTensor(name, UNKNOWN, lazy)

    def program(self, options: ProgramOptions) -> "FloatProgram":
        """Return the saved float program."""
        return self._model.program

    def model(self) -> "CompressedModel":
        """Return the compressed model itself."""
        return self._model

    @cached_property
    def _model(self) -> "CompressedModel":
        from qcompress.compressed.model import CompressedModel

        return CompressedModel.load(self.path)
