"""Compares value and gradients of every penalty with the equations, one element at a time, in float64."""

import numpy as np
import pytest
import torch

import qcompress as qc
from tests.helpers import reference_quantizers as reference
from tests.helpers.gradients import agree

r = qc.regularizers

WEIGHTS = {
    "random": np.random.default_rng(0).normal(size=(3, 4, 5)),
    "tail": np.random.default_rng(1).normal(size=7),
    "outlier": np.append(np.random.default_rng(2).normal(scale=0.1, size=11), 9.0),
    "negative": -np.random.default_rng(3).uniform(1, 2, size=(2, 3)),
    "equal sizes": np.array([[1.0, -1.0], [-1.0, 1.0]]),
    "one": np.array([[0.3]]),
}
WEIGHT = pytest.mark.parametrize("w", WEIGHTS.values(), ids=WEIGHTS)
DIM = pytest.mark.parametrize("dim", [1, 2, 4])


def times_g(answer):
    """Returns the reference of a penalty with one more argument: the gradient of a loss by the penalty."""

    def scaled(*arguments):
        value, gradients = answer(*arguments[:-1])
        return value, {name: gradient * arguments[-1] for name, gradient in gradients.items()}

    return scaled


@WEIGHT
@DIM
def test_linf(w, dim):
    agree(r.linf, times_g(reference.linf), {"w": w}, dim)


@WEIGHT
@DIM
@pytest.mark.parametrize("m", [0.5, -0.5, 1.0, 100.0, 1e-3])
def test_margin(w, dim, m):
    agree(r.margin, times_g(reference.margin), {"w": w, "m": np.array(m)}, dim)


@WEIGHT
@DIM
@pytest.mark.parametrize("alpha", [0.1, -0.3, 0.0, 20.0])
@pytest.mark.parametrize("relative", [True, False])
def test_soft_min_max(w, dim, alpha, relative):
    agree(r.soft_min_max, times_g(reference.soft_min_max), {"w": w, "alpha": np.array(alpha)}, dim, relative)


@pytest.mark.parametrize("sigma", [0.003, 0.01, 0.03])
def test_soft_min_max_acts_where_it_is_relative_and_hardly_as_printed(sigma):
    """At the α where each form comes to rest, its soft range and its pull on the largest weight."""
    w = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * sigma
    share, pull = {}, {}
    for relative in (True, False):
        low, high = 0.0, 50.0
        while high - low > 1e-6:  # the gradient of α rises with α
            alpha = torch.tensor((low + high) / 2, dtype=torch.float64, requires_grad=True)
            (slope,) = torch.autograd.grad(r.soft_min_max(w, alpha, relative=relative), alpha)
            low, high = (low, alpha.item()) if slope > 0 else (alpha.item(), high)
        leaf = w.clone().requires_grad_()
        penalty = r.soft_min_max(leaf, alpha.detach(), relative=relative)
        share[relative] = (penalty.item() - np.exp(-alpha.item())) / (w.max() - w.min()).item()
        (gradient,) = torch.autograd.grad(penalty, leaf)
        pull[relative] = gradient[w.argmax()].item()
    assert share[False] < 0.06 < 0.8 < share[True]
    assert pull[True] > 1000 * pull[False]


@WEIGHT
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("detach_targets", [True, False])
@pytest.mark.parametrize("scale", [0.5, 0.3, 100.0])
def test_bin_regularization(w, bits, detach_targets, scale):
    tensors = {"w": w, "scale": np.array(scale)}
    agree(r.bin_regularization, times_g(reference.bin_regularization), tensors, bits, detach_targets)


@pytest.mark.parametrize("detach_targets", [True, False])
def test_bin_regularization_of_channels(detach_targets):
    tensors = {"w": WEIGHTS["random"], "scale": np.array([0.2, 0.5, 1.0]).reshape(3, 1, 1)}
    agree(r.bin_regularization, times_g(reference.bin_regularization), tensors, 3, detach_targets)


@pytest.mark.parametrize("w", [WEIGHTS[name] for name in ("random", "tail", "outlier", "negative", "equal sizes")])
@pytest.mark.parametrize("target", [1.8, 3.0])
def test_kurtosis(w, target):
    agree(r.kurtosis, times_g(reference.kurtosis), {"w": w}, target)


@WEIGHT
def test_distances(w):
    w_hat = np.round(w)
    for function, answer in ((r.l2, reference.l2), (r.kl, reference.kl)):
        agree(lambda v, f=function: f(v, torch.tensor(w_hat)), lambda v, g, a=answer: times_g(a)(v, w_hat, g), {"w": w})
        learned = torch.tensor(w_hat, requires_grad=True)
        assert not function(torch.tensor(w), learned).requires_grad


@WEIGHT
def test_with_dim_1_vectors_are_scalars(w):
    tensor = torch.tensor(w)
    assert r.linf(tensor).item() == np.abs(w).max()
    assert r.margin(tensor, torch.tensor(0.5)).item() == pytest.approx(0.5 + np.maximum(np.abs(w) - 0.5, 0).sum())
    hard = r.soft_min_max(tensor, torch.tensor(1e4))
    assert hard.item() == pytest.approx(w.max() - w.min(), abs=1e-3)
    for value in (r.linf(tensor, 1), r.margin(tensor, torch.tensor(0.5), 1), hard):
        assert value.shape == ()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_br_is_zero_exactly_where_every_weight_sits_on_its_grid_point(bits):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 7), generator=torch.Generator().manual_seed(0))
    scale = torch.tensor(0.0371)
    assert r.bin_regularization(codes * scale, scale, bits).item() == 0
    moved = codes * scale
    moved[0, 0] += 1e-4
    assert r.bin_regularization(moved, scale, bits).item() > 0


def test_kurtosis_of_distributions():
    values = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    assert r.kurtosis(values).item() == pytest.approx(0, abs=1e-3)
    constant = torch.full((5,), 2.0, requires_grad=True)
    penalty = r.kurtosis(constant)
    penalty.backward()
    assert penalty.item() == pytest.approx(1.8**2)
    assert constant.grad.tolist() == [0] * 5
