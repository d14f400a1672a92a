"""What each of the three checks finds, and what it must not call ok."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qcompress.data.dataset import Dataset
from qcompress.errors import DataError, SourceError
from qcompress.metrics.metric import METRICS
from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.settings import PosthocSettings
from qcompress_exporters import export, validate
from qcompress_exporters.onnx_format import file as onnx_file
from qcompress_exporters.onnx_format import metadata
from qcompress_exporters.onnx_format.lower import serialize
from qcompress_exporters.parity import sessions
from qcompress_exporters.parity import validate as parity
from qcompress_exporters.parity.checks import check_exporter
from qcompress_exporters.parity.differences import EXPORTER_TOLERANCE
from qcompress_exporters.parity.report import ParityReport
from tests.helpers import small_models
from tests.helpers.nets import image, sentences, tied, traced

SESSIONS = ("exact", "deployed")
Edit = Callable[[onnx.ModelProto], None]


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (parity, onnx_file):
        monkeypatch.setattr(module, "trace", small_models.trace_once)


def data(samples: int = 32, labels: bool = False) -> Dataset:
    return Dataset(
        inputs={"x": small_models.images(samples)}, labels=np.arange(samples) % 5 if labels else None, name="x.npz"
    )


def write(folder: Path, edit: Edit = lambda model: None, seed: int = 0) -> Path:
    """The file of `small_models`, edited."""
    model = onnx.load_from_string(small_models.built(seed).data)
    edit(model)
    path = folder / "net.onnx"
    path.write_bytes(serialize(model, {p.key: p.value for p in model.metadata_props}))
    return path


def failed(report: ParityReport) -> dict[str, str]:
    """The checks that did not pass, and what they say."""
    assert report.ok == all(c.ok for c in report.checks)
    return {f"{c.name} {c.session}": c.detail for c in report.checks if not c.ok}


def producer(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if name in n.output)


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


PACKED = (onnx.TensorProto.UINT8, onnx.TensorProto.UINT4, onnx.TensorProto.UINT2)


def codes_of(model: onnx.ModelProto, weight: str) -> onnx.TensorProto:
    """The packed codes that a weight is decoded from."""
    stack = [weight]
    while stack:
        for name in producer(model, stack.pop()).input:
            found = [t for t in model.graph.initializer if t.name == name]
            if found and found[0].data_type in PACKED:
                return found[0]
            stack += [] if found else [name]
    raise AssertionError(f"{weight} has no codes")


def lut_of(model: onnx.ModelProto, weight: str) -> onnx.TensorProto:
    node = producer(model, weight)
    while not any(tensor.name == node.input[0] for tensor in model.graph.initializer):
        node = producer(model, node.input[0])
    assert node.op_type in ("Gather", "GatherElements")
    return initializer(model, node.input[0])


def swap(a: onnx.TensorProto, b: onnx.TensorProto) -> None:
    assert (a.data_type, list(a.dims)) == (b.data_type, list(b.dims))
    a.raw_data, b.raw_data = b.raw_data, a.raw_data


def flip_one_bit(model: onnx.ModelProto) -> None:
    codes = codes_of(model, "stem.weight")
    codes.raw_data = bytes([codes.raw_data[0] ^ 1]) + codes.raw_data[1:]


def swap_weights(model: onnx.ModelProto) -> None:
    swap(codes_of(model, "left.weight"), codes_of(model, "right.weight"))
    swap(lut_of(model, "left.weight"), lut_of(model, "right.weight"))


def swap_names(model: onnx.ModelProto) -> None:
    left, right = producer(model, "left.weight"), producer(model, "right.weight")
    left.output[0], right.output[0] = right.output[0], left.output[0]


def swap_biases(model: onnx.ModelProto) -> None:
    swap(initializer(model, "left.bias"), initializer(model, "right.bias"))


def transpose_lut(model: onnx.ModelProto) -> None:
    lut = lut_of(model, "right.weight")
    lut.raw_data = onnx.numpy_helper.to_array(lut).T.tobytes()


def reverse_lut(model: onnx.ModelProto) -> None:
    lut = lut_of(model, "stem.weight")
    lut.raw_data = onnx.numpy_helper.to_array(lut)[::-1].tobytes()


def change_bias(model: onnx.ModelProto) -> None:
    bias = initializer(model, "head.bias")
    values = onnx.numpy_helper.to_array(bias).copy()
    values[0] = np.nextafter(values[0], np.float32(9))
    bias.raw_data = values.tobytes()


def negative_zero(model: onnx.ModelProto) -> None:
    """A number that compares equal, and is another one all the same."""
    bias = initializer(model, "head.bias")
    bias.raw_data = bytes(len(bias.raw_data) - 1) + b"\x80"


CORRUPTIONS: dict[str, tuple[Edit, str]] = {
    "one bit of one code": (flip_one_bit, "1 of 8 tensors differ from what was compressed: stem.weight"),
    "two weights": (swap_weights, "2 of 8 tensors differ from what was compressed: left.weight, right.weight"),
    "two names": (swap_names, "2 of 8 tensors differ from what was compressed: right.weight, left.weight"),
    "two biases": (swap_biases, "2 of 8 tensors differ from what was compressed: left.bias, right.bias"),
    "a transposed LUT": (transpose_lut, "1 of 8 tensors differ from what was compressed: right.weight"),
    "a reversed LUT": (reverse_lut, "1 of 8 tensors differ from what was compressed: stem.weight"),
    "a bias by one ulp": (change_bias, "1 of 8 tensors differ from what was compressed: head.bias"),
    "minus zero": (negative_zero, "1 of 8 tensors differ from what was compressed: head.bias"),
}


def test_a_good_file_passes_every_check_in_both_sessions(tmp_path: Path) -> None:
    report = validate(small_models.compressed(), write(tmp_path), data(labels=True), metric=METRICS["top1"])
    assert failed(report) == {}
    assert [(c.name, c.session) for c in report.checks] == [
        ("weights", "exact"), ("weights", "deployed"), ("graph", "exact"), ("graph", "deployed"),
        ("exporter", "exact"), ("exporter", "deployed"),
    ]  # fmt: skip
    assert [c.error for c in report.checks[:4]] == [None, None, 0.0, 0.0]
    assert all(c.error is not None and 0 < c.error <= 1e-4 for c in report.checks[4:])
    assert report.same_ops
    assert report.same_source is True
    assert report.notes == ()
    assert report.sqnr_db is not None
    assert report.metric is not None
    assert report.metric.samples == 32
    assert report.data == {"name": "x.npz", "digest": data(labels=True).digest, "samples": 32, "labels": True}
    json.dumps(report.as_dict(), allow_nan=False)


@pytest.mark.usefixtures("traced_once")
def test_signal_to_noise_tells_good_from_bad(tmp_path: Path) -> None:
    """Of outputs that are near 0.5 whatever is shown: their size made files of 2 bits, and of other weights, look fine.

    Every 6 dB are a bit.
    """
    found = {}
    for bits in (4, 8):
        path = tmp_path / f"{bits}.onnx"
        export(
            compress_program(small_models.program(), Plan.from_flags(bits=bits), PosthocSettings(effort="fast")), path
        )
        found[bits] = validate(small_models.program(), path, data(60)).sqnr_db
    assert found[8] is not None
    assert found[4] is not None
    assert found[8] > 25
    assert 15 < found[8] - found[4] < 35


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.usefixtures("traced_once")
def test_a_corrupted_tensor_fails_the_weights_check(tmp_path: Path, name: str) -> None:
    """The other two checks take the file's own values, so that this one alone has to find it, and says which."""
    edit, detail = CORRUPTIONS[name]
    assert failed(validate(small_models.program(), write(tmp_path, edit), data())) == {"weights exact": detail}


