"""Small chains of layers with handmade artifacts and grids, and a float64 reference computed from the artifacts.

The reference does not use the lowering. Codes are (value - offset) / scale as in the grid's definition, a padded
convolution pads the dequantized tensor with zeros, and each layer starts from the file's own codes, so that a
difference shows up at the layer that causes it.
"""

import copy
import functools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn
from torch.func import functional_call

from qcompress.artifacts import ActivationGrid, Artifact, FloatWeight, IntegerWeight, PalettizedWeight
from qcompress.artifacts.integer_range import IntegerRange
from qcompress.compressed.model import CompressedModel
from qcompress.graph.marks import mark
from qcompress.graph.program import FloatProgram
from qcompress.graph.sites import activation_sites
from qcompress.plan.plan import Plan
from qcompress_exporters import build
from qcompress_exporters.onnx_format import file as onnx_file
from qcompress_exporters.onnx_format.file import sites_of
from qcompress_exporters.onnx_format.int8.grids import file_grids
from qcompress_exporters.onnx_format.int8.stepped_biases import stepped
from qcompress_exporters.parity.checks import allowed_off, check_codes, check_weights
from qcompress_exporters.parity.replay import reference_state, replay
from qcompress_exporters.parity.sessions import Mode, run, session
from qcompress_exporters.report import Built, LayerReport
from tests.helpers import small_models
from tests.helpers.nets import traced
from tests.helpers.saturation import all_exact_here, kernels_saturate

Doubles = npt.NDArray[np.float64]
MODES: tuple[Mode, ...] = ("exact", "deployed")
FORMATS = ("qdq", "integer")
TIE = 1e-4  # in steps; an 8-bit code has float32 errors of 3e-5
OUTPUT_OFF = 1e-4  # share of the output's spread


class Chain(nn.Module):
    """Runs layer, clamp and head in sequence."""

    names = ("layer", "head")

    def __init__(self, layer: nn.Module, clamp: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.layer, self.clamp, self.head = layer, clamp, head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.clamp(self.layer(x)))


@dataclass(frozen=True)
class Kind:
    """A chain with the shape of its input without the batch axis."""

    layer: Callable[[], nn.Module]
    clamp: Callable[[], nn.Module]
    head: Callable[[], nn.Module]
    shape: tuple[int, ...]

    @property
    def batch(self) -> int:
        return max(2, 2048 // int(np.prod(self.shape)))


KINDS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(12, 8), nn.ReLU, lambda: nn.Linear(8, 5), (12,)),
    "linear no bias": Kind(
        lambda: nn.Linear(12, 8, bias=False), nn.Identity, lambda: nn.Linear(8, 5, bias=False), (12,)
    ),
    "linear 3d": Kind(lambda: nn.Linear(12, 8), nn.Identity, lambda: nn.Linear(8, 5), (4, 12)),
    "linear 3d no bias": Kind(lambda: nn.Linear(12, 8, bias=False), nn.ReLU, lambda: nn.Linear(8, 5), (4, 12)),
    "conv": Kind(lambda: nn.Conv2d(3, 8, 3), nn.ReLU6, lambda: nn.Conv2d(8, 4, 1), (3, 6, 7)),
    "conv padded": Kind(lambda: nn.Conv2d(3, 8, 3, padding=1), nn.ReLU, lambda: nn.Conv2d(8, 4, 1), (3, 6, 7)),
    "conv strided": Kind(
        lambda: nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.Identity, lambda: nn.Conv2d(8, 4, 1, bias=False), (3, 9, 8)
    ),
    "conv strided padded": Kind(
        lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.ReLU, lambda: nn.Conv2d(8, 4, 1), (3, 9, 8)
    ),
    "conv dilated": Kind(
        lambda: nn.Conv2d(3, 8, 3, dilation=2, padding=(2, 0)), nn.Identity, lambda: nn.Conv2d(8, 4, 1), (3, 8, 8)
    ),
    "conv grouped": Kind(lambda: nn.Conv2d(4, 8, 3, groups=2), nn.ReLU, lambda: nn.Conv2d(8, 4, 1), (4, 6, 6)),
    "depthwise": Kind(
        lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6, lambda: nn.Conv2d(8, 4, 1), (8, 6, 6)
    ),
    "depthwise unpadded": Kind(
        lambda: nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Identity, lambda: nn.Conv2d(8, 4, 1), (8, 6, 6)
    ),
    "conv 1d": Kind(lambda: nn.Conv1d(3, 8, 3, padding=1), nn.ReLU, lambda: nn.Conv1d(8, 4, 1), (3, 9)),
    "conv transposed": Kind(
        lambda: nn.ConvTranspose2d(3, 8, 3, stride=2), nn.ReLU, lambda: nn.Conv2d(8, 4, 1), (3, 4, 4)
    ),
}  # fmt: skip


