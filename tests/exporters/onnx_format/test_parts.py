"""Weights that are too large to be decoded at load in one part."""

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from qcompress.compressed.model import CompressedModel
from qcompress.data.dataset import Dataset
from qcompress.deployment import Compute
from qcompress.errors import SourceError
from qcompress.graph.program import FloatProgram
from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.settings import PosthocSettings
from qcompress_exporters import export, validate
from qcompress_exporters.onnx_format import metadata, targets
from qcompress_exporters.onnx_format.file import build
from qcompress_exporters.onnx_format.parts import axes_of
from qcompress_exporters.options import BuildOptions
from qcompress_exporters.parity import sessions
from qcompress_exporters.parity.report import ParityReport
from qcompress_exporters.report import ExportReport
from tests.helpers.nets import traced

LIMIT = 100_000  # bytes that the runtime folds here: 25,000 values


class Language(nn.Module):
    """Embedding and logits with one weight, and a product with a bare matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.bias = nn.Embedding(700, 48), nn.Parameter(torch.randn(700))
        self.mixed, self.down = nn.Parameter(torch.randn(48, 600) / 7), nn.Linear(600, 48)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.down(torch.relu(self.words(tokens) @ self.mixed))
        return hidden @ self.words.weight.T + self.bias


class Picked(nn.Module):
    """Rows of a table that are counted from its end, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(601, 5, 11))

    def forward(self, rows: Tensor) -> Tensor:
        return self.table[rows - 300]


def tokens(most: int) -> np.ndarray[Any, Any]:
    found = np.random.default_rng(0).integers(0, most, (8, 9))
    found[0, :2] = 0, most - 1
    return found


def image() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal((8, 30, 6, 6)).astype(np.float32)


def wide() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal((8, 500)).astype(np.float32)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], np.ndarray[Any, Any]]]] = {
    "tied": (Language, lambda: tokens(700)),
    "table": (Picked, lambda: tokens(601)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(30, 100, 3, bias=False), nn.ReLU(), nn.Conv2d(100, 50, 3)), image),
    "gemm": (lambda: nn.Sequential(nn.Linear(500, 60), nn.ReLU(), nn.Linear(60, 450)), wide),
}
WAYS = {
    "3 bits": {"bits": 3},
    "4 bits": {"bits": 4},
    "groups": {"bits": 2, "rows_per_lut": 3},
    "vectors": {"bits": 4, "vector_dim": 8},
    "blocks": {"bits": 8, "scheme": "uniform", "block_size": 7},
}


@functools.cache
def program(net: str) -> FloatProgram:
    torch.manual_seed(0)
    module, inputs = NETS[net]
    return traced(module().eval(), x=inputs())


def compressed(net: str, way: str, **options: Any) -> tuple[CompressedModel, Dataset]:
    settings = PosthocSettings(effort="fast", **options)
    model = compress_program(program(net), Plan.from_flags(**WAYS[way]), settings)
    return model, Dataset(inputs={"x": NETS[net][1]()}, labels=None, name="x")


def written(model: CompressedModel, path: Path, target: str = "portable", limit: int = LIMIT) -> ExportReport:
    small = dataclasses.replace(targets.find(target), folded=limit)
    built = build(model, small, BuildOptions(way=None, float_leftovers="float32"))
    built.write(path, force=True)
    return built.report


def failed(report: ParityReport) -> dict[str, str]:
    return {f"{c.name} {c.session}": c.detail for c in report.checks if not c.ok}


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sessions._DEPLOYED_CONFIG, sessions.FOLDING_LIMIT, str(LIMIT))


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize(
    ("net", "way", "target"),
    [
        *((net, "3 bits", "portable") for net in NETS),
        *(("tied", way, "portable") for way in ("groups", "vectors", "blocks")),
        ("gemm", "4 bits", "onnxruntime==1.24"),
    ],
)
def test_large_weights_are_folded_in_parts(net: str, way: str, target: str, tmp_path: Path) -> None:
    model, data = compressed(net, way)
    report = written(model, tmp_path / "m.onnx", target)
    assert failed(validate(model, tmp_path / "m.onnx", data)) == {}
    assert not any("decoded at each run" in note for note in report.notes)
    names = {o for n in onnx.load(tmp_path / "m.onnx").graph.node for o in n.output}
    assert sum(bool(re.search(r"\[:?,?\d\]$", name)) for name in names) >= 2


