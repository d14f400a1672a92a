"""Which codes a plan allows, and which of two schemes is the better."""

import functools

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qcompress.artifacts import IntegerWeight, PalettizedWeight
from qcompress.data.dataset import Dataset
from qcompress.errors import ConfigError
from qcompress.graph.tensors import program_tensors
from qcompress.palettes.even_grid import round_to_nearest
from qcompress.plan.plan import Plan
from qcompress.plan.resolve import resolve
from qcompress.posthoc.compress import compress, compress_program
from qcompress.posthoc.schemes import better, codes_for
from qcompress.posthoc.settings import PosthocSettings
from qcompress_exporters import build
from qcompress_exporters.onnx_format import file as onnx_file
from qcompress_exporters.parity.decode import decoded, mismatches
from tests.helpers import small_models
from tests.helpers.nets import traced


@pytest.fixture(autouse=True)
def _trace_once(monkeypatch):
    monkeypatch.setattr(onnx_file, "trace", small_models.trace_once)


def linear(weight: np.ndarray) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
    return layer.eval()


def program_of(weight: np.ndarray):
    return traced(linear(weight), x=np.zeros((2, weight.shape[1]), np.float32))


@pytest.mark.parametrize(
    ("settings", "integer", "wanted"),
    [
        ({"scheme": "palette", "bits": 4}, False, ("palette",)),
        ({"scheme": "palette", "bits": 4}, True, ("int8 palette",)),
        ({"scheme": "palette", "bits": 8}, True, ("uniform",)),
        ({"scheme": "palette", "bits": 8, "rows_per_lut": 1}, True, ("int8 palette",)),
        ({"scheme": "uniform", "bits": 4}, False, ("uniform",)),
        ({"scheme": "auto", "bits": 4}, False, ("palette", "uniform")),
        ({"scheme": "auto", "bits": 4}, True, ("int8 palette", "uniform")),
        ({"scheme": "auto", "bits": 1}, False, ("palette",)),
        ({"lut_dtype": "float16", "bits": 4}, False, ("palette",)),
        ({"lut_dtype": "float16", "bits": 4}, True, ("palette",)),
        ({"lut_dtype": "float32", "bits": 4}, True, ("palette",)),
        ({"lut_dtype": "int8", "bits": 4}, False, ("int8 palette",)),
        ({"lut_dtype": "int8", "bits": 8}, False, ("uniform",)),
        ({"lut_dtype": "int8", "bits": 4, "scheme": "auto"}, False, ("int8 palette", "uniform")),
        ({"lut_dtype": "int8", "bits": 4, "vector_dim": 2}, True, ("vectors",)),
    ],
)
def test_what_a_plan_allows(settings, integer, wanted):
    program = program_of(np.ones((4, 4), np.float32))
    (tensor,) = resolve(Plan.from_flags(**settings), program_tensors(program)).compressed
    assert codes_for(tensor, integer=integer) == wanted


def test_a_bit_for_each_weight_is_worth_6_db():
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    narrow, wide = (round_to_nearest(weight, bits) for bits in (4, 5))
    assert wide.nbytes - narrow.nbytes == 8 * 64 / 8
    assert better([(narrow, 1.0), (wide, 0.25 * 1.01)]) is narrow
    assert better([(narrow, 1.0), (wide, 0.25 * 0.99)]) is wide
    assert better([(narrow, 0.0), (wide, 0.0)]) is narrow


random = np.random.default_rng(0)
WEIGHTS = {
    # what spreads evenly needs no table; clusters do
    "even": (random.uniform(-1, 1, (4, 256)).astype(np.float32), IntegerWeight),
    "clusters": (
        (random.choice([-3, -1, 0.2, 0.7], (16, 256)) + random.normal(0, 0.01, (16, 256))).astype(np.float32),
        PalettizedWeight,
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_auto_takes_the_better_one(name, effort):
    weight, wanted = WEIGHTS[name]
    data = Dataset(inputs={"x": np.random.default_rng(1).standard_normal((256, weight.shape[1])).astype(np.float32)})
    given = data if effort == "balanced" else None
    plan = Plan.from_flags(bits=2 if name == "clusters" else 4, scheme="auto")
    found = compress_program(program_of(weight), plan, PosthocSettings(effort=effort), calibration=given)
    assert isinstance(found.artifacts["weight"], wanted)


@pytest.mark.parametrize("vector_dim", [2, 4, 8])
def test_vectors_from_a_plan_to_a_file(vector_dim):
    weight = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32)
    size = np.random.default_rng(1).lognormal(0, 1, 64).astype(np.float32)
    x, new = (np.random.default_rng(s).standard_normal((256, 64)).astype(np.float32) * size for s in (2, 3))
    program, plan = program_of(weight), Plan.from_flags(bits=4, vector_dim=vector_dim)
    small = {
        effort: compress_program(
            program, plan, PosthocSettings(effort=effort), calibration=Dataset(inputs={"input": x})
        )
        for effort in ("fast", "balanced")
    }
    errors = [np.square((m.artifacts["weight"].dequantize() - weight) @ new.T).sum() for m in small.values()]
    assert errors[1] < 0.95 * errors[0]
    artifact = small["balanced"].artifacts["weight"]
    assert (artifact.vector_dim, artifact.bits) == (vector_dim, 4)
    assert artifact.nbytes == 48 * 64 * 4 // vector_dim // 8 + 16 * vector_dim * 4
    built = build(small["balanced"])
    assert mismatches(onnx.load_from_string(built.data), decoded(onnx.load_from_string(built.data))) == []


def test_vectors_are_refused_where_they_cannot_be():
    program = program_of(np.ones((3, 5), np.float32))
    for other, value in (("scheme", "uniform"), ("rows_per_lut", 2)):
        with pytest.raises(ConfigError, match=rf"vector_dim = 2 \(--vector-dim\) .* {other} = "):
            compress_program(
                program, Plan.from_flags(bits=4, vector_dim=2, **{other: value}), PosthocSettings(effort="fast")
            )
    with pytest.raises(ConfigError, match="--vector-dim must be 1, 2, 4 or 8, got 3"):
        Plan.from_flags(bits=4, vector_dim=3)


def test_vectors_beside_int8_layers_compute_in_float():
    program = program_of(np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32))
    data = Dataset(inputs={"input": np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)})
    small = compress_program(program, Plan.from_flags(bits=4, vector_dim=2, activation_bits=8), calibration=data)
    (layer,) = build(small).report.layers
    assert (layer.compute, bool(layer.why)) == ("float", True)