@functools.cache
def chain(kind: str) -> tuple[Chain, FloatProgram]:
    """Return the chain of a kind and its program, traced once."""
    made = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(kind.encode()))
        module = Chain(made.layer(), made.clamp(), made.head()).eval()
    return module, traced(module, x=np.zeros((2, *made.shape), np.float32))


# --- artifacts


def artifact(kind: str, shape: tuple[int, ...], axis: int, bits: int, random: np.random.Generator) -> Artifact:
    """Make a weight of a kind in which all channels differ and, if there are enough weights, all codes occur."""
    outputs, limits = shape[axis], IntegerRange(bits, True)
    values = np.resize(random.permutation(1 << bits), shape)
    codes = random.permuted(values.ravel()).reshape(shape).astype(np.uint8)
    size = np.float32(1.5 / np.sqrt(np.prod(shape) / outputs) / (1 << bits - 1))
    scale_O = (size * random.uniform(0.5, 1.5, outputs) * random.choice([-1, 1, 1, 1], outputs)).astype(np.float32)
    integers = (codes.astype(np.int16) + limits.n).astype(np.int8)
    int8_scale = (scale_O * (1 << bits - 1) / 127).astype(np.float32)

    def table(*dims: int) -> npt.NDArray[np.int8]:
        found = random.integers(-128, 128, dims).astype(np.int8)
        found.flat[:2] = -128, 127
        return found

    match kind:
        case "per channel":
            return IntegerWeight(codes=integers, scale=scale_O, bits=bits, axis=axis)
        case "per tensor":
            return IntegerWeight(codes=integers, scale=np.asarray(size), bits=bits)
        case "power of two":
            exponent_O = np.exp2(np.rint(np.log2(np.abs(scale_O)))).astype(np.float32)
            return IntegerWeight(codes=integers, scale=exponent_O, bits=bits, axis=axis)
        case "asymmetric":
            zero_O = random.integers(limits.n, limits.p + 1, outputs).astype(np.int8)
            return IntegerWeight(codes=integers, scale=scale_O, bits=bits, axis=axis, zero_point=zero_O)
        case "int8 palette":
            return PalettizedWeight(codes=codes, lut=table(1, 1 << bits), bits=bits, axis=axis, scale=int8_scale)
        case "int8 palettes":
            lut = table(-(-outputs // 3), 1 << bits)
            return PalettizedWeight(codes=codes, lut=lut, bits=bits, axis=axis, scale=int8_scale, rows_per_lut=3)
        case "vectors":
            flat = codes.ravel()[: -(-codes.size // 2)]
            return PalettizedWeight(
                codes=flat, lut=table(1, 1 << bits, 2), bits=bits, axis=axis, scale=int8_scale, weight_shape=shape
            )
        case "half integers":
            lut = ((np.arange(limits.n, limits.p + 1) + 0.5) * float(size)).astype(np.float32)[None]
            return PalettizedWeight(codes=codes, lut=lut, bits=bits, axis=axis)
        case "ternary":
            lut = np.array([[-1, 0, 1]], np.float32) * np.float32(0.3)
            return PalettizedWeight(codes=codes % np.uint8(3), lut=lut, bits=2, axis=axis)
        case "k-means":
            lut = np.sort(random.standard_normal((1, 1 << bits)).astype(np.float32) * np.float32(0.3), axis=1)
            return PalettizedWeight(codes=codes, lut=lut, bits=bits, axis=axis)
        case "float":
            return floats((random.standard_normal(shape) * 0.3).astype(np.float32))
    raise AssertionError(kind)


ARTIFACTS = (
    "per channel", "per tensor", "power of two", "asymmetric", "int8 palette", "int8 palettes", "vectors",
    "half integers", "ternary", "k-means", "float",
)  # fmt: skip


def floats(values: npt.NDArray[np.float32]) -> FloatWeight:
    return FloatWeight(values=values, reason="by plan")


# --- grids

GRIDS = ("zero point", "signed", "beta below 0", "beta above 0", "signed with beta")


def grid(kind: str, site: tuple[str, int], values: Doubles, bits: int) -> ActivationGrid:
    """Make a grid of a kind whose ends lie within the values, so that both clip."""
    low, high = (1.0173 * float(np.quantile(values, q)) for q in (0.03, 0.97))  # not a multiple of another grid's step
    levels = (1 << bits) - 1
    if kind == "zero point":
        scale = max(high - min(low, 0.0), 1e-3) / levels
        return ActivationGrid.from_zero_point(site, scale, min(round(-min(low, 0.0) / scale), levels), bits)
    half = 1 << bits - 1
    if kind == "signed":
        scale = max(high, -low, 1e-3) / half
        return _grid(site, scale, 0.0, bits, signed=True)
    scale = max(high - low, 1e-3) / levels
    if kind == "signed with beta":
        return _grid(site, scale, low + half * scale, bits, signed=True)
    offset = low if kind == "beta below 0" and low < 0 else -0.37 * scale
    return _grid(site, scale, offset if kind == "beta below 0" else 0.13 * high + 0.01, bits, signed=False)


def _grid(site: tuple[str, int], scale: float, offset: float, bits: int, *, signed: bool) -> ActivationGrid:
    return ActivationGrid(
        site=site, scale=np.asarray(np.float32(scale)), offset=np.asarray(np.float32(offset)), bits=bits, signed=signed
    )


def steps(g: ActivationGrid, values: Doubles) -> Doubles:
    """Return values in steps of a grid, before rounding: a grid with a zero point rounds about 0."""
    return (values - (float(g.offset) if g.zero_point is None else 0.0)) / float(g.scale)


def quantized(g: ActivationGrid, values: Doubles) -> npt.NDArray[np.uint8]:
    """Return the stored codes that the grid's definition gives in float64."""
    n, z = IntegerRange(g.bits, g.signed).n, g.zero_point
    codes = np.rint(steps(g, values)) + (-n if z is None else z)
    return np.clip(codes, 0, g.levels).astype(np.uint8)


def is_tie(g: ActivationGrid, values: Doubles) -> npt.NDArray[np.bool_]:
    """Return where float32 errors decide how a value is rounded; with few distinct inputs such values repeat."""
    return np.asarray(np.abs(np.abs(steps(g, values) % 1) - 0.5) < TIE)


def dequantized(g: ActivationGrid, codes: npt.NDArray[np.uint8]) -> Doubles:
    """Return (codes + n) * scale + offset in float64."""
    n, z = IntegerRange(g.bits, g.signed).n, g.zero_point
    if z is not None:
        return (codes.astype(np.float64) - z) * float(g.scale)
    return (codes.astype(np.float64) + n) * float(g.scale) + float(g.offset)


# --- the reference


@dataclass
class Case:
    """A compressed chain with inputs that reach both ends of its grids."""

    module: Chain
    model: CompressedModel
    x: npt.NDArray[np.float32]
    built: dict[str, Built]

    def file(self, format: str) -> Built:
        if format not in self.built:
            with mock.patch.object(onnx_file, "trace", small_models.trace_once):
                self.built[format] = build(self.model, format=format)
        return self.built[format]

    def proto(self, format: str) -> onnx.ModelProto:
        return onnx.load_from_string(self.file(format).data)

    def grids(self) -> list[ActivationGrid]:
        return list(self.model.activations.values())

    def failures(self, format: str) -> list[str]:
        """Return descriptions of all differences from the reference in either session; empty if they agree."""
        reports = self.file(format).report.layers
        found = [f"{r.weight} saturates on this CPU" for r in reports if kernels_saturate() and r.saturation]
        for mode in MODES:
            values = codes_and_outputs(self.file(format).data, len(self.model.activations), self.x, mode)
            found += [f"{mode}: {text}" for text in self.compare(values, format)]
        return found

    def checks(self, format: str, edit: Callable[[onnx.ModelProto], None] | None = None) -> dict[str, str]:
        """Return the details of the first two checks of `validate` that an edited file fails; empty if it passes."""
        model = self.proto(format)
        if edit is not None:
            edit(model)
        sites = sites_of(self.model)
        marked = mark(self.model.program, sites)
        graph = small_models.trace_once(marked)
        check, values = check_weights(graph, model)
        found = [check]
        if values is not None:
            grids = file_grids(model, sites) if self.model.compute == "int8" else []
            state = reference_state(marked, values, grids)
            for mode in MODES:
                replayed = replay(marked, model, sites, state, grids, [{"x": self.x}], mode)
                found.append(check_codes(replayed, mode, len(self.x)))
        return {f"{c.name} {c.session}": c.detail for c in found if not c.ok}

    def compare(self, values: Mapping[str, npt.NDArray[Any]], format: str) -> list[str]:
        """Compare a file's codes and outputs with float64, each computed from the preceding codes of the file."""
        found = []
        reports = {r.weight: r for r in self.file(format).report.layers}
        value: Doubles = self.x.astype(np.float64)
        for i, g in enumerate(self.grids()):
            wanted, got = quantized(g, value), values[f"q{i}"].reshape(value.shape)
            either = is_tie(g, value) & (np.abs(wanted.astype(np.int16) - got) <= 1)
            found += differing(f"q{i}", np.where(either, got, wanted), got)
            value = dequantized(g, got)
            if i < len(self.module.names):
                name = self.module.names[i]
                behind = next(iter(self.grids()[i + 1 :]), None)
                taken = 0.0 if behind is None or behind.zero_point is not None else float(behind.offset)
                value = self.step(name, value, self.bias_error(name, g, taken, reports[f"{name}.weight"], format))
        error = np.abs(values["output"] - value).max() / value.std()
        if not error <= OUTPUT_OFF:
            found.append(f"output off by {error:.1e} of its spread")
        return found

    def step(self, name: str, value: Doubles, bias_error: Doubles | None = None) -> Doubles:
        """Compute one layer and the clamp after it in float64."""
        layer = getattr(self.module, name)
        state = {
            part: torch.from_numpy(self.model.artifacts[f"{name}.{part}"].dequantize().astype(np.float64))
            for part in ("weight", "bias")
            if f"{name}.{part}" in self.model.artifacts
        }
        y = functional_call(copy.deepcopy(layer).double(), state, torch.from_numpy(value))
        if bias_error is not None:
            y = y + torch.from_numpy(bias_error).reshape([-1] + [1] * (y.ndim - 2 if is_conv(layer) else 0))
        return (self.module.clamp(y) if name == "layer" else y).detach().numpy()

    def bias_error(
        self, name: str, g: ActivationGrid, taken: float, report: LayerReport, format: str
    ) -> Doubles | None:
        """Return the error from rounding a bias to steps of s_x * s_w; None if the kernel has no int32 bias.

        This is the only error that kernels add to the artifacts. The bias includes the free offset of the layer's input
        and, as `taken`, that of its output's quantizer.
        """
        layer, bias = getattr(self.module, name), self.model.artifacts.get(f"{name}.bias")
        folded = report.offset == "folded"
        if report.compute != "int8" or (bias is None and not folded and not taken):
            return None
        if not is_conv(layer) and (format == "integer" or len(self.x.shape) > 2):
            return None
        values = self.model.artifacts[f"{name}.weight"].integers()
        assert values is not None
        codes, scale, _ = values
        total = np.zeros(len(codes)) if bias is None else bias.dequantize().astype(np.float64)
        if folded:
            total = total + float(g.offset) * scale.astype(np.float64) * codes.reshape(len(codes), -1).sum(1, dtype=int)
        total = total - taken
        steps = (g.scale * scale).astype(np.float64)
        error = np.rint(total / steps) * steps - total
        assert (np.abs(error) <= np.abs(steps) / 2 * (1 + 1e-9)).all()
        return np.asarray(error)


def is_conv(layer: nn.Module) -> bool:
    return not isinstance(layer, nn.Linear)


def codes_and_outputs(data: bytes, sites: int, x: npt.NDArray[np.float32], mode: Mode) -> dict[str, npt.NDArray[Any]]:
    """Run a file and return its codes q0, q1, ... and its outputs."""
    model = onnx.load_from_string(data)
    model.graph.output.extend(onnx.ValueInfoProto(name=f"q{i}") for i in range(sites))
    return run(session(model.SerializeToString(), mode), {"x": x})


def differing(name: str, wanted: npt.NDArray[np.uint8], got: npt.NDArray[np.uint8]) -> list[str]:
    off = np.abs(wanted.astype(np.int16) - got.reshape(wanted.shape))
    count = int(np.count_nonzero(off))
    if off.max() > 1 or count > allowed_off(off.size):
        return [f"{name}: {count} of {off.size} codes differ, by up to {off.max()}"]
    return []


def case(
    kind: str,
    weight: str = "per channel",
    *,
    bits: int = 8,
    activation_bits: int = 8,
    grids: tuple[str, str] = ("zero point", "zero point"),
    seed: int = 0,
    artifacts: Mapping[str, Artifact] | None = None,
) -> Case:
    """Make a chain of a kind with a weight of a kind; the head has 8-bit weights."""
    module, program = chain(kind)
    random = np.random.default_rng([seed, zlib.crc32(f"{kind} {weight} {bits} {activation_bits} {grids}".encode())])
    made: dict[str, Artifact] = {}
    for name, value in program.state().items():
        shape = tuple(value.shape)
        if len(shape) == 1:
            made[name] = floats((random.standard_normal(shape) * 0.5).astype(np.float32))
        else:
            axis = int(isinstance(module.layer, nn.ConvTranspose2d) and name == "layer.weight")
            how = (weight, bits) if name == "layer.weight" else ("per channel", 8)
            made[name] = artifact(how[0], shape, axis, how[1], random)
    made = all_exact_here(made | dict(artifacts or {}))
    shape = (KINDS[kind].batch, *KINDS[kind].shape)
    x = (random.standard_normal(shape) * 1.5 + 0.4).astype(np.float32)
    sites = activation_sites(program, {"layer.weight": activation_bits, "head.weight": activation_bits})
    found: dict[tuple[str, int], ActivationGrid] = {}
    model = CompressedModel(
        program=program, artifacts=made, plan=Plan(), source_digest="0" * 11, plan_digest="0" * 11, compute="int8"
    )
    it = Case(module, model, x, {})
    value: Doubles = x.astype(np.float64)
    for i, site in enumerate(sites):
        g = grid(grids[min(i, 1)], site.key, value, site.bits)
        found[site.key] = g
        value = dequantized(g, quantized(g, value))
        if i < len(module.names):
            value = it.step(module.names[i], value)
    it.model = stepped(replace(model, activations=found))
    return it