def test_the_corruptions_are_none_without_their_edit(tmp_path: Path) -> None:
    """Each edit changes the file, else the test above would prove nothing."""
    good = write(tmp_path).read_bytes()
    assert all(write(tmp_path, edit).read_bytes() != good for edit, _ in CORRUPTIONS.values())
    assert write(tmp_path).read_bytes() == good == small_models.built().data


def abs_for_relu(model: onnx.ModelProto) -> None:
    next(n for n in model.graph.node if n.op_type == "Relu").op_type = "Abs"


def swap_uses(model: onnx.ModelProto) -> None:
    """Both convolutions keep their tensors, each takes the other's."""
    other = {"left.weight": "right.weight", "right.weight": "left.weight"}
    for node in model.graph.node:
        if node.op_type == "Conv":
            node.input[:] = [other.get(i, i) for i in node.input]


def no_left_bias(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if "left.bias" in n.input)
    node.input.pop()


def strip_digest(model: onnx.ModelProto) -> None:
    producer(model, "left.weight").doc_string = ""


@pytest.mark.parametrize(
    ("edit", "where"),
    [(abs_for_relu, "Abs"), (swap_uses, "Conv with right.weight"), (no_left_bias, "Conv with left.weight")],
)
@pytest.mark.usefixtures("traced_once")
def test_a_changed_graph_fails_the_graph_check_which_names_the_layer(tmp_path: Path, edit: Edit, where: str) -> None:
    report = validate(small_models.program(), write(tmp_path, edit), data())
    assert failed(report) == dict.fromkeys([f"graph {s}" for s in SESSIONS], f"output output differs, first at {where}")
    assert all(c.error is not None and c.error > 0 for c in report.checks if c.name == "graph")


