"""Every method of `QUANTIZERS` from training to files: what trained is what is stored, and what onnxruntime computes."""

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import agreement
import small_models
from agreement import FORMATS, Agreement
from nets import randomized
from qcompress import tracing
from qcompress.artifacts import FloatWeight, ThresholdGrid
from qcompress.compressed import CompressedModel
from qcompress.finetune import prepare as preparing
from qcompress.finetune.methods import Methods
from qcompress.finetune.prepare import Prepared, prepare
from qcompress.plan import Plan
from qcompress.quantizers import QUANTIZERS
from qcompress.sites import MarkedRunner, mark, rounding
from qcompress_exporters import onnx_file
from qcompress_exporters.checks import check_graph, check_weights, float_reference
from qcompress_exporters.decode import decoded
from qcompress_exporters.marks import COMPARED, PADDED
from qcompress_exporters.replay import file_grids, reference_state
from qcompress_exporters.sessions import optimized_ops

BITS = (2, 4, 8)
WEIGHTS = [(name, b) for name, m in QUANTIZERS.items() if m.weight for b in BITS if b in m.weight.bits]
ACTIVATIONS = [(name, b) for name, m in QUANTIZERS.items() if m.activation for b in BITS if b in m.activation.bits]
CONVS = ("padded", "depthwise", "unpadded")
LAYERS = (*CONVS, "head", "embed")
# A code that falls on the other side of a tie runs through the rest of the net.
DISTANCE = 0.75


class Kinds(nn.Module):
    """A layer of each kind that a weight can have; a sum, for its operands have 8 bits."""

    def __init__(self, act: type[nn.Module], norm: bool) -> None:
        super().__init__()
        self.padded = nn.Conv2d(3, 8, 3, padding=1, bias=not norm)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.unpadded = nn.Conv2d(8, 12, 3, bias=not norm)
        self.embed = nn.Embedding(30, 12)
        self.head = nn.Linear(12, 5)
        self.act = act()
        for name in CONVS:
            self.add_module(f"{name}_norm", nn.BatchNorm2d(getattr(self, name).out_channels) if norm else nn.Identity())

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x = self.act(self.padded_norm(self.padded(x)))
        x = self.act(self.depthwise_norm(self.depthwise(x)))
        x = self.act(self.unpadded_norm(self.unpadded(x)))
        return self.head(self.act(x.mean((2, 3)) + self.embed(ids)))


def net(act: type[nn.Module], norm: bool) -> Kinds:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Kinds(act, norm)
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
    """The program of such a net: all have the same weights before they train."""
    return _program(type(module.act), isinstance(module.padded_norm, nn.BatchNorm2d))


@cache
def _program(act: type[nn.Module], norm: bool) -> Any:
    arrays = {name: value.numpy() for name, value in inputs(2).items()}
    return tracing.from_module(net(act, norm), preparing.ProgramOptions(inputs=arrays))


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "from_module", trace_once)
    for module in (onnx_file, agreement):
        monkeypatch.setattr(module, "trace", small_models.trace_once)


def trained(
    plan: Plan, methods: Methods, act: type[nn.Module] = nn.ReLU, *, norm: bool = False, snap: bool = False
) -> Prepared:
    """A net with quantizers after two steps, in eval mode."""
    module = net(act, norm).train()
    prepared = prepare(module, plan, example_inputs=inputs(), methods=methods, batchnorm="freeze")
    if snap:
        prepared.snap_offsets()
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
    """The compressed model, whose weights are those that the forward computes with."""
    small = prepared.finalize()
    for name in LAYERS:
        wanted = prepared.model.get_submodule(name).weight.detach().numpy()
        got = small.artifacts[f"{name}.weight"].dequantize()
        if norm and name in CONVS:
            found = prepared.model.get_submodule(f"{name}_norm")
            factor = found.weight.detach().double() / (found.running_var.double() + found.eps).sqrt()
            np.testing.assert_allclose(got, wanted * factor.numpy().reshape(-1, 1, 1, 1), rtol=1e-6, atol=0)
        else:
            assert got.dtype == wanted.dtype == np.float32
            np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32), err_msg=name)
    if not norm:
        assert as_trained(prepared, small)
    return small


def as_trained(prepared: Prepared, small: CompressedModel) -> bool:
    """Whether the artifacts give what the trained model gives, bit for bit, but for biases: those went to steps."""
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
    """The model with its files compared; those of int8 compute in both formats."""
    arrays = {name: value.numpy() for name, value in inputs(32, seed=7).items()}
    found = Agreement(small, arrays)
    if small.compute == "float":
        built = onnx_file.build(small)
        model = found.built["float"] = built
        proto = found.model("float")
        weights, values = check_weights(found.graph, proto)
        assert weights.ok, weights.detail
        for mode in agreement.MODES:
            check = check_graph(model.data, float_reference(found.graph, proto, values), [found.feeds], mode)
            assert check.ok, check.detail
        same_values(small, values)
        return found
    for form in FORMATS:
        assert found.failures(form) == []
        proto = found.model(form)
        grids = file_grids(proto, len(small.activations))
        same_values(small, reference_state(found.marked, decoded(proto), grids).state)
    assert found.distance("qdq") < DISTANCE
    return found


def same_values(small: CompressedModel, values: dict[str, Any]) -> None:
    """Weights as onnxruntime decodes them are what the artifacts say."""
    for name in LAYERS:
        wanted, got = small.artifacts[f"{name}.weight"].dequantize(), values[f"{name}.weight"]
        assert got.dtype == wanted.dtype == np.float32
        np.testing.assert_array_equal(got.view(np.uint32), wanted.view(np.uint32), err_msg=name)


def act_of(method: str) -> type[nn.Module]:
    """One with negative values where the method has codes for them."""
    found = QUANTIZERS[method].activation
    return nn.ReLU if found is None or found.for_sign is None else nn.Hardswish


def weights_agree(method: str, bits: int, activation_bits: int | None, *, norm: bool = False) -> Agreement:
    plan = Plan.from_flags(bits=bits, activation_bits=activation_bits)
    return checked(finalized(trained(plan, Methods(weights=method), norm=norm), norm=norm))


def activations_agree(method: str, bits: int, *, norm: bool = False) -> Agreement:
    plan = Plan.from_flags(bits=4, activation_bits=bits)
    methods = Methods(weights="lsq", activations=method)
    return checked(finalized(trained(plan, methods, act_of(method), norm=norm), norm=norm))


@pytest.mark.parametrize(("method", "bits"), WEIGHTS)
def test_weights(method, bits):
    weights_agree(method, bits, None)

@pytest.mark.parametrize(("method", "bits"), WEIGHTS)
def test_weights8(method, bits):
    weights_agree(method, bits, 8)

@pytest.mark.parametrize(("method", "bits"), WEIGHTS)
def test_weightsn(method, bits):
    weights_agree(method, bits, None, norm=True)

@pytest.mark.parametrize(("method", "bits"), WEIGHTS)
def test_weightsn8(method, bits):
    weights_agree(method, bits, 8, norm=True)

@pytest.mark.parametrize(("method", "bits"), ACTIVATIONS)
def test_act(method, bits):
    activations_agree(method, bits)

@pytest.mark.parametrize(("method", "bits"), ACTIVATIONS)
def test_actn(method, bits):
    activations_agree(method, bits, norm=True)
