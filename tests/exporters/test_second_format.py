"""A second deployment format: a class and a line in the table, nothing in qcompress/ or cli/ changes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from click.testing import CliRunner

from qcompress.artifacts.base import bits_per_weight
from qcompress.artifacts.size import SizeReport, ideal_nbytes
from qcompress.compressed.model import CompressedModel
from qcompress.deployment import Choice, Compute, Cost, Deployment
from qcompress.errors import ConfigError
from qcompress.graph.options import ProgramOptions
from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.settings import PosthocSettings
from qcompress_cli.app import cli
from qcompress_exporters import ExportReport, build, export, formats
from qcompress_exporters.options import BuildOptions
from qcompress_exporters.report import Built, TensorReport
from tests.helpers import small_models
from tests.helpers.nets import residual


@dataclass(frozen=True)
class Reader:
    """A place where JSON files are read: everything computes in float."""

    name: str = "json-reader"
    fused: frozenset[str] = frozenset()
    largest_bias: int = 0
    largest_pair: int = 0

    def integer_kinds(self, compute: Compute) -> tuple[str, ...]:
        """Return no kind."""
        return ()

    def reads(self, bits: int) -> tuple[str, ...]:
        """Return the one encoding."""
        return ("digits",)

    def cost(self, shape: tuple[int, ...], axis: int, choice: Choice) -> Cost:
        """Return a digit and a comma for each weight."""
        return Cost(nbytes=2 * int(np.prod(shape)))


@dataclass(frozen=True)
class JsonFile:
    """A JSON file of artifacts."""

    path: Path
    document: Mapping[str, Any]
    compute: str = "float"
    is_ours: bool = True
    options: ProgramOptions = field(default_factory=ProgramOptions)

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size

    @property
    def whole_nbytes(self) -> int:
        """Bytes of the file."""
        return self.nbytes

    @property
    def original_bytes(self) -> int | None:
        """Bytes of all weights as float32."""
        return int(self.document["original_bytes"])

    def validation(self) -> dict[str, Any] | None:
        """Return None: such files are not measured."""
        return None

    def with_validation(self, document: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
        """Refuse to hold measurements."""
        raise ConfigError("JSON files hold no measurements.")


class JsonFormat:
    """Each artifact as JSON."""

    name: ClassVar[str] = "json"
    noun: ClassVar[str] = "JSON of artifacts"
    suffix: ClassVar[str] = ".json"
    ways: ClassVar[tuple[str, ...]] = ()
    targets: ClassVar[tuple[str, ...]] = ("json-reader",)

    def target(self, text: str | None) -> Deployment:
        """Return the only target."""
        if text not in (None, "json-reader"):
            raise ConfigError(f"target must be json-reader, got {text!r}.")
        return Reader()

    def build(self, model: CompressedModel, target: Deployment, options: BuildOptions) -> Built:
        """Write every artifact as its kind, its arrays as lists, and its fields."""
        original = 4 * sum(int(np.prod(a.shape)) for a in model.artifacts.values())
        tensors, reports = {}, []
        for name, artifact in model.artifacts.items():
            arrays, fields = artifact.to_arrays()
            tensors[name] = {"kind": artifact.kind, **fields, **{k: v.tolist() for k, v in arrays.items()}}
            reports.append(
                TensorReport(
                    name=name, shape=artifact.shape, artifact=artifact.kind, bits=artifact.bits,
                    bits_per_weight=bits_per_weight(artifact), nbytes=artifact.nbytes,
                    float_nbytes=4 * int(np.prod(artifact.shape)), encoding="digits", why="it is the only one",
                )
            )  # fmt: skip
        document = {"made_by": "toy", "target": target.name, "original_bytes": original, "tensors": tensors}
        data = json.dumps(document).encode()
        size = SizeReport(
            ideal=ideal_nbytes(model.artifacts.values()), payload=len(data), file=len(data), original=original,
            count=original // 4,
        )  # fmt: skip
        report = ExportReport(
            path=None, target=target.name, runs_on="readers of JSON", opset=None, size=size, tensors=tuple(reports),
            notes=model.notes,
        )  # fmt: skip
        return Built(data, report)

    def proof(self, data: bytes) -> dict[str, Any] | None:
        """Return None: there is no runtime."""
        return None

    def read(self, path: Path) -> JsonFile | None:
        """Return a file that `build` wrote."""
        try:
            document = json.loads(path.read_bytes())
        except ValueError:
            return None
        return JsonFile(path, document) if document.get("made_by") == "toy" else None

    def validate(self, program: Any, file: Any, data: Any, how: Any) -> Any:
        """Refuse to measure."""
        raise ConfigError("JSON files cannot be run.")


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(formats.FORMATS, JsonFormat.name, JsonFormat())


def test_it_meets_the_protocols() -> None:
    format: formats.Format = JsonFormat()
    assert isinstance(format.target(None), Deployment)


def test_from_python(tmp_path: Path) -> None:
    small = compress_program(residual(), Plan.from_flags(bits=3), PosthocSettings(effort="fast"))
    report = export(small, tmp_path / "net.json", format="json")
    written = json.loads((tmp_path / "net.json").read_text())
    assert set(written["tensors"]) == set(small.artifacts)
    kept = written["tensors"]["grouped.weight"]
    arrays, _ = small.artifacts["grouped.weight"].to_arrays()
    assert (kept["kind"], kept["codes"]) == ("palette", arrays["codes"].tolist())
    assert report.target == written["target"] == "json-reader"
    assert report.size.file == (tmp_path / "net.json").stat().st_size == formats.read(tmp_path / "net.json")[1].nbytes
    with pytest.raises(ConfigError, match=r"^target must be json-reader, got 'portable'\.$"):
        build(small, format="json", target="portable")
    assert build(small).report.opset == 18  # the default is the first format still


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").write_bytes(small_models.pt2())
    return tmp_path


def qcompress(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, args)
    return result.exit_code, result.stdout, result.stderr


def test_from_the_command_line(folder: Path) -> None:
    code, out, err = qcompress("export", "model.pt", "--bits", "2", "--format", "json")
    assert code == 0, err
    assert "written: model.w2.json (runs on readers of JSON)" in out
    nbytes = (folder / "model.w2.json").stat().st_size
    assert f"{nbytes:,}" in out

    code, out, _ = qcompress("gate", "model.w2.json", "--max-size", f"{nbytes} B")
    assert "max_size" in out
    assert f"{nbytes:,} B" in out
    code, out, _ = qcompress("gate", "model.w2.json", "--max-size", f"{nbytes - 1} B")
    assert (code, "FAIL" in out) == (1, True)


def test_wrong_options_name_what_there_is(folder: Path) -> None:
    code, _, err = qcompress("export", "model.pt", "--bits", "2", "--format", "json", "--target", "web")
    assert (code, "target must be json-reader, got 'web'." in err) == (2, True)
    code, _, err = qcompress("export", "model.pt", "--bits", "2", "--format", "jsn")
    assert code == 2
    assert "format must be one of onnx, qdq, integer, json, got 'jsn'. Did you mean json?" in " ".join(err.split())
    (folder / "text.txt").write_text("neither")
    code, _, err = qcompress("gate", "text.txt", "--max-size", "1kB")
    assert (code, "text.txt is not an ONNX model or JSON of artifacts." in err) == (2, True)
