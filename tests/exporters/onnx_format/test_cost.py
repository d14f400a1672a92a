"""What a choice costs, against the files that are really written."""

import functools
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import Phase, given
from hypothesis import strategies as st
from torch import nn

from qcompress.artifacts import Artifact, FloatWeight, IntegerWeight, PalettizedWeight, granularity
from qcompress.artifacts.integer_range import IntegerRange
from qcompress.compressed.model import CompressedModel
from qcompress.deployment import Choice, Deployment
from qcompress.errors import ConfigError
from qcompress.graph.layers import weight_layers
from qcompress.plan.plan import Plan, Settings
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.settings import PosthocSettings
from qcompress_exporters import build
from qcompress_exporters.onnx_format import file as onnx_file
from qcompress_exporters.onnx_format.targets import PORTABLE, TARGETS, find
from tests.helpers import small_models
from tests.helpers.examples import examples
from tests.helpers.nets import image, traced


class Shapes(nn.Module):
    """Weights of many shapes: odd numbers of channels, depthwise, grouped, transposed, matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Conv2d(3, 7, 1)
        self.deep = nn.Conv2d(7, 7, 3, padding=1, groups=7)
        self.wide = nn.Conv2d(7, 40, 3)
        self.grouped = nn.Conv2d(40, 20, 5, padding=2, groups=4)
        self.up = nn.ConvTranspose2d(20, 6, 2)
        self.a = nn.Linear(6, 33)
        self.b = nn.Linear(33, 130, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.wide(self.deep(self.point(x)).relu()).relu()).relu()
        return self.b(self.a(self.up(x).mean((2, 3))).relu())


@functools.cache
def model() -> CompressedModel:
    """All weights in float."""
    plan = Plan(default=Settings(bits=8), name={"*": Settings(skip=True)})
    return compress_program(traced(Shapes().eval(), x=image()), plan, PosthocSettings(effort="fast"))


@functools.cache
def weights() -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and axis of each weight by name."""
    return {name: (model().artifacts[name].shape, layer.axis) for name, layer in weight_layers(model().program).items()}


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "trace", small_models.trace_once)


@st.composite
def choices(draw: st.DrawFn, shape: tuple[int, ...]) -> Choice:
    """Any way to compress a weight of a shape."""
    kind = draw(st.sampled_from(["palette", "vectors", "uniform", "blocks", "float"]))
    bits = draw(st.integers(1 if kind in ("palette", "vectors") else 2, 8))
    lut_dtype = draw(st.sampled_from(["float32", "float16", "int8"]))
    scales = draw(st.booleans())
    if kind == "float":
        return Choice(artifact="float", bits=draw(st.sampled_from([16, 32])))
    if kind == "palette":
        rows = draw(st.none() | st.integers(1, 9))
        scales = scales or lut_dtype == "int8"
        return Choice(artifact="palette", bits=bits, rows_per_lut=rows, lut_dtype=lut_dtype, scales=scales)
    if kind == "vectors":
        dim = draw(st.sampled_from([2, 4, 8]))
        scales = scales or lut_dtype == "int8"
        return Choice(artifact="palette", bits=bits, vector_dim=dim, lut_dtype=lut_dtype, scales=scales)
    block = draw(st.integers(2, 40)) if kind == "blocks" and len(shape) == 2 else None
    return Choice(artifact="uniform", bits=bits, block_size=block, scales=scales)