@pytest.mark.usefixtures("small_limit")
def test_without_parts_such_files_are_refused(tmp_path: Path) -> None:
    model, data = compressed("gemm", "4 bits")
    written(model, tmp_path / "m.onnx", limit=1 << 30)
    found = failed(validate(model, tmp_path / "m.onnx", data))
    assert "operators decode weights at each run" in found["weights deployed"]


@pytest.mark.slow
def test_a_weight_above_1_gib(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = (1 << 28) // 2048 + 1
    net = nn.Sequential(nn.Embedding(rows, 2048), nn.Linear(2048, 4)).eval()
    x = np.array([[0, rows - 1], [rows // 2, rows // 2 + 1], [5, 6], [7, 8]])
    plan = Plan.from_flags(bits=4)
    model = compress_program(traced(net, x=x), plan, PosthocSettings(effort="fast"))
    export(model, tmp_path / "m.onnx")
    assert failed(validate(model, tmp_path / "m.onnx", Dataset(inputs={"x": x}, labels=None, name="x"))) == {}
    names = {o for n in onnx.load(tmp_path / "m.onnx").graph.node for o in n.output}
    assert {"0.weight[0]", "0.weight[1]"} <= names


class Twice(nn.Module):
    """A matrix whose columns are counted by one product and whose rows are by another."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(180, 180))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w @ self.w.T


def test_what_takes_no_parts_is_named(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((4, 180)).astype(np.float32)
    plan = Plan.from_flags(bits=4)
    model = compress_program(traced(Twice().eval(), x=x), plan, PosthocSettings(effort="fast"))
    notes = written(model, tmp_path / "m.onnx").notes
    assert [note.partition(",")[0] for note in notes if "at each run" in note] == ["w is decoded at each run"]


@pytest.mark.parametrize(("compute", "activation_bits"), [("int8", 8), ("dynamic8", None)])
def test_layers_with_large_weights_compute_in_float(
    compute: Compute, activation_bits: int | None, tmp_path: Path
) -> None:
    _, data = compressed("gemm", "4 bits")
    plan = Plan.from_flags(bits=8, activation_bits=activation_bits)
    settings = PosthocSettings(effort="fast", compute=compute)
    model = compress_program(program("gemm"), plan, settings, calibration=data)
    layers = {layer.weight: (layer.compute, layer.why) for layer in written(model, tmp_path / "m.onnx").layers}
    assert layers == {
        "0.weight": ("float", "it is too large to be decoded at load in one part"),
        "2.weight": ("float", "it is too large to be decoded at load in one part"),
    }
    assert failed(validate(model, tmp_path / "m.onnx", data)) == {}


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, data = compressed("gemm", "4 bits")
    path = tmp_path / "m.onnx"
    written(model, path)
    proto = onnx.load(path)
    node = next(n for n in proto.graph.node if n.output[0] == "0.weight[1]")
    shape = next(t for t in proto.graph.initializer if t.name == node.input[1])
    assert node.op_type == "Reshape"
    own = onnx.TensorProto()
    own.CopyFrom(shape)
    own.name, node.input[1] = "other", "other"
    own.raw_data = np.array([-1], np.int64).tobytes()
    own.dims[:] = [1]
    proto.graph.initializer.append(own)
    path.write_bytes(metadata.serialize(proto, {p.key: p.value for p in proto.metadata_props}))
    with pytest.raises(SourceError, match=r"^The parts of 0\.weight in the file do not fit together: export it again"):
        validate(model, path, data)


@pytest.mark.parametrize(("axes", "found"), [([-1], [0]), ([-2, -1], []), (None, [])])
def test_only_lookups_of_whole_rows_take_parts(axes: list[int] | None, found: list[int]) -> None:
    table, rows = (ir.Value(name=name, shape=ir.Shape(shape)) for name, shape in (("table", [9, 4]), ("rows", [5])))
    indices, nodes = rows, []
    if axes is not None:
        constant = ir.Value(name="axes", const_value=ir.tensor(np.array(axes)))
        nodes = [ir.node("Unsqueeze", [rows, constant])]
        indices = nodes[0].outputs[0]
    nodes.append(ir.node("GatherND", [table, indices]))
    graph = ir.Graph([table, rows], nodes[-1].outputs, nodes=nodes, opset_imports={"": 18})
    assert axes_of(table, graph) == found
