"""Integer compute end to end on one small net: formats, widths, schemes, free offsets, what validate must not pass."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qcompress.artifacts import ActivationGrid
from qcompress.data.dataset import Dataset
from qcompress.errors import ConfigError
from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.settings import PosthocSettings
from qcompress_exporters import build, validate
from qcompress_exporters.onnx_format import file as onnx_file
from qcompress_exporters.onnx_format.int8.stepped_biases import stepped
from qcompress_exporters.onnx_format.lower import serialize
from qcompress_exporters.parity import validate as parity
from qcompress_exporters.parity.decode import signed
from qcompress_exporters.parity.sessions import optimized_ops, run, session
from tests.helpers import small_models
from tests.helpers.nets import image, randomized, traced
from tests.helpers.saturation import model_exact_here


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (parity, onnx_file):
        monkeypatch.setattr(module, "trace", small_models.trace_once)


def calibration(samples: int = 32) -> Dataset:
    return Dataset(inputs={"x": small_models.images(samples, seed=1)}, name="c.npz")


def compressed(bits: int = 8, activation_bits: int = 8, scheme: str = "uniform"):
    plan = Plan.from_flags(bits=bits, scheme=scheme, activation_bits=activation_bits)
    return model_exact_here(compress_program(small_models.program(), plan, calibration=calibration()))


def checked(model, tmp_path: Path, **options: str):
    path = tmp_path / "net.onnx"
    built = build(model, **options)
    built.write(path, force=True)
    report = validate(model.program, path, Dataset(inputs={"x": small_models.images(64)}, name="x.npz"))
    return built, report


@pytest.mark.parametrize("form", ["qdq", "integer"])
@pytest.mark.parametrize(
    ("bits", "activation_bits", "scheme"),
    [(8, 8, "uniform"), (8, 8, "palette"), (4, 8, "palette"), (2, 8, "uniform"), (7, 4, "uniform"), (2, 2, "palette")],
)
def test_a_file_agrees_with_torch_code_by_code(bits, activation_bits, scheme, form, tmp_path):
    built, report = checked(compressed(bits, activation_bits, scheme), tmp_path, format=form)
    assert report.ok, [c for c in report.checks if not c.ok]
    assert {layer.compute for layer in built.report.layers} == {"int8"}
    assert {c.name for c in report.checks if "activations" in c.detail} == {"graph"}


@pytest.mark.parametrize("form", ["qdq", "integer"])
def test_onnxruntime_computes_every_layer_in_integers(form):
    ops = optimized_ops(build(compressed(), format=form).data)
    assert ops["QLinearConv"] == 3
    assert not ops["Conv"] + ops["Gemm"] + ops["FusedConv"]
    assert ops["QLinearAdd"] == 1
    assert ops["QGemm"] + ops["MatMulInteger"] + ops["MatMulIntegerToFloat"] == 1


@pytest.mark.slow
def test_the_widths_of_a_scheme_run_the_same_operators():
    ops = [optimized_ops(build(compressed(b, 8, s)).data) for b in (8, 4, 2) for s in ("palette", "uniform")]
    assert all(found == ops[0] for found in ops)


class MixConv(nn.Module):
    """Two mixed depthwise convolutions between plain ones: a BatchNorm follows each concatenation."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 8, 1)
        self.parts = nn.ModuleList(nn.Conv2d(6, 6, k, padding=k // 2, groups=6, bias=False) for k in (3, 5))
        self.more = nn.ModuleList(nn.Conv2d(4, 6, k, padding=k // 2, groups=2) for k in (3, 1))
        self.norm, self.norm2, self.head = nn.BatchNorm2d(12), nn.BatchNorm2d(12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = self.norm(torch.cat([f(part) for f, part in zip(self.parts, x.chunk(2, 1), strict=True)], 1)).relu()
        x = self.down(x)
        x = self.norm2(torch.cat([f(part) for f, part in zip(self.more, x.chunk(2, 1), strict=True)], 1)).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("form", ["qdq", "integer"])
def test_joined_convolutions_leave_no_batchnorm_between_integer_layers(form, tmp_path):
    program = traced(randomized(MixConv()), x=image())
    data = Dataset(inputs={"x": image(32, seed=1)}, name="c.npz")
    model = compress_program(program, Plan.from_flags(bits=8, activation_bits=8), calibration=data)
    built = build(model_exact_here(model), format=form)
    assert {layer.compute for layer in built.report.layers} == {"int8"}
    assert not [note for note in built.report.notes if "BatchNormalization" in note]
    ops = optimized_ops(built.data)
    assert ops["QLinearConv"] == 6
    assert ops["QLinearConcat"] == 2
    assert not ops["BatchNormalization"] + ops["Conv"] + ops["FusedConv"]
    built.write(tmp_path / "net.onnx")
    report = validate(program, tmp_path / "net.onnx", Dataset(inputs={"x": image(64, seed=2)}, name="x.npz"))
    assert report.ok, [c for c in report.checks if not c.ok]


def test_weights_are_packed():
    eight, two = (build(compressed(bits)).report.size for bits in (8, 2))
    weights = 8 * 3 * 9 + 2 * 8 * 8 * 9 + 8 * 5
    tables = 4 * 4  # of the 2-bit weights, for finer steps of their biases
    assert eight.ideal - two.ideal == pytest.approx(weights * 6 / 8 - tables, abs=8)
    assert two.payload < two.ideal + 200


@pytest.mark.parametrize("what", ["left.weight", "left.weight_scale", "left.bias"])
def test_a_changed_tensor_fails(what, tmp_path):
    model = compressed()
    path = tmp_path / "net.onnx"
    built = build(model)
    proto = onnx.load_from_string(built.data)
    value = signed(proto)[what].value
    assert (value == what) == (what != "left.weight_scale")  # of the names only those of the model's tensors stay
    tensor = next(t for t in proto.graph.initializer if t.name == value)
    data = bytearray(tensor.raw_data)
    data[0] ^= 1
    tensor.raw_data = bytes(data)
    path.write_bytes(serialize(proto, {p.key: p.value for p in proto.metadata_props}))
    report = validate(model.program, path, Dataset(inputs={"x": small_models.images(64)}, name="x.npz"))
    assert [c.name for c in report.checks if not c.ok] == ["weights"]
    assert what in report.checks[0].detail


@pytest.mark.parametrize("form", ["qdq", "integer"])
@pytest.mark.parametrize("part", ["scale", "zero point", "metadata"])
def test_a_changed_grid_fails_and_is_named(part, form, tmp_path):
    model = compressed()
    proto = onnx.load_from_string(build(model, format=form).data)
    metadata = {p.key: p.value for p in proto.metadata_props}
    if part == "metadata":
        first, *rest = metadata["qcompress.grids"].split()
        metadata["qcompress.grids"] = " ".join([*rest, first])
    else:
        node = next(n for n in proto.graph.node if n.output[0] == "q0")
        name = node.input[1 if part == "scale" else 2]
        tensor = next(t for t in proto.graph.initializer if t.name == name)
        value = onnx.numpy_helper.to_array(tensor)
        changed = value * np.float32(1 + 2**-20) if part == "scale" else value ^ np.uint8(1)
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(changed), name))
    path = tmp_path / "net.onnx"
    path.write_bytes(serialize(proto, metadata))
    report = validate(model.program, path, Dataset(inputs={"x": small_models.images(64)}, name="x.npz"))
    (weights,) = (c for c in report.checks if (c.name, c.session) == ("weights", "exact"))
    assert not weights.ok
    assert re.search(r"grids differ from what was compressed: .*\bx\b", weights.detail)


def with_offset(model, site: tuple[str, int], share: float):
    """The model with that site's offset moved off its grid by a share of a step."""
    grid = model.activations[site]
    offset = np.asarray(np.float32(grid.offset + np.float32(share) * grid.scale))
    moved = ActivationGrid(site=site, scale=grid.scale, offset=offset, bits=grid.bits, signed=False)
    assert moved.zero_point is None
    return dataclasses.replace(model, activations={**model.activations, site: moved})


def reference(model, x):
    """What the file's artifacts say, in torch: every site through its grid, padding with real zeros."""
    from qcompress.graph.marks import MarkedRunner, mark, rounding

    state = {n: a.dequantize() for n, a in stepped(model).artifacts.items()}
    marked = mark(model.program.with_state(state), model.activations)
    return MarkedRunner(marked)({"x": x}, rounding(list(model.activations.values())))["output"]


class OneLayer(nn.Module):
    def __init__(self, padding: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3, padding=padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu()


@pytest.mark.parametrize("form", ["qdq", "integer"])
@pytest.mark.parametrize("share", [0.4, -0.3])
@pytest.mark.parametrize(("padding", "offset"), [(0, "folded"), (1, "added")])
def test_a_free_offset_is_folded_where_that_is_exact(padding, offset, share, form):
    x = image(16, shape=(3, 9, 9))
    program = traced(OneLayer(padding).eval(), x=x[:2])
    model = compress_program(
        program, Plan.from_flags(bits=8, scheme="uniform", activation_bits=8), calibration=Dataset(inputs={"x": x})
    )
    model = with_offset(model_exact_here(model), ("x", -1), share)
    built = build(model, format=form)
    assert [layer.offset for layer in built.report.layers] == [offset]
    got, wanted = run(session(built.data, "deployed"), {"x": x})["output"], reference(model, x)
    step = float(model.activations["relu", -1].scale)
    off = np.rint(np.abs(got - wanted) / step)
    assert off.max() <= 1
    assert np.count_nonzero(off) <= 1e-4 * off.size + 3


class FloatInTheMiddle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x).relu()).relu())


def test_a_layer_left_in_float_stays_float():
    from qcompress.plan.settings import Settings

    x = image(16, shape=(3, 9, 9))
    program = traced(randomized(FloatInTheMiddle()), x=x[:2])
    plan = Plan(default=Settings(bits=8, scheme="uniform", activation_bits=8), name={"middle.*": Settings(skip=True)})
    model = compress_program(program, plan, calibration=Dataset(inputs={"x": x}))
    built = build(model)
    assert {layer.weight: layer.compute for layer in built.report.layers}["middle.weight"] == "float"
    deployed = run(session(built.data, "deployed"), {"x": x})["output"]
    without = run(session(built.data, "deployed", without=["WeightBiasQuantization"]), {"x": x})["output"]
    assert deployed.tobytes() == without.tobytes()
    assert optimized_ops(built.data)["QLinearConv"] == 2


@pytest.mark.parametrize(("bits", "scheme"), [(8, "uniform"), (4, "palette"), (2, "uniform")])
def test_dynamic8_needs_no_data(bits, scheme, tmp_path):
    model = compress_program(
        small_models.program(),
        Plan.from_flags(bits=bits, scheme=scheme),
        PosthocSettings(compute="dynamic8", effort="fast"),
    )
    built, report = checked(model_exact_here(model), tmp_path)
    assert report.ok, [c for c in report.checks if not c.ok]
    assert {layer.weight: layer.compute for layer in built.report.layers}["head.weight"] == "dynamic8"
    assert optimized_ops(built.data)["DynamicQuantizeMatMul"] == 1


def test_int8_without_data_or_widths_is_refused():
    with pytest.raises(ConfigError, match="--calibration"):
        compress_program(small_models.program(), Plan.from_flags(bits=8, activation_bits=8))
    plan, dynamic = Plan.from_flags(bits=8, activation_bits=8), PosthocSettings(compute="dynamic8")
    with pytest.raises(ConfigError, match="--activation-bits 8"):
        compress_program(
            small_models.program(), Plan.from_flags(bits=8), PosthocSettings(compute="int8"), calibration=calibration()
        )
    with pytest.raises(ConfigError, match="at run time"):
        compress_program(small_models.program(), plan, dynamic, calibration=calibration())
    with pytest.raises(ConfigError, match="format must be one of onnx, qdq, integer"):
        build(compressed(), format="int")


class Branches(nn.Module):
    """One value for two layers and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.a(x).relu()
        return self.b(x) + self.c(x) + x


@pytest.mark.parametrize("form", ["qdq", "integer"])
def test_sites_of_one_value_are_checked_each(form, tmp_path):
    x = image(16)
    program = traced(randomized(Branches()), x=x[:2])
    plan, data = Plan.from_flags(bits=8, activation_bits=8), Dataset(inputs={"x": x}, name="x.npz")
    settings = PosthocSettings(placement="paper")
    small = model_exact_here(compress_program(program, plan, settings, calibration=data))
    assert [site for site, _ in small.activations] == ["x", "b.weight", "c.weight"]
    built = build(small, format=form)
    built.write(tmp_path / "net.onnx")
    report = validate(program, tmp_path / "net.onnx", data)
    assert report.ok, [c for c in report.checks if not c.ok]


@pytest.mark.parametrize("compute", ["int8", "dynamic8"])
def test_reduce_range_leaves_no_sum_that_saturates_without_vnni(compute):
    widths = {"bits": 8, "scheme": "uniform"} | ({"activation_bits": 8} if compute == "int8" else {})
    shares, data = [], calibration() if compute == "int8" else None
    for reduce_range in (False, True):
        settings = PosthocSettings(compute=compute, reduce_range=reduce_range)
        model = compress_program(small_models.program(), Plan.from_flags(**widths), settings, calibration=data)
        shares.append({r.weight: r.saturation for r in build(model).report.layers if r.compute != "float"})
    assert shares[0].keys() == ({f"{n}.weight" for n in small_models.LAYERS} if compute == "int8" else {"head.weight"})
    assert 0 < min(shares[0].values()) < max(shares[0].values()) <= 1 or compute == "dynamic8"
    assert set(shares[1].values()) == {0.0}


@pytest.mark.parametrize(("spread", "ndim"), [(1.0, 0), (8.0, 1)])
def test_dynamic8_palettes_have_one_scale_unless_channels_differ(spread, ndim):
    module = nn.Linear(32, 16).eval()
    with torch.no_grad():
        module.weight[::2] *= spread
    small = compress_program(
        traced(module, x=np.zeros((2, 32), np.float32)), Plan.from_flags(bits=4), PosthocSettings(compute="dynamic8")
    )
    assert small.artifacts["weight"].scale.ndim == ndim