def test_blocks_from_a_plan_to_a_file():
    random = np.random.default_rng(0)
    weight = (random.standard_normal((48, 70)) * random.lognormal(0, 1, 70)).astype(np.float32)
    mix = random.standard_normal((70, 70)) + 8 * np.eye(70)
    x, new = ((np.random.default_rng(s).standard_normal((512, 70)) @ mix).astype(np.float32) for s in (2, 3))

    def error(effort, **words):
        plan, data = Plan.from_flags(bits=3, scheme="uniform", **words), Dataset(inputs={"input": x})
        small = compress_program(program_of(weight), plan, PosthocSettings(effort=effort), calibration=data)
        return small, np.square((small.artifacts["weight"].dequantize() - weight) @ new.T).sum()

    (_, nearest), (small, solved) = (error(effort, block_size=16) for effort in ("fast", "balanced"))
    assert solved < 0.75 * nearest
    assert solved < 0.5 * error("balanced")[1]
    artifact = small.artifacts["weight"]
    assert (artifact.axis, artifact.block_size, artifact.scale.shape) == (1, 16, (48, 5))
    assert artifact.nbytes == 48 * 70 * 3 // 8 + 48 * 5 * 4
    for target in ("1.16", "1.20", "1.24"):
        decodes(small, target)


def decodes(small, target="1.24"):
    built = build(small, target=f"onnxruntime=={target}")
    model = onnx.load_from_string(built.data)
    assert mismatches(model, decoded(model)) == []
    assert built.report.size.ideal == small.nbytes
    assert built.report.size.file == len(built.data)
    return built