@pytest.mark.usefixtures("traced_once")
def test_a_tensor_without_its_digest_is_missed(tmp_path: Path) -> None:
    report = validate(small_models.program(), write(tmp_path, strip_digest), data())
    assert failed(report) == {
        "weights exact": "left.weight is in the model only: the file was not made from this model"
    }
    assert not [c for c in report.checks if c.name == "graph"]


@pytest.mark.usefixtures("traced_once")
def test_a_file_of_other_weights_is_told_by_its_source(tmp_path: Path) -> None:
    """Nothing in it is wrong by itself; agreement and the note are what shows that it belongs to another model."""
    report = validate(small_models.program(), write(tmp_path), data(), source_digest="abcdefghijk")
    assert failed(report) == {}
    assert report.same_source is False
    assert report.notes == (
        "net.onnx was not exported from this model file (but from a file with the digest 0123456789a; this one has "
        "abcdefghijk): if it should have been, export it again",
    )
    assert validate(small_models.program(), tmp_path / "net.onnx", data()).same_source is None


@pytest.mark.usefixtures("traced_once")
def test_a_file_of_the_same_net_with_other_weights_agrees_badly(tmp_path: Path) -> None:
    other = small_models.program(seed=1)
    report = validate(other, write(tmp_path), data(60))
    assert failed(report) == {}
    assert report.sqnr_db is not None
    assert report.sqnr_db < -20


class OtherHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(x).mean((2, 3)))


@pytest.mark.usefixtures("traced_once")
def test_another_architecture(tmp_path: Path) -> None:
    other = traced(OtherHead().eval(), x=small_models.images(2))
    report = validate(other, write(tmp_path), data())
    assert failed(report) == {"weights exact": "left.bias is in the file only: the file was not made from this model"}
    wide = traced(small_models.Net(classes=7).eval(), x=small_models.images(2))
    message = (
        r"net\.onnx was not made from this model: its output output has shape \[5\] for each sample, "
        r"the model's \[7\]\.$"
    )
    with pytest.raises(SourceError, match=message):
        validate(wide, tmp_path / "net.onnx", data())


@pytest.mark.parametrize(("what", "names"), [("input", {"input_names": ("a",)}), ("output", {"output_names": ("b",)})])
def test_other_names_of_inputs_and_outputs(tmp_path: Path, what: str, names: dict[str, tuple[str]]) -> None:
    program = dataclasses.replace(small_models.program(), **names)
    with pytest.raises(SourceError, match=rf"net\.onnx was not made from this model: its {what}s are \w+, the model's"):
        validate(program, write(tmp_path), data())


