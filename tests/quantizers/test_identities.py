"""Special cases in which one method equals another."""

import pytest
import torch

import qcompress as qc
from qcompress.quantizers.n2uq import thresholds

q = qc.quantizers


def gradients(out, *leaves):
    return torch.autograd.grad(out, leaves, torch.arange(1.0, out.numel() + 1).reshape(out.shape).to(out.dtype))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_n2uq_with_equal_intervals_is_the_plain_straight_through_quantizer(bits):
    count = 2**bits - 1
    x = torch.linspace(-1.001, 3.0007, 1001, dtype=torch.float64, requires_grad=True)  # no value is a tie or an end
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    nonuniform = q.n2uq_activation(x, zero, torch.full((count,), 2 / count, dtype=torch.float64), one, one)
    plain = q.lsq(x, 2 / count * one, 0, count)
    torch.testing.assert_close(nonuniform, plain)
    torch.testing.assert_close(gradients(nonuniform, x), gradients(plain, x))


def test_n2uq_rounds_ties_up_and_has_a_slope_at_its_start():
    x = torch.tensor([0.0, 0.25, 1.25, 1.5], requires_grad=True)
    intervals, one = torch.full((3,), 0.5), torch.tensor(1.0)
    y = q.n2uq_activation(x, torch.tensor(0.0), intervals, one, one)
    assert y.tolist() == pytest.approx([0, 2 / 3, 2, 2])
    assert [*torch.autograd.grad(y.sum(), x)[0]] == pytest.approx([4 / 3, 4 / 3, 4 / 3, 0])


def test_n2uq_thresholds_are_where_its_codes_change():
    start, intervals, beta1 = torch.tensor(-0.1), torch.tensor([0.3, 0.7, 0.2]), torch.tensor(0.7)
    at = thresholds(start, intervals, beta1)
    below = torch.nextafter(at, torch.full_like(at, -torch.inf))
    codes = [q.n2uq_activation(x, start, intervals, beta1, torch.tensor(1.5)).tolist() for x in (below, at)]
    assert codes == [[0, 1, 2], [1, 2, 3]]


@pytest.mark.parametrize("init", ["lsq_plus", "lsq"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_n2uq_starts_from_a_uniform_grid(bits, init):
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)).relu() * 3
    uniform = q.LsqPlus(bits=bits, role="activation", configuration=1, init=init)
    thresholds = q.N2uqActivation(bits=bits, init=init)
    for quantizer in (uniform, thresholds):
        quantizer.initialise([x])
    torch.testing.assert_close(thresholds(x), uniform(x))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_by_default_n2uq_starts_at_the_scale_of_least_squared_error(bits):
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)).relu() * 3
    quantizer = q.N2uqActivation(bits=bits)
    quantizer.initialise([x])
    error = (quantizer(x) - x).square().mean()
    scales = torch.linspace(0.01, 1, 300) * x.max() / (2**bits - 1)
    least = min((q.lsq(x, scale, 0, 2**bits - 1) - x).square().mean() for scale in scales)
    assert error < 1.005 * least
    papers = q.N2uqActivation(bits=bits, init="n2uq")
    papers.initialise([x])
    assert error < 0.5 * (papers(x) - x).square().mean()


@pytest.mark.parametrize("axis", [0, 1])
def test_without_its_mask_an_n2uq_weight_gets_the_gradient_over_its_scale(axis):
    weight = (torch.randn(6, 6, 3, generator=torch.Generator().manual_seed(0)) * 0.05).requires_grad_()
    g = torch.arange(108.0).reshape(6, 6, 3)
    values, found = [], []
    for mask in (True, False):
        values.append(q.N2uqWeight(bits=2, axis=axis, mask=mask)(weight))
        found.append(torch.autograd.grad(values[-1], weight, g)[0])
    assert torch.equal(*values)
    others = [i for i in range(3) if i != axis]
    scale = weight.detach().abs().mean(others, keepdim=True) * 3 / 2
    torch.testing.assert_close(found[0], torch.where(weight.abs() < scale, g, 0.0))
    torch.testing.assert_close(found[1], g / scale)


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_lsq_plus_in_configuration_1_is_lsq(bits):
    x, scale = torch.randn(50, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    plain, plus = q.lsq(x, scale, 0, 2**bits - 1), q.lsq_plus(x, scale, torch.tensor(0.0), 0, 2**bits - 1)
    assert torch.equal(plain, plus)
    torch.testing.assert_close(gradients(plain, x, scale), gradients(plus, x, scale))
    modules = [
        q.Lsq(bits=bits, role="activation"),
        q.LsqPlus(bits=bits, role="activation", configuration=1, init="lsq"),
    ]
    for module in modules:
        module.initialise([x])
    assert torch.equal(modules[0](x), modules[1](x))


def test_ewgs_without_delta_is_lsq():
    x, scale = torch.randn(50, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    plain, scaled = q.lsq(x, scale, -4, 3), q.ewgs(x, scale, -4, 3, 0.0)
    assert torch.equal(plain, scaled)
    assert all(map(torch.equal, gradients(plain, x, scale), gradients(scaled, x, scale)))


@pytest.mark.parametrize("exponent", range(-110, 111, 5))
def test_powers_of_two_are_exact(exponent):
    for nearby in (0.0, -0.25, -0.99):
        assert q.tqt(torch.tensor(1e38), torch.tensor(exponent + nearby), 0, 1).item() == 2.0**exponent


def test_the_gradient_of_a_scale_does_not_cancel_in_float32():
    """8 bits, a million values, gradients of one sign: both long sums are a million times their difference."""
    x = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0))
    found = {}
    for dtype in (torch.float32, torch.float64):
        scale = torch.tensor(1 / 255, dtype=torch.float32).to(dtype).requires_grad_()
        found[dtype] = torch.autograd.grad(q.lsq(x.to(dtype), scale, 0, 255).sum(), scale)[0].item()
    assert found[torch.float32] == pytest.approx(found[torch.float64], rel=1e-2)
