"""Weights that are quantized as one flat tensor get what each gets alone."""

import copy

import numpy as np
import pytest
import torch

import qcompress as qc
from qcompress.quantizers import QUANTIZERS
from qcompress.quantizers.rows import Rows, alike
from tests.helpers import reference_quantizers as reference
from tests.helpers.dispatched import Kernels

WEIGHTS = {name: method.weight for name, method in QUANTIZERS.items() if method.weight and name != "dkm"}
SHAPES = [((16, 3, 3, 3), 0), ((8, 6, 3), 1), ((10, 64), 0), ((4, 4, 1, 1), 0), ((6, 2, 3, 3), 0), ((5, 7), 1)]


def quantizers_of(name, per_channel, dtype):
    """Returns quantizers of two widths, and weights that they are initialised from."""
    found, generator = WEIGHTS[name], torch.Generator().manual_seed(0)
    quantizers, weights = [], []
    for i, (shape, axis) in enumerate(SHAPES):
        settings = {"axis": axis} if found.scales == "channel" else {}
        if found.scales == "either" and per_channel:
            settings = {"axis": axis, "channels": shape[axis]}
        weight = 0.1 * torch.randn(shape, generator=generator)
        weight[0] = 0  # a channel that is not used
        quantizer = found.make(bits=found.bits[0] if i % 3 else found.bits[-1], **settings)
        quantizer.initialise(weight)
        quantizers.append(quantizer.to(dtype))
        weights.append(weight.to(dtype).requires_grad_())
    return quantizers, weights


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_together_is_as_one_by_one(name, per_channel, dtype):
    quantizers, weights = quantizers_of(name, per_channel, dtype)
    before = [weight.detach().clone() for weight in weights]
    alone = [quantizer(weight) for quantizer, weight in zip(quantizers, weights, strict=True)]
    together = type(quantizers[0]).together(quantizers, weights)
    assert all(map(torch.equal, alone, together))
    assert all(map(torch.equal, before, weights))
    gradients = [torch.randn(w.shape, generator=torch.Generator().manual_seed(1)).to(dtype) for w in weights]
    own = [parameter for quantizer in quantizers for parameter in quantizer.parameters()]
    wanted = torch.autograd.grad(alone, [*weights, *own], gradients)
    found = torch.autograd.grad(together, [*weights, *own], gradients)
    assert all(map(torch.equal, wanted[: len(weights)], found[: len(weights)]))  # of weights: bit for bit
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for mine, theirs in zip(found[len(weights) :], wanted[len(weights) :], strict=True):  # of scales: sums
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_what_is_stored_is_computed_together(name, per_channel):
    quantizers, weights = quantizers_of(name, per_channel, torch.float32)
    found = type(quantizers[0]).together(quantizers, weights)
    for quantizer, weight, w_hat in zip(quantizers, weights, found, strict=True):
        stored = quantizer.weight_artifact(weight.detach()).dequantize()
        assert np.array_equal(stored.view(np.uint32), w_hat.detach().numpy().copy().view(np.uint32))


def test_scales_of_several_weights_get_the_gradients_of_the_paper():
    weights = [np.random.default_rng(i).normal(size=shape) for i, shape in enumerate([(3, 4), (2, 5)])]
    leaves = [torch.tensor(weight, requires_grad=True) for weight in weights]
    quantizers = [qc.quantizers.Lsq(bits=2, role="weight", axis=0, channels=len(w)).double() for w in weights]
    for quantizer, weight in zip(quantizers, leaves, strict=True):
        quantizer.initialise(weight)
    out = qc.quantizers.Lsq.together(quantizers, leaves)
    torch.autograd.backward(out, [torch.ones_like(weight) for weight in leaves])
    for quantizer, weight, leaf, w_hat in zip(quantizers, weights, leaves, out, strict=True):
        scale, raw = quantizer.scale.value().detach(), quantizer.scale.value.raw
        wanted, gradients = reference.lsq(weight, scale.numpy()[:, None], -2, 1, np.ones_like(weight))
        np.testing.assert_allclose(w_hat.detach(), wanted, rtol=1e-12)
        np.testing.assert_allclose(leaf.grad, gradients["x"], rtol=1e-12)
        of_scale = gradients["scale"][:, 0] / weight.shape[1] ** 0.5
        np.testing.assert_allclose(raw.grad * quantizer.scale.value.start, of_scale, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "forward", "backward", "per_weight"),
    [
        ("lsq", 11, 8, (0, 1)),  # the sum of a scale's gradient
        ("lsq_plus", 11, 8, (0, 1)),
        ("ewgs", 11, 12, (0, 1)),
        ("tqt", 16, 9, (0, 1)),
        ("n2uq", 19, 2, (1, 0)),  # the mean of each row
        ("dorefa", 18, 3, (1, 0)),  # its maximum
        ("bmpq", 13, 1, (1, 0)),
        ("ternary", 15, 1, (3, 0)),
    ],
)
def test_kernels_do_not_multiply_with_the_weights(name, forward, backward, per_weight):
    for count in (2, 9):
        found = WEIGHTS[name]
        settings = {"either": {"axis": 0, "channels": 6}, "channel": {"axis": 0}, "tensor": {}}[found.scales]
        weights = [torch.randn(6, 5, requires_grad=True) for _ in range(count)]
        quantizers = [found.make(bits=2, **settings) for _ in weights]
        kind = type(quantizers[0])
        kind.together(quantizers, weights)  # which makes the constants of the rows
        with Kernels() as first:
            outs = kind.together(quantizers, weights)
        gradients = [torch.ones(6, 5) for _ in weights]
        with Kernels() as second:
            torch.autograd.backward(outs, gradients)
        assert first.total == forward + per_weight[0] * count, first.found
        assert second.total == backward + per_weight[1] * count, second.found


def test_rows_are_kept_until_the_weights_have_other_shapes():
    quantizers, weights = quantizers_of("lsq", True, torch.float32)
    quantizers, weights = quantizers[1:3], weights[1:3]
    qc.quantizers.Lsq.together(quantizers, weights)
    rows = quantizers[0]._rows
    qc.quantizers.Lsq.together(quantizers, weights)
    assert quantizers[0]._rows is rows
    again = copy.deepcopy(quantizers)
    assert all(map(torch.equal, *(qc.quantizers.Lsq.together(q, weights) for q in (quantizers, again))))
    qc.quantizers.Lsq.together(quantizers[::-1], weights[::-1])
    qc.quantizers.Lsq.together([quantizers[0], *again], [weights[0], *weights])
    assert quantizers[0]._rows is not rows


def test_large_weights_and_those_of_other_types_are_quantized_alone():
    small, large = torch.zeros(3), torch.empty((1 << 21) + 1, device="meta")
    assert alike(["a", "a", None, None, "a"], [small, large, small, small, small.double()]) == [[0], [1], [2], [3], [4]]
    assert alike(["a", "a", "b", "a"], [small, torch.empty(0), small, small]) == [[0, 3], [1], [2]]


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean, torch.amax])
def test_rows_are_reduced_each_by_itself(reduce):
    rows = Rows([(2, 3), (1, 4), (3, 1)], torch.device("cpu"))
    x_N = torch.arange(13.0)
    parts = [x_N[:3], x_N[3:6], x_N[6:10], x_N[10:11], x_N[11:12], x_N[12:]]
    assert torch.equal(rows.reduced(x_N, reduce), torch.stack([reduce(part, 0) for part in parts]))
    assert rows.constant([1.0, 2.0, 3.0], like=x_N).tolist() == [1, 1, 2, 3, 3, 3]