@pytest.mark.usefixtures("traced_once")
def test_a_constant_network_is_no_success(tmp_path: Path) -> None:
    """All weights of the head 0: every check that divides by the outputs' spread would pass whatever came before."""
    model = small_models.Net().eval()
    nn.init.zeros_(model.head.weight)
    program = traced(model, x=small_models.images(2))
    path = tmp_path / "constant.onnx"
    export(compress_program(program, Plan.from_flags(bits=2), PosthocSettings(effort="fast")), path)
    report = validate(program, path, data())
    says = "the network is constant on this data: pass data for which its outputs vary"
    assert failed(report) == dict.fromkeys([f"exporter {s}" for s in SESSIONS], says)
    assert report.outputs["output"].constant
    assert report.notes == (
        "output output: the network is constant on this data, so parity and agreement prove nothing",
    )


def identity_file() -> bytes:
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", 3]) for n in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    opset = [onnx.helper.make_opsetid("", 18)]
    data: bytes = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString()
    return data


def test_rounding_of_large_outputs_that_vary_little_is_no_fault_of_the_exporter() -> None:
    """Near 30, float32 numbers lie 2e-6 apart: 0.2 % of a spread of 0.001, and right all the same."""
    x = (30 + 0.001 * np.random.default_rng(0).standard_normal((64, 3))).astype(np.float32)
    neighbours = np.nextafter(x, np.float32(np.inf))
    check = check_exporter(identity_file(), {"y": neighbours}, [{"x": x}], "exact")
    assert check.ok
    assert check.error is not None
    assert EXPORTER_TOLERANCE < check.error < check.limit
    wrong = check_exporter(identity_file(), {"y": x + np.float32(1e-4)}, [{"x": x}], "exact")
    assert not wrong.ok
    small = x - np.float32(30)
    assert check_exporter(identity_file(), {"y": small}, [{"x": small}], "exact").limit == EXPORTER_TOLERANCE
    assert not check_exporter(identity_file(), {"y": small + np.float32(1e-6)}, [{"x": small}], "exact").ok


def test_one_sample_cannot_show_a_spread(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"^Parity needs at least 2 samples, so that outputs can differ; x\.npz has 1\.$"
    ):
        validate(small_models.program(), write(tmp_path), data(1))


