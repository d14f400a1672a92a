"""ONNX as a deployment format."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

from qcompress_exporters.formats.protocol import DeployedFile

if TYPE_CHECKING:
    from qcompress.compressed.model import CompressedModel
    from qcompress.data.dataset import Dataset
    from qcompress.deployment import Deployment
    from qcompress.graph.program import FloatProgram
    from qcompress_exporters.onnx_format.metadata import CompressedFile
    from qcompress_exporters.onnx_format.targets import Target
    from qcompress_exporters.options import BuildOptions, Measuring
    from qcompress_exporters.parity.report import ParityReport
    from qcompress_exporters.report import Built


@final
class OnnxFormat:
    """ONNX files; see `Format`."""

    name: ClassVar[str] = "onnx"
    noun: ClassVar[str] = "an ONNX model"
    suffix: ClassVar[str] = ".onnx"
    ways: ClassVar[tuple[str, ...]] = ("qdq", "integer")
    targets: ClassVar[tuple[str, ...]] = ("portable", "onnxruntime==X", "openvino", "web")

    def target(self, text: str | None) -> "Target":
        """Return the target of a name; see `targets.find`."""
        from qcompress_exporters.onnx_format import targets

        return targets.DEFAULT if text is None else targets.find(text)

    def build(self, model: "CompressedModel", target: "Deployment", options: "BuildOptions") -> "Built":
        """Return the ONNX file of a compressed model."""
        from qcompress_exporters.onnx_format.file import build
        from qcompress_exporters.onnx_format.targets import find

        return build(model, find(target.name), options)

    def proof(self, data: bytes) -> dict[str, Any] | None:
        """Return what onnxruntime found when it loaded a new file and decoded all its tensors."""
        from qcompress_exporters.parity.decode import decodes_as_written

        return decodes_as_written(data)

    def read(self, path: Path) -> "CompressedFile | None":
        """Return an ONNX file; None if it is something else."""
        from qcompress_exporters.onnx_format.metadata import parsed

        return parsed(path)

    def validate(
        self, program: "FloatProgram", file: DeployedFile, data: "Dataset", how: "Measuring"
    ) -> "ParityReport":
        """Return the measurements of an ONNX file against its original; see `parity.validate`."""
        from qcompress_exporters.onnx_format.metadata import read
        from qcompress_exporters.parity.validate import validate

        return validate(program, read(file.path), data, how)
