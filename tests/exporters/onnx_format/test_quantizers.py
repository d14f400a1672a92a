"""Every method of `QUANTIZERS` from training to files: trained weights are stored, and onnxruntime uses them."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qcompress.artifacts import FloatWeight
from qcompress.compressed.model import CompressedModel
from qcompress.finetune import attach
from qcompress.finetune.attach import prepare
from qcompress.finetune.methods import Methods
from qcompress.finetune.prepared import Prepared
from qcompress.graph import tracing
from qcompress.graph.marks import MarkedRunner, mark, rounding
from qcompress.plan.plan import Plan
from qcompress.quantizers import QUANTIZERS
from qcompress_exporters import build
from qcompress_exporters.onnx_format import file as onnx_file
from qcompress_exporters.onnx_format.int8.grids import file_grids
from qcompress_exporters.onnx_format.int8.layers import COMPARED, PADDED
from qcompress_exporters.parity.checks import check_graph, check_weights, float_reference
from qcompress_exporters.parity.decode import decoded
from qcompress_exporters.parity.replay import reference_state
from qcompress_exporters.parity.sessions import optimized_ops
from tests.helpers import agreement, small_models
from tests.helpers.agreement import FORMATS, Agreement
from tests.helpers.nets import randomized

BITS = (2, 4, 8)
WEIGHTS = [(name, m.weight.bits) for name, m in QUANTIZERS.items() if m.weight]
ACTIVATIONS = [(name, m.activation.bits) for name, m in QUANTIZERS.items() if m.activation]
CONVS = ("padded", "depthwise", "unpadded")
LAYERS = (*CONVS, "head", "embed")
# A tie that is rounded the other way changes values in the rest of the net.
DISTANCE = 0.75


class Kinds(nn.Module):
    """A layer of each kind, with inputs of either sign, and a sum, whose operands have 8 bits."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.padded = nn.Conv2d(3, 8, 3, padding=1, bias=not norm)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.unpadded = nn.Conv2d(8, 12, 3, bias=not norm)
        self.embed = nn.Embedding(30, 12)
        self.head = nn.Linear(12, 5)
        for name in CONVS:
            self.add_module(f"{name}_norm", nn.BatchNorm2d(getattr(self, name).out_channels) if norm else nn.Identity())

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x = nn.functional.hardswish(self.padded_norm(self.padded(x)))
        x = self.depthwise_norm(self.depthwise(x)).relu()
        x = nn.functional.hardswish(self.unpadded_norm(self.unpadded(x)))
        return self.head((x.mean((2, 3)) + self.embed(ids)).relu())


def net(norm: bool) -> Kinds:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Kinds(norm)
    randomized(module)
    for name in CONVS if norm else ():
        gamma = getattr(module, f"{name}_norm").weight
        gamma.data[0], gamma.data[1] = 0, -0.7
    return module


def inputs(samples: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((samples, 3, 9, 9), generator=generator)
    return {"x": x, "ids": torch.randint(0, 30, (samples,), generator=generator)}


def trace_once(module: nn.Module, options: Any) -> Any:
    """Returns the program of such a net: all have the same weights before training."""
    return _program(isinstance(module.padded_norm, nn.BatchNorm2d))


@cache
def _program(norm: bool) -> Any:
    arrays = {name: value.numpy() for name, value in inputs(2).items()}
    return tracing.from_module(net(norm), attach.ProgramOptions(inputs=arrays))


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "from_module", trace_once)
    for module in (onnx_file, agreement):
        monkeypatch.setattr(module, "trace", small_models.trace_once)


def trained(plan: Plan, methods: Methods, *, norm: bool = False, snap: bool = False) -> Prepared:
    """Returns a net with quantizers after two steps, in eval mode."""
    module = net(norm).train()
    prepared = prepare(module, plan, example_inputs=inputs(), methods=methods, batchnorm="freeze")
    if snap:
        prepared.snap_offsets(inputs=True)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.02)
    for step in range(2):
        optimizer.zero_grad()
        prepared(**inputs(seed=step)).square().mean().backward()
        if norm:  # γ = 0 stays
            for name in CONVS:
                module.get_submodule(f"{name}_norm").weight.grad[0] = 0
        optimizer.step()
    return prepared.eval()