class Fixed(nn.Module):
    """Takes a batch of 3 and no other."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.reshape(3, 12))


@pytest.mark.usefixtures("traced_once")
def test_a_fixed_batch_measures_whole_batches(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    program = traced(Fixed().eval(), x=random.standard_normal((3, 12)).astype(np.float32))
    assert program.fixed_batch == 3
    path = tmp_path / "fixed.onnx"
    export(compress_program(program, Plan.from_flags(bits=2), PosthocSettings(effort="fast")), path)
    samples = Dataset(inputs={"x": random.standard_normal((11, 12)).astype(np.float32)}, labels=np.zeros(11, int))
    report = validate(program, path, samples, metric=METRICS["top1"])
    assert failed(report) == {}
    assert report.data["samples"] == 9
    assert report.metric is not None
    assert report.metric.samples == 9
    with pytest.raises(
        DataError, match=r"^The model accepts only batches of 3, but data has 2 samples: pass more data\.$"
    ):
        validate(program, path, samples.head(2))


@pytest.mark.usefixtures("traced_once")
def test_several_outputs_are_told_one_by_one(tmp_path: Path) -> None:
    program = tied()
    small = compress_program(program, Plan.from_flags(bits=4), PosthocSettings(effort="fast"))
    path = tmp_path / "tied.onnx"
    export(small, path)
    report = validate(small, path, Dataset(inputs=dict(sentences(20, seed=3))))
    assert failed(report) == {}
    assert list(report.outputs) == ["logits", "hidden"]
    assert {o.agreement for o in report.outputs.values()} == {None}  # [samples, words, classes]
    assert report.agreement is None
    noises = [o.sqnr_db for o in report.outputs.values()]
    assert report.sqnr_db == min(n for n in noises if n is not None)


class Infinite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.fc(x) * 100).exp()


@pytest.mark.usefixtures("traced_once")
def test_outputs_that_are_not_finite_cannot_be_compared(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32) * 9
    program = traced(Infinite().eval(), x=x)
    path = tmp_path / "infinite.onnx"
    export(compress_program(program, Plan.from_flags(bits=2), PosthocSettings(effort="fast")), path)
    with pytest.raises(
        DataError, match=r"^Output output of the original must be finite to be compared, \d+ of its 240 "
    ):
        validate(program, path, Dataset(inputs={"x": x}))


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    def foreign(model: onnx.ModelProto) -> None:
        del model.metadata_props[:]

    with pytest.raises(SourceError, match=r"net\.onnx was not written by qcompress"):
        validate(small_models.program(), write(tmp_path, foreign), data())
    path = tmp_path / "text.onnx"
    path.write_text("hello")
    with pytest.raises(SourceError, match=r"text\.onnx is not an ONNX model\.$"):
        validate(small_models.program(), path, data())


@pytest.mark.usefixtures("traced_once")
def test_measurements_in_the_metadata_leave_digest_and_graph_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path)
    before = metadata.read(path)
    document = json.dumps(validate(small_models.program(), path, data()).as_dict())
    path.write_bytes(serialize(before.model, {**before.metadata, metadata.VALIDATION: document}))
    after = metadata.read(path)
    assert after.digest == before.digest
    assert after.model.graph == before.model.graph
    measured = after.validation()
    assert measured is not None
    assert measured.as_dict() == json.loads(document)


@pytest.mark.usefixtures("traced_once")
def test_data_of_another_shape(tmp_path: Path) -> None:
    wrong = Dataset(inputs={"x": image(4)})
    with pytest.raises(DataError, match=r"^Input x must have shape \[any, 3, 8, 8\], got \[4, 3, 9, 9\]\.$"):
        validate(small_models.program(), write(tmp_path), wrong)


def of_no_type(tensor: onnx.TensorProto) -> None:
    tensor.data_type = 0


def of_other_shape(tensor: onnx.TensorProto) -> None:
    tensor.dims[:] = [0, 1 << 62]


def elsewhere(tensor: onnx.TensorProto) -> None:
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    tensor.external_data.add(key="location", value="beside.bin")


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(
    ("damage", "message"),
    [(of_no_type, "is damaged in the file"), (of_other_shape, "is damaged"), (elsewhere, "is kept in another file")],
)
def test_damaged_tensors_are_named(damage: Callable[[onnx.TensorProto], None], message: str, tmp_path: Path) -> None:
    (tmp_path / "beside.bin").write_bytes(bytes(1000))
    path = write(tmp_path, lambda model: damage(next(t for t in model.graph.initializer if t.name.endswith("bias"))))
    with pytest.raises(SourceError, match=message):
        validate(small_models.compressed(), path, data())


def test_weights_that_are_too_large_to_fold_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = np.random.default_rng(0).standard_normal((8, 600)).astype(np.float32)
    program = traced(nn.Sequential(nn.Linear(600, 500), nn.ReLU(), nn.Linear(500, 4)).eval(), input=x)
    small = compress_program(program, Plan.from_flags(bits=4), PosthocSettings(effort="fast"))
    path = tmp_path / "m.onnx"
    export(small, path)
    samples = Dataset(inputs={"input": x}, labels=None, name="x")
    assert validate(small, path, samples).ok
    monkeypatch.setitem(sessions._DEPLOYED_CONFIG, sessions.FOLDING_LIMIT, str(1 << 20))  # 1 MiB; decoded: 1.2 MB
    found = failed(validate(small, path, samples))
    assert "operators decode weights at each run" in found["weights deployed"]


def test_a_constant_output_has_no_ratio(tmp_path: Path) -> None:
    samples = Dataset(inputs={"x": np.full_like(small_models.images(8), 0.5)}, labels=None, name="blank")
    report = validate(small_models.compressed(), write(tmp_path), samples)
    assert report.sqnr_db is None
    assert all(output.sqnr_db is None and output.constant for output in report.outputs.values())