def artifact(shape: tuple[int, ...], axis: int, choice: Choice, seed: int) -> Artifact:
    """Random values, compressed as a choice says."""
    random = np.random.default_rng(seed)
    if choice.artifact == "float":
        return FloatWeight(values=random.standard_normal(shape).astype(f"float{choice.bits}"), reason="for the test")
    scale_O = random.uniform(0.1, 1, shape[axis]).astype(np.float32)
    if choice.artifact == "uniform":
        limits = IntegerRange(choice.bits, True)
        codes = random.integers(limits.n, limits.p + 1, shape).astype(np.int8)
        scale, along = (scale_O, axis) if choice.scales else (scale_O[0], None)
        if choice.block_size is not None:
            along = granularity.input_axis(len(shape), axis)
            blocks = list(shape)
            blocks[along] = -(-shape[along] // choice.block_size)
            scale = random.uniform(0.1, 1, blocks).astype(np.float32)
        return IntegerWeight(
            codes=codes, scale=np.asarray(scale), bits=choice.bits, axis=along, block_size=choice.block_size
        )
    vectors = choice.vector_dim > 1
    groups = granularity.lut_groups(shape[axis], choice.rows_per_lut)
    lut_shape = (groups, 1 << choice.bits, *((choice.vector_dim,) if vectors else ()))
    count = -(-int(np.prod(shape)) // choice.vector_dim)
    return PalettizedWeight(
        codes=random.integers(0, 1 << choice.bits, count if vectors else shape).astype(np.uint8),
        lut=(127 * random.uniform(-1, 1, lut_shape)).astype(choice.lut_dtype),
        bits=choice.bits, axis=axis, rows_per_lut=choice.rows_per_lut,
        scale=scale_O if choice.scales else None, weight_shape=shape if vectors else None,
    )  # fmt: skip


def graph_nbytes(artifacts: dict[str, Artifact]) -> int:
    """Bytes of a file's graph, names of one character counted as two.

    The rest of a file is its metadata, and the length of the graph, which takes a byte more from 2 MiB on.
    """
    graph = onnx.load_from_string(build(replace(model(), artifacts=artifacts)).data).graph
    names = [t.name for t in graph.initializer] + [n for node in graph.node for n in (*node.input, *node.output)]
    ours = {t.name for t in graph.initializer} | {n for node in graph.node for n in node.output}
    return graph.ByteSize() + sum(len(name) == 1 and name in ours for name in names)


@examples(30, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.data())
def test_the_cost_is_exact_to_the_byte(data: st.DataObject) -> None:
    chosen = {
        name: data.draw(choices(shape), name) for name, (shape, _) in weights().items() if data.draw(st.booleans())
    }
    priced = {name: PORTABLE.cost(*weights()[name], choice) for name, choice in chosen.items()}
    left = {name: PORTABLE.cost(*weights()[name], Choice(artifact="float", bits=32)) for name in chosen}
    charges = {key: nbytes for cost in priced.values() for key, nbytes in cost.charges.items()}
    predicted = sum(cost.nbytes for cost in priced.values()) + sum(charges.values())
    predicted -= sum(cost.nbytes for cost in left.values())
    written = {name: artifact(*weights()[name], choice, seed=3) for name, choice in chosen.items()}
    before, after = graph_nbytes(dict(model().artifacts)), graph_nbytes({**model().artifacts, **written})
    assert after - before == predicted


def test_charges_are_paid_once_and_named_by_what_they_are() -> None:
    cost = PORTABLE.cost((64, 64, 3, 3), 0, Choice(artifact="palette", bits=3))
    other = PORTABLE.cost((32, 64, 3, 3), 0, Choice(artifact="palette", bits=3))
    assert "int64 [64, 64, 3, 3]" in cost.charges
    assert set(cost.charges) - set(other.charges) == {"int64 [64, 64, 3, 3]"}


def test_newer_types_only_make_a_file_smaller() -> None:
    small = compress_program(model().program, Plan.from_flags(bits=2), PosthocSettings(effort="fast"))
    assert build(small, target="1.24").report.size.file <= build(small).report.size.file
    assert find("1.24").cost((8, 8), 0, Choice(artifact="palette", bits=2)) == PORTABLE.cost(
        (8, 8), 0, Choice(artifact="palette", bits=2)
    )


def test_unknown_artifacts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^Choice\.artifact must be one of palette, uniform, float, got 'sparse'\.$"):
        PORTABLE.cost((8, 8), 0, Choice(artifact="sparse", bits=2))


@pytest.mark.parametrize("target", [*TARGETS.values(), find("1.16"), find("1.24")])
def test_every_target_is_a_deployment_that_reads_every_width(target: Deployment) -> None:
    assert isinstance(target, Deployment)
    assert all(target.reads(bits) for bits in range(1, 9))