def finalized(prepared: Prepared, *, norm: bool = False) -> CompressedModel:
    """Returns the compressed model, after checking that its weights are those that the forward uses."""
    small = prepared.finalize()
    for name in LAYERS:
        wanted = prepared.model.get_submodule(name).weight.detach().numpy()
        got = small.artifacts[f"{name}.weight"].dequantize()
        if norm and name in CONVS:
            found = prepared.model.get_submodule(f"{name}_norm")
            factor = found.weight.detach().double() / (found.running_var.double() + found.eps).sqrt()
            wanted = wanted * factor.numpy().reshape(-1, 1, 1, 1)
            # The scale of a channel of zeros is chosen for its bias: levels that are not 0 are tiny there.
            zero, largest = factor.numpy() == 0, np.abs(wanted).max()
            assert np.abs(got[zero]).max() < 1e-4 * largest
            np.testing.assert_allclose(got[~zero], wanted[~zero], rtol=1e-6, atol=1e-6 * largest)
        else:
            assert got.dtype == wanted.dtype == np.float32
            np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32), err_msg=name)
    if not norm:
        assert as_trained(prepared, small)
    return small


def as_trained(prepared: Prepared, small: CompressedModel) -> bool:
    """Returns whether the artifacts compute the same as the trained model, bit for bit, apart from rounded biases."""
    model = prepared.model
    biases = {f"{n}.bias": model.get_submodule(n).bias.detach().numpy() for n in LAYERS if n != "embed"}
    artifacts = small.artifacts | {n: FloatWeight(values=v, reason="not a weight") for n, v in biases.items()}
    program = small.program.with_state({name: a.dequantize() for name, a in artifacts.items()})
    runner = MarkedRunner(mark(program, list(small.activations)))
    given = inputs(seed=9)
    (got,) = runner({n: v.numpy() for n, v in given.items()}, rounding(list(small.activations.values()))).values()
    with torch.no_grad():
        return np.array_equal(got, prepared(**given).numpy())


def checked(small: CompressedModel) -> Agreement:
    """Returns the model after comparing its files, in both formats for int8 compute."""
    arrays = {name: value.numpy() for name, value in inputs(32, seed=7).items()}
    found = Agreement(small, arrays)
    if small.compute == "float":
        built = build(small)
        proto = onnx.load_from_string(built.data)
        weights, values = check_weights(found.graph, proto)
        assert weights.ok, weights.detail
        for mode in agreement.MODES:
            check = check_graph(built.data, float_reference(found.graph, proto, values), [found.feeds], mode)
            assert check.ok, check.detail
        same_values(small, values)
        return found
    for form in FORMATS:
        assert found.failures(form) == []
        proto = found.model(form)
        grids = file_grids(proto, list(small.activations))
        same_values(found.small, reference_state(found.marked, decoded(proto), grids).state)
    assert found.distance("qdq") < DISTANCE
    return found


def same_values(small: CompressedModel, values: dict[str, Any]) -> None:
    """Checks that weights as onnxruntime decodes them equal the artifacts."""
    for name in LAYERS:
        wanted, got = small.artifacts[f"{name}.weight"].dequantize(), values[f"{name}.weight"]
        assert got.dtype == wanted.dtype == np.float32
        np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32), err_msg=name)


def widths(table: list[tuple[str, Sequence[int]]]) -> list[Any]:
    """Returns each method at each width; all but one width per method are marked slow."""
    cases = []
    for turn, (name, legal) in enumerate(table):
        found = [bits for bits in BITS if bits in legal]
        for bits in found:
            marks = () if bits == found[turn % len(found)] else pytest.mark.slow
            cases.append(pytest.param(name, bits, id=f"{name}-{bits}", marks=marks))
    return cases