class Words(nn.Module):
    """An embedding, and a product with W[in, out]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 20)
        self.weight = nn.Parameter(torch.randn(20, 24))

    def forward(self, x):
        return self.embed(x) @ self.weight


@functools.cache
def words():
    return traced(Words().eval(), x=np.arange(12).reshape(2, 6))


@pytest.mark.parametrize("bits", range(2, 9))
def test_blocks_of_embeddings_and_of_products_with_inputs_first(bits):
    program = words()
    plan = Plan.from_flags(bits=bits, scheme="uniform", block_size=8)
    small = compress_program(program, plan, calibration=Dataset(inputs={"x": np.arange(24).reshape(4, 6)}))
    found = {name: (a.axis, a.scale.shape) for name, a in small.artifacts.items()}
    assert found == {"embed.weight": (1, (30, 3)), "weight": (0, (3, 24))}
    for target in ("1.16", "1.20", "1.24"):
        decodes(small, target)


def test_blocks_beside_int8_layers_compute_in_float():
    program = program_of(np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32))
    data = Dataset(inputs={"input": np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)})
    plan = Plan.from_flags(bits=4, scheme="uniform", block_size=16, activation_bits=8)
    small = compress_program(program, plan, calibration=data)
    assert small.artifacts["weight"].block_size == 16
    (layer,) = build(small).report.layers
    assert (layer.compute, layer.why) == ("float", "its grid has blocks, a zero point, or codes above 127")


@pytest.mark.parametrize("name", WEIGHTS)
def test_auto_has_blocks_in_its_even_grids_alone(name):
    weight, wanted = WEIGHTS[name]
    plan = Plan.from_flags(bits=2 if name == "clusters" else 4, scheme="auto", block_size=128)
    artifact = compress_program(program_of(weight), plan, PosthocSettings(effort="fast")).artifacts["weight"]
    assert isinstance(artifact, wanted)
    assert getattr(artifact, "block_size", None) == (128 if wanted is IntegerWeight else None)


def test_vectors_that_do_not_divide_a_weight_are_filled_up():
    weight = np.random.default_rng(0).standard_normal((37, 45)).astype(np.float32)
    x = np.random.default_rng(2).standard_normal((128, 45)).astype(np.float32)
    for effort in ("fast", "balanced"):
        plan = Plan.from_flags(bits=3, vector_dim=4)
        small = compress_program(
            program_of(weight), plan, PosthocSettings(effort=effort), calibration=Dataset(inputs={"input": x})
        )
        artifact = small.artifacts["weight"]
        assert (artifact.vector_dim, artifact.codes.shape) == (4, (417,))
        for target in ("1.16", "1.20", "1.24"):
            decodes(small, target)


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_small_palettes_of_fewer_bits_make_a_smaller_file(effort):
    random = np.random.default_rng(0)
    weight = random.standard_normal((64, 70)).astype(np.float32)
    mix = random.standard_normal((70, 70)) + 8 * np.eye(70)
    x, new = ((np.random.default_rng(s).standard_normal((512, 70)) @ mix).astype(np.float32) for s in (2, 3))
    nbytes, errors = {}, {}
    for lut_dtype in ("float32", "float16", "int8"):
        plan = Plan.from_flags(bits=4, rows_per_lut=4, lut_dtype=lut_dtype)
        data = Dataset(inputs={"input": x})
        small = compress_program(program_of(weight), plan, PosthocSettings(effort=effort), calibration=data)
        artifact = small.artifacts["weight"]
        assert artifact.lut.dtype == lut_dtype
        assert artifact.nbytes == 64 * 70 // 2 + 16 * 16 * artifact.lut.itemsize + (
            0 if artifact.scale is None else artifact.scale.nbytes
        )
        nbytes[lut_dtype] = [decodes(small, target).report.size.file for target in ("1.16", "1.24")]
        errors[lut_dtype] = np.square((artifact.dequantize() - weight) @ new.T).sum()
    assert nbytes["int8"][1] < nbytes["float16"][1] < nbytes["float32"][1] - 400
    assert nbytes["float16"][0] < nbytes["float32"][0] - 400
    assert errors["float16"] < 1.02 * errors["float32"]
    assert errors["int8"] < 1.1 * errors["float32"]


@pytest.mark.parametrize("lut_dtype", ["float16", "int8"])
@pytest.mark.parametrize("vector_dim", [1, 4])
@pytest.mark.parametrize("bits", [1, 3, 4, 7])
def test_every_table_decodes(lut_dtype, vector_dim, bits):
    weight = np.random.default_rng(bits).standard_normal((37, 45)).astype(np.float32)
    plan = Plan.from_flags(bits=bits, lut_dtype=lut_dtype, vector_dim=vector_dim)
    small = compress_program(program_of(weight), plan, PosthocSettings(effort="fast"))
    for target in ("1.16", "1.24"):
        decodes(small, target)


def test_palettes_of_floats_beside_int8_layers_compute_in_float():
    program = program_of(np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32))
    data = Dataset(inputs={"input": np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)})
    plan = Plan.from_flags(bits=4, lut_dtype="float16", activation_bits=8)
    (layer,) = build(compress_program(program, plan, calibration=data)).report.layers
    assert (layer.compute, layer.why) == ("float", "its palette is not on an int8 grid")


def test_at_8_bits_a_weight_too_small_for_a_table_takes_an_even_grid():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 16), nn.Linear(16, 2)).eval()
    small = compress(net, Plan.from_flags(bits=8), example_inputs=(torch.randn(2, 20),), effort="fast")
    first, second = (small.artifacts[f"{i}.weight"] for i in (0, 1))
    assert (first.kind, first.nbytes) == ("uniform", 20 * 16 + 4 * 16)
    assert second.reason.startswith("too small")
    assert (
        compress(net, Plan.from_flags(bits=6), example_inputs=(torch.randn(2, 20),)).artifacts["0.weight"].kind
        == "palette"
    )


@pytest.mark.parametrize("vector_dim", [1, 2])
@pytest.mark.parametrize(("largest", "dtype"), [(1e4, np.float16), (1e8, np.float32)])
def test_palettes_that_float16_cannot_hold_have_wider_entries(largest, dtype, vector_dim):
    net = nn.Linear(64, 32)
    with torch.no_grad():
        net.weight[3, 5] = largest
    plan = Plan.from_flags(bits=4, lut_dtype="float16", vector_dim=vector_dim)
    small = compress(net.eval(), plan, example_inputs=(torch.zeros(2, 64),), effort="fast")
    assert small.artifacts["weight"].lut.dtype == dtype
    assert any("float32 entries" in note and "weight" in note for note in small.notes) == (dtype == np.float32)
    wanted, got = net.weight.detach().numpy(), small.artifacts["weight"].dequantize()
    rest = np.arange(64 * 32).reshape(32, 64) // 2 != (3 * 64 + 5) // 2
    assert np.square(got - wanted)[rest].mean() < 0.3 * np.square(wanted)[rest].mean()
