"""Activations with thresholds in files: ties, what moves their codes, and what validate must not pass."""

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qcompress.artifacts import SiteGrid, ThresholdGrid
from qcompress.compressed.model import CompressedModel
from qcompress.data.dataset import Dataset
from qcompress.errors import SourceError
from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.offsets import snap_offsets
from qcompress.posthoc.settings import PosthocSettings
from qcompress_exporters import build, validate
from qcompress_exporters.onnx_format import file as onnx_file
from qcompress_exporters.onnx_format.lower import serialize
from qcompress_exporters.parity import validate as parity
from qcompress_exporters.parity.sessions import run, session
from tests.helpers import agreement, small_models
from tests.helpers.agreement import FORMATS, Agreement
from tests.helpers.nets import image, randomized, traced


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (parity, onnx_file, agreement):
        monkeypatch.setattr(module, "trace", small_models.trace_once)


class Moves(nn.Module):
    """Codes that are pooled, padded, reshaped and taken twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 1, bias=False)
        self.left, self.right = nn.Linear(64, 5), nn.Linear(64, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.first(x).relu(), 2)
        x = nn.functional.pad(self.third(self.second(x)).relu(), (0, 1, 0, 1)).flatten(1)
        return self.left(x) + self.right(x)


def thresholds(grid: SiteGrid, seed: int) -> ThresholdGrid:
    """Uneven thresholds over the range of a grid, one twice, levels as far apart as its own."""
    bits = min(grid.bits, 4)
    ends = grid.dequantize(np.array([0, grid.levels], np.uint8))
    found = np.sort(np.random.default_rng(seed).uniform(*ends, (1 << bits) - 1)).astype(np.float32)
    found[1] = found[0]
    return ThresholdGrid(site=grid.site, thresholds=found, scale=np.asarray(grid.scale), bits=bits)


def with_thresholds(model: CompressedModel, *, same: bool = False) -> CompressedModel:
    """The model, each activation of at most 4 bits on thresholds instead of an even grid."""
    grids = {
        site: thresholds(grid, 0 if same else index) if grid.bits <= 4 else grid
        for index, (site, grid) in enumerate(model.activations.items())
    }
    return dataclasses.replace(model, activations=grids)


def compressed(placement: str = "deploy", activation_bits: int = 4) -> CompressedModel:
    x = image(16, shape=(3, 6, 6))
    plan = Plan.from_flags(bits=4, scheme="uniform", activation_bits=activation_bits)
    data = Dataset(inputs={"x": x}, name="c.npz")
    program = traced(randomized(Moves()), x=x[:2])
    return compress_program(program, plan, PosthocSettings(effort="fast", placement=placement), calibration=data)


@pytest.mark.parametrize("activation_bits", [2, 4])
def test_codes_are_moved_as_codes(activation_bits):
    found = Agreement(with_thresholds(compressed(activation_bits=activation_bits)), {"x": image(24, 1, (3, 6, 6))})
    assert [text for form in FORMATS for text in found.failures(form)] == []
    assert sum(isinstance(g, ThresholdGrid) for g in found.small.activations.values()) >= 3
    model = found.model("qdq")
    (pool,) = (n for n in model.graph.node if n.op_type == "MaxPool")
    assert pool.input[0].startswith("q")
    assert {r.compute for name, r in found.layers().items() if name in ("left.weight", "right.weight")} == {"int8"}


@pytest.mark.parametrize("same", [False, True])
def test_sites_of_one_value_have_codes_each(same):
    found = Agreement(with_thresholds(compressed("paper"), same=same), {"x": image(24, 1, (3, 6, 6))})
    assert [text for form in FORMATS for text in found.failures(form)] == []


def test_a_value_on_a_threshold_reaches_it():
    model = with_thresholds(compressed(activation_bits=2))
    grid = model.activations["x", -1]
    assert isinstance(grid, ThresholdGrid)
    middle = np.resize(grid.thresholds, 36)
    x = np.stack([np.nextafter(middle, np.float32(-9)), middle, np.nextafter(middle, np.float32(9))])
    x = x.reshape(1, 3, 6, 6)
    for form in FORMATS:
        proto = onnx.load_from_string(build(model, format=form).data)
        proto.graph.output.append(onnx.ValueInfoProto(name="q0"))
        for mode in agreement.MODES:
            codes = run(session(proto.SerializeToString(), mode), {"x": x})["q0"]
            np.testing.assert_array_equal(codes, grid.quantize(x))
    assert codes[0, 0].max() < codes[0, 1].max()


def tensor(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def chain(model: onnx.ModelProto, position: int) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """The comparison and the choice of a threshold of the first site, counted from its end."""
    nodes = {n.output[0]: n for n in model.graph.node}
    choice = nodes["q0"]
    for _ in range(position):
        choice = nodes[choice.input[1]]
    return nodes[choice.input[0]], choice


def move_a_threshold(model: onnx.ModelProto) -> None:
    below, _ = chain(model, 1)
    found = tensor(model, below.input[1])
    value = onnx.numpy_helper.to_array(found)
    found.CopyFrom(onnx.numpy_helper.from_array(np.nextafter(value, np.float32(9)), found.name))


def swap_thresholds(model: onnx.ModelProto) -> None:
    (first, _), (second, _) = chain(model, 0), chain(model, 1)
    first.input[1], second.input[1] = second.input[1], first.input[1]


def change_the_scale(model: onnx.ModelProto) -> None:
    found = tensor(model, "s0")
    value = onnx.numpy_helper.to_array(found)
    found.CopyFrom(onnx.numpy_helper.from_array(np.asarray(value * np.float32(1 + 2**-20)), "s0"))


def another_code(model: onnx.ModelProto) -> None:
    (_, last), (_, before) = chain(model, 0), chain(model, 1)
    last.input[2] = before.input[2]


def another_comparison(model: onnx.ModelProto) -> None:
    below, _ = chain(model, 1)
    below.op_type = "LessOrEqual"


def another_value(model: onnx.ModelProto) -> None:
    below, _ = chain(model, 1)
    model.graph.node.insert(0, onnx.helper.make_node("Neg", ["x"], ["other"]))
    below.input[0] = "other"


Edit = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def small() -> CompressedModel:
    """With thresholds at every site, of 2 bits."""
    return with_thresholds(compressed(activation_bits=2))


def edited(model: CompressedModel, form: str, edit: Edit | None, path) -> None:
    proto = onnx.load_from_string(build(model, format=form).data)
    metadata = {p.key: p.value for p in proto.metadata_props}
    if edit is not None:
        edit(proto)
    path.write_bytes(serialize(proto, metadata))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("edit", [None, move_a_threshold, swap_thresholds, change_the_scale])
def test_validate_passes_what_was_written_and_nothing_else(form, edit, small, tmp_path):
    edited(small, form, edit, tmp_path / "net.onnx")
    data = Dataset(inputs={"x": image(16, 1, (3, 6, 6))}, name="x.npz")
    report = validate(small.program, tmp_path / "net.onnx", data)
    (weights,) = (c for c in report.checks if (c.name, c.session) == ("weights", "exact"))
    assert report.ok == weights.ok == (edit is None)
    assert edit is None or weights.detail == "1 of 4 grids differ from what was compressed: x"


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("edit", [another_code, another_comparison, another_value])
def test_other_nodes_than_export_writes_are_refused(form, edit, small, tmp_path):
    edited(small, form, edit, tmp_path / "net.onnx")
    data = Dataset(inputs={"x": image(16, 1, (3, 6, 6))}, name="x.npz")
    with pytest.raises(SourceError, match=r"does not quantize q0 as its metadata says: export it again\.$"):
        validate(small.program, tmp_path / "net.onnx", data)


def test_there_is_no_offset_to_snap(small):
    data = Dataset(inputs={"x": image(4, 1, (3, 6, 6))}, name="x.npz")
    assert snap_offsets(small, data) is small


def test_a_saved_model_writes_the_same_file(small, tmp_path):
    small.save(tmp_path / "small")
    assert build(CompressedModel.load(tmp_path / "small")).data == build(small).data