def combinations_with_lsq() -> list[tuple[str, str, int]]:
    """Returns each method for weights beside LSQ's activations, and the reverse, at each width that both support."""
    weights, activations = dict(WEIGHTS), dict(ACTIVATIONS)
    pairs = dict.fromkeys([*((name, "lsq") for name in weights), *(("lsq", name) for name in activations)])
    return [(w, a, bits) for w, a in pairs for bits in BITS if bits in weights[w] and bits in activations[a]]


@pytest.mark.parametrize(("method", "bits"), widths(WEIGHTS))
def test_weights_beside_8_bit_activations(method, bits):
    plan = Plan.from_flags(bits=bits, activation_bits=8)
    found = checked(finalized(trained(plan, Methods(weights=method, activations="lsq"))))
    half_integer = method in ("dorefa", "n2uq")
    assert {n: r.compute for n, r in found.layers().items()} == {
        f"{n}.weight": "float" if half_integer and bits == 8 else "int8" for n in LAYERS if n != "embed"
    }


@pytest.mark.slow
@pytest.mark.parametrize(("method", "bits"), widths(WEIGHTS))
@pytest.mark.parametrize("norm", [False, True])
def test_weights_beside_float_activations(method, bits, norm):
    checked(finalized(trained(Plan.from_flags(bits=bits), Methods(weights=method), norm=norm), norm=norm))


@pytest.mark.parametrize(("method", "bits"), widths(ACTIVATIONS))
def test_activations_beside_lsq_weights(method, bits):
    plan = Plan.from_flags(bits=4, activation_bits=bits)
    checked(finalized(trained(plan, Methods(weights="lsq", activations=method))))


@pytest.mark.parametrize(("method", "bits"), widths(WEIGHTS))
def test_a_folded_batchnorm_scales_what_was_trained(method, bits):
    for activation_bits in (None, 8):
        plan = Plan.from_flags(bits=bits, activation_bits=activation_bits)
        finalized(trained(plan, Methods(weights=method), norm=True), norm=True)


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "activations", "bits"), combinations_with_lsq())
def test_files_with_a_folded_batchnorm(weights, activations, bits):
    plan = Plan.from_flags(bits=bits, activation_bits=bits)
    checked(finalized(trained(plan, Methods(weights=weights, activations=activations), norm=True), norm=True))


@pytest.mark.parametrize("bits", [pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_free_offset_folds_where_nothing_is_padded_or_is_snapped(bits):
    plan = Plan.from_flags(bits=4, activation_bits=bits)
    methods = Methods(activations="lsq_plus", activation_options={"configuration": 4})
    free = checked(finalized(trained(plan, methods)))
    assert all(grid.zero_point is None for grid in free.small.activations.values())
    assert {n: (r.compute, r.offset, r.why) for n, r in free.layers().items()} == {
        "padded.weight": ("float", "added", PADDED),
        "depthwise.weight": ("float", "added", PADDED),
        "unpadded.weight": ("int8", "folded", ""),
        "head.weight": ("int8", "folded", ""),
    }
    snapped = checked(finalized(trained(plan, methods, snap=True)))
    assert {(r.compute, r.offset) for r in snapped.layers().values()} == {("int8", "zero point")}


@pytest.mark.parametrize("bits", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_layers_take_codes_from_thresholds_as_integers(bits):
    plan = Plan.from_flags(bits=4, activation_bits=bits)
    found = checked(finalized(trained(plan, Methods(activations="n2uq"), snap=True)))
    assert {n: r.why for n, r in found.layers().items()} == {
        "padded.weight": "", "depthwise.weight": COMPARED, "unpadded.weight": "", "head.weight": "",
    }  # fmt: skip
    ops = optimized_ops(found.file("qdq").data)
    assert (ops["QLinearConv"], ops["QGemm"], ops["Less"], ops["Where"]) == (2, 1, *[2 * (2**bits - 1)] * 2)
    ops = optimized_ops(found.file("integer").data)
    assert (ops["QLinearConv"], ops["MatMulInteger"] + ops["MatMulIntegerToFloat"]) == (2, 1)
