"""Whole files: what is in them, how large they are, that onnxruntime runs them as it runs the float file."""

import functools
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn

from qcompress.artifacts import FloatWeight, PalettizedWeight
from qcompress.errors import ConfigError, OutputError, SourceError
from qcompress.graph.program import FloatProgram
from qcompress.plan.plan import Plan
from qcompress.plan.settings import Settings
from qcompress.posthoc.compress import compress, compress_program
from qcompress.posthoc.settings import PosthocSettings
from qcompress_exporters import build, export
from qcompress_exporters.onnx_format import file as onnx_file
from qcompress_exporters.onnx_format.file import float_file, float_file_nbytes
from qcompress_exporters.onnx_format.lower import lower
from qcompress_exporters.onnx_format.metadata import read
from qcompress_exporters.onnx_format.trace import trace
from qcompress_exporters.parity.sessions import optimized_ops, run, session
from tests.helpers import small_models
from tests.helpers.nets import Residual, image, randomized, residual, seeded, sentences, tied, traced


class Wide(nn.Module):
    """Large enough for bytes to count."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(32)
        self.b = nn.Conv2d(32, 32, 3)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.bn(self.a(x)).relu()).relu().mean((2, 3)))


@functools.cache
def wide() -> FloatProgram:
    return seeded(Wide, x=image())


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "trace", small_models.trace_once)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_runs_exactly_as_the_float_file_with_its_weights(bits: int) -> None:
    small = compress_program(wide(), Plan.from_flags(bits=bits), PosthocSettings(effort="fast"))
    built = build(small)
    onnx.checker.check_model(onnx.load_from_string(built.data), full_check=True)
    graph = small_models.trace_once(small.program)
    dequantized = {n: FloatWeight(values=a.dequantize(), reason="") for n, a in small.artifacts.items()}
    reference = lower(graph, dequantized, built.report.opset, sign=False).serialize()
    feeds = {"x": image(4, seed=1)}
    got, wanted = (run(session(data, "deployed"), feeds)["output"] for data in (built.data, reference))
    assert got.tobytes() == wanted.tobytes()
    assert optimized_ops(built.data) == optimized_ops(float_file(graph, small.program.state()))
    module = small.to_module()
    np.testing.assert_allclose(got, module(torch.from_numpy(feeds["x"])).detach().numpy(), atol=1e-4)


def test_files_shrink_with_every_bit_and_stay_near_the_ideal() -> None:
    program = wide()
    sizes = {
        bits: build(compress_program(program, Plan.from_flags(bits=bits), PosthocSettings(effort="fast"))).report.size
        for bits in range(1, 9)
    }
    assert [s.file for s in sizes.values()] == sorted({s.file for s in sizes.values()})
    assert all(s.overhead < 3000 for s in sizes.values())
    assert all(s.ideal <= s.payload <= s.file for s in sizes.values())


@pytest.mark.parametrize("target", ["onnxruntime==1.18", "onnxruntime==1.23", "onnxruntime==1.24"])
@pytest.mark.parametrize("rows_per_lut", [None, 3, 4])
def test_targets_and_granularities(target: str, rows_per_lut: int | None) -> None:
    plan = Plan(
        default=Settings(bits=3, rows_per_lut=rows_per_lut or "auto"),
        kind={"depthwise": Settings(bits=5), "last": Settings(bits=4)},
    )
    small = compress_program(residual(), plan, PosthocSettings(effort="fast"))
    built = build(small, target=target)
    wanted = small.to_module()(torch.from_numpy(image(5))).detach().numpy()
    got = run(session(built.data, "deployed"), {"x": image(5)})["output"]
    np.testing.assert_allclose(got, wanted, atol=1e-5 * max(1.0, float(np.abs(wanted).max())))
    assert built.report.opset <= {"onnxruntime==1.18": 18, "onnxruntime==1.23": 21, "onnxruntime==1.24": 25}[target]


def test_tied_weights_are_stored_once_and_stay_tied() -> None:
    small = compress_program(tied(), Plan.from_flags(bits=4))
    built = build(small)
    assert [n for n in small.artifacts if "embed" in n or "head" in n] == ["embed.weight"]
    got = run(session(built.data, "deployed"), sentences(2, seed=5))
    wanted = small.program.with_state({n: a.dequantize() for n, a in small.artifacts.items()}).run(sentences(2, seed=5))
    for name in ("logits", "hidden"):
        np.testing.assert_allclose(got[name], wanted[name], atol=1e-4)


def test_the_same_input_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "trace", trace)
    net = randomized(Residual())
    files = [
        build(compress_program(traced(net, x=image()), Plan.from_flags(bits=3), PosthocSettings(effort="fast"))).data
        for _ in range(2)
    ]
    assert files[0] == files[1]


def test_a_plan_stores_single_weights_as_float16() -> None:
    fast = PosthocSettings(effort="fast")
    nbytes = {}
    for skip in (True, "float16"):
        plan = Plan(default=Settings(bits=2), name={"right.weight": Settings(skip=skip)})
        small = compress_program(small_models.program(), plan, fast)
        report = build(small).report
        nbytes[skip] = report.size.payload
        assert [t.name for t in report.tensors if t.encoding == "float16"] == ["right.weight"] * (skip == "float16")
    assert nbytes["float16"] == nbytes[True] - 2 * 8 * 8 * 9
    assert small.artifacts["right.weight"].reason == 'by plan ([name."right.weight"]), as float16'
    weight = small.program.state()["right.weight"].detach().numpy()
    np.testing.assert_array_equal(small.artifacts["right.weight"].dequantize(), weight.astype(np.float16))


def test_nothing_of_the_machine_or_of_torch_is_in_the_file() -> None:
    data = build(compress_program(residual(), Plan.from_flags(bits=2), PosthocSettings(effort="fast"))).data
    for word in (b"pkg.torch", str(Path.cwd()).encode(), b".py", b"site-packages"):
        assert word not in data


def test_metadata_says_what_the_gate_needs(tmp_path: Path) -> None:
    small = compress_program(wide(), Plan.from_flags(bits=2), PosthocSettings(effort="fast"), source_digest="abc")
    report = export(small, tmp_path / "net.onnx")
    file = read(tmp_path / "net.onnx")
    assert file.is_ours
    assert file.nbytes == report.size.file
    assert file.original_bytes == report.size.original == len(float_file(trace(small.program), small.program.state()))
    assert file.metadata["qcompress.target"] == "portable"
    assert file.metadata["qcompress.source"] == "abc"
    assert file.metadata["qcompress.plan"] == small.plan_digest


def test_float16_leftovers_take_half_and_are_exact_in_float16() -> None:
    small = compress_program(wide(), Plan.from_flags(bits=2), PosthocSettings(effort="fast"))
    full, half = build(small), build(small, float_leftovers="float16")
    assert half.report.size.file < full.report.size.file
    assert {t.encoding for t in half.report.left_in_float} == {"float16", "float32"}  # the head's 10 biases pay nothing
    with pytest.raises(ConfigError, match=r"float_leftovers must be float32 or float16, got 'int8'\."):
        build(small, float_leftovers="int8")  # type: ignore[arg-type]


def test_a_weight_that_gains_nothing_stays_float_with_the_reason() -> None:
    small = compress(nn.Linear(4, 4).eval(), Plan.from_flags(bits=8), example_inputs=(torch.zeros(1, 4),))
    artifact = small.artifacts["weight"]
    assert isinstance(artifact, FloatWeight)
    assert artifact.reason == "too small: 80 bytes at 8 bits, 64 in float"


def test_few_distinct_values_take_fewer_bits() -> None:
    net = nn.Linear(32, 32).eval()
    nn.init.constant_(net.weight, 0.5)
    artifact = compress(net, Plan.from_flags(bits=6), example_inputs=(torch.zeros(1, 32),)).artifacts["weight"]
    assert isinstance(artifact, PalettizedWeight)
    assert (artifact.bits, artifact.lut.tolist()) == (1, [[0.5]])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_layer(value: float) -> None:
    net = randomized(Residual())
    with torch.no_grad():
        net.grouped.weight[0, 0, 0, 0] = value
    with pytest.raises(SourceError, match=r"grouped\.weight must be finite, but 1 of its 288 values are NaN or Inf"):
        compress_program(traced(net, x=image()), Plan.from_flags(bits=2), PosthocSettings(effort="fast"))


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    small = compress(nn.Linear(4, 4).eval(), Plan.from_flags(bits=2), example_inputs=(torch.zeros(1, 4),))
    path = tmp_path / "net.onnx"
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"exists: name another file with -o, or replace it with --force\."):
        export(small, path)
    assert path.read_bytes() == b"mine"
    export(small, path, force=True)
    assert read(path).is_ours


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("tensorrt==10", r"$"),
        ("onnxruntime==1.2", r" Did you mean onnxruntime==1\.24\?$"),
        ("onnxruntime", r" Did you mean onnxruntime==1\.24\?$"),
        ("onnxruntime>=1.24", r" Did you mean onnxruntime==1\.24\?$"),
        ("portabel", r" Did you mean portable\?$"),
        ("openVINO", r" Did you mean openvino\?$"),
    ],
)
def test_unknown_targets(target: str, hint: str) -> None:
    small = compress(nn.Linear(4, 4).eval(), Plan.from_flags(bits=2), example_inputs=(torch.zeros(1, 4),))
    known = r"^target must be portable, onnxruntime==1\.16 or later, openvino or web, got "
    with pytest.raises(ConfigError, match=rf"{known}{re.escape(repr(target))}\.{hint}"):
        build(small, target=target)


@pytest.mark.parametrize("target", [None, "portable", "openvino", "web", "onnxruntime==1.16", "1.18"])
@pytest.mark.parametrize("bits", [1, 3, 4, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (2, 5, 6, 7, 8))])
def test_portable_files_hold_no_type_below_8_bits(bits: int, target: str | None) -> None:
    small = compress_program(wide(), Plan.from_flags(bits=bits), PosthocSettings(effort="fast"))
    built = build(small, target=target)
    model = onnx.load_from_string(built.data)
    onnx.checker.check_model(model, full_check=True)
    assert [o.version for o in model.opset_import] == [built.report.opset] == [18]
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {t.data_type for t in inferred.initializer} | {v.type.tensor_type.elem_type for v in inferred.value_info}
    assert not types & {TensorProto.UINT4, TensorProto.INT4, TensorProto.UINT2, TensorProto.INT2}
    wanted = small.to_module()(torch.from_numpy(image(3))).detach().numpy()
    np.testing.assert_allclose(run(session(built.data, "deployed"), {"x": image(3)})["output"], wanted, atol=1e-4)


def test_native_types_are_for_targets_that_read_them_and_only_where_they_pay() -> None:
    two = compress_program(wide(), Plan.from_flags(bits=2), PosthocSettings(effort="fast"))
    for target, opset, encoding in (("1.24", 25, "native"), ("1.23", 18, "words"), ("portable", 18, "words")):
        report = build(two, target=target).report
        weights = [t for t in report.tensors if t.artifact == "palette"]
        assert (report.opset, {t.encoding for t in weights}) == (opset, {encoding})
    assert build(two, target="1.24").report.size.file < 0.99 * build(two).report.size.file
    assert {t.why for t in weights} == {"portable allows no type of 2 bits"}
    eight = build(
        compress_program(wide(), Plan.from_flags(bits=8), PosthocSettings(effort="fast")), target="1.24"
    ).report
    assert eight.opset == 18
    assert {t.why for t in eight.tensors if t.artifact == "palette"} == {"codes pack evenly into bytes"}
    seven = build(compress_program(wide(), Plan.from_flags(bits=7), PosthocSettings(effort="fast"))).report
    assert {t.why for t in seven.tensors if t.artifact == "palette"} == {"codes do not pack evenly into bytes"}


def test_subgraphs_share_one_name_space() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda x: self.a(x) + 1, lambda x: self.b(x) * 2 + 1, (x,))

    small = compress_program(traced(Branches().eval(), x=image(shape=(16,))), Plan.from_flags(bits=2))
    active = session(build(small).data, "deployed")
    module = small.to_module()
    for x in (np.abs(image(2, shape=(16,))), -np.abs(image(2, shape=(16,)))):
        np.testing.assert_allclose(run(active, {"x": x})["output"], module(torch.from_numpy(x)).detach(), atol=1e-5)


def test_leftovers_too_small_for_float16_stay_float32() -> None:
    net = nn.Linear(64, 64).eval()
    with torch.no_grad():
        net.bias.fill_(1e-8)
    small = compress(net, Plan.from_flags(bits=2), example_inputs=(torch.zeros(1, 64),))
    assert {t.encoding for t in build(small, float_leftovers="float16").report.left_in_float} == {"float32"}


def test_the_length_of_the_float_file_is_told_without_its_bytes() -> None:
    for program in (wide(), tied()):
        graph = small_models.trace_once(program)
        assert float_file_nbytes(graph, program.state()) == len(float_file(graph, program.state()))


class Untranslated(nn.Module):
    """It ends in an operator that torch.onnx cannot write."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return torch.linalg.matrix_exp(y @ y.T)


def test_an_operator_without_a_translation_is_named_with_the_users_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "trace", trace)
    x = (torch.randn(4, 16),)
    small = compress(Untranslated().eval(), Plan.from_flags(bits=4), example_inputs=x, effort="fast")
    with pytest.raises(SourceError) as error:
        build(small)
    line = r"return torch\.linalg\.matrix_exp\(y @ y\.T\)"
    assert re.fullmatch(
        rf"torch\.onnx has no translation for aten\.linalg_matrix_exp\.default \(at .*test_file\.py:\d+: {line}\): "
        r"write that part with other operators\.",
        str(error.value),
    )
