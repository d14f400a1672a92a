"""Regularizers over whole models, in the user's own training loop."""

import copy
import math
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import qcompress as qc
from qcompress.errors import ConfigError
from qcompress.finetune.history import quantizer_values
from qcompress.regularizers.places import weights

r = qc.regularizers
KINDS = ["linf", "margin", "soft_min_max"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.head.weight = self.embedding.weight
        self.mean = nn.Parameter(torch.zeros(3, 3))


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 4, 2),
        nn.Flatten(), nn.Linear(100, 10),
    )  # fmt: skip


def test_weights_are_found_by_their_layers_and_tied_ones_once():
    assert [place.name for place in weights(net())] == ["0.weight", "3.weight", "4.weight", "6.weight"]
    assert [place.name for place in weights(Tied())] == ["embedding.weight"]
    assert [place.name for place in weights(nn.Linear(2, 2))] == ["weight"]
    attention = [place.name for place in weights(nn.MultiheadAttention(4, 2))]
    assert attention == ["in_proj_weight", "out_proj.weight"]
    assert [place.name for place in weights(nn.LSTM(2, 3))] == ["weight_ih_l0", "weight_hh_l0"]


def test_behind_a_parametrization_it_is_the_float_weight():
    model = net()
    quantizer = qc.quantizers.Lsq(bits=2, role="weight")
    original = model[0].weight
    parametrize.register_parametrization(model[0], "weight", quantizer)
    places = {place.name: place for place in weights(model)}
    assert list(places) == ["0.weight", "3.weight", "4.weight", "6.weight"]
    assert places["0.weight"].weight() is original
    assert places["0.weight"].quantizer() is quantizer
    assert places["3.weight"].quantizer() is None
    parametrize.register_parametrization(model[3], "weight", nn.Identity())
    assert places["3.weight"].quantizer() is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, 4])
def test_a_range_penalty_is_the_sum_of_its_layers(kind, dim):
    model = net()
    regularizer = r.RangeRegularizer(model, kind=kind, dim=dim, weight=0.5)
    wanted = 0.0
    for place in weights(model):
        w = place.weight()
        if kind == "linf":
            wanted += r.linf(w, dim)
        elif kind == "margin":
            wanted += r.margin(w, torch.minimum(2 * w.std(correction=0), w.abs().amax()), dim)
        else:
            wanted += r.soft_min_max(w, torch.tensor(0.1), dim)
    found = regularizer.penalty()
    assert found.shape == ()
    torch.testing.assert_close(found, 0.5 * wanted)
    assert len([*regularizer.parameters()]) == (0 if kind == "linf" else 4)
    assert {id(p) for p in regularizer.parameters()}.isdisjoint(id(p) for p in model.parameters())


def test_soft_min_max_of_a_model_may_be_relative():
    model = net()
    found = r.RangeRegularizer(model, kind="soft_min_max", dim=2, weight=0.5, relative=True).penalty()
    wanted = sum(r.soft_min_max(p.weight(), torch.tensor(0.1), 2, relative=True) for p in weights(model))
    torch.testing.assert_close(found, 0.5 * wanted)


def ranges(model):
    return [place.weight().detach().abs().amax().item() for place in weights(model)]


@pytest.mark.parametrize("kind", KINDS)
def test_plain_descent_shrinks_ranges(kind):
    model = net()
    before = ranges(model)
    regularizer = r.RangeRegularizer(model, kind=kind, weight=0.1)
    optimizer = torch.optim.SGD([*model.parameters(), *regularizer.parameters()], lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        regularizer.penalty().backward()
        optimizer.step()
    assert all(after < first for after, first in zip(ranges(model), before, strict=True))


def test_margin_keeps_weights_outside_under_plain_descent():
    """With M's full gradient, one step at rate 0.1 would move M beyond every weight, and the term would stop acting."""
    torch.manual_seed(0)
    model = nn.Linear(100, 50)
    with torch.no_grad():
        model.weight.normal_(std=0.05)
    regularizer = r.RangeRegularizer(model, kind="margin")
    optimizer = torch.optim.SGD([*model.parameters(), *regularizer.parameters()], lr=0.1)
    (first,) = ranges(model)
    for _ in range(300):
        optimizer.zero_grad()
        regularizer.penalty().backward()
        (m,) = regularizer.learned
        assert (model.weight.abs() > m).any()
        assert model.weight.grad.any()
        optimizer.step()
    assert ranges(model)[0] < 0.8 * first


def test_the_gradient_of_a_margin_is_divided_by_the_number_of_weights():
    model = nn.Linear(100, 50)
    regularizer = r.RangeRegularizer(model, kind="margin", weight=1.0)
    (m,) = regularizer.learned
    with torch.no_grad():
        m.fill_(0.05)
    regularizer.penalty().backward()
    outside = int((model.weight.abs() > 0.05).sum())
    assert m.grad.item() == pytest.approx((1 - outside) / 5000)


def test_a_margin_outside_the_range_comes_back():
    model = nn.Linear(10, 5)
    regularizer = r.RangeRegularizer(model, kind="margin")
    (m,) = regularizer.learned
    for wrong, wanted in ((99.0, ranges(model)[0]), (-1.0, 0.0)):
        with torch.no_grad():
            m.fill_(wrong)
        regularizer.penalty()
        assert m.item() == pytest.approx(wanted)


def test_br_over_plain_and_quantized_models():
    model = net()
    plain = r.BinRegularizer(model, bits=2)
    assert len([*plain.parameters()]) == 4
    places = weights(model)
    wanted = sum(r.bin_regularization(p.weight(), 2 * p.weight().detach().abs().mean(), 2) for p in places)
    torch.testing.assert_close(plain.penalty(), 0.5 * wanted)
    quantizer = qc.quantizers.Lsq(bits=4, role="weight", axis=0, channels=8)
    quantizer.initialise(model[0].weight)
    parametrize.register_parametrization(model[0], "weight", quantizer)
    original = model[0].parametrizations.weight.original
    some = r.BinRegularizer(model, weight=1.0)
    step = quantizer.scale.value().reshape(8, 1, 1, 1)
    torch.testing.assert_close(some.penalty(), r.bin_regularization(original, step, 4))
    assert len([*some.parameters()]) == 0
    assert len([*r.BinRegularizer(model, bits=2).parameters()]) == 3


def test_br_is_as_large_with_a_scale_per_channel_as_with_one():
    row = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    found = []
    for channels in (None, 64):
        model = nn.Linear(50, channels or 1)
        quantizer = qc.quantizers.Lsq(bits=2, role="weight", axis=channels and 0, channels=channels)
        with torch.no_grad():
            model.weight.copy_(row.expand_as(model.weight))
        quantizer.initialise(model.weight)
        parametrize.register_parametrization(model, "weight", quantizer)
        found.append(r.BinRegularizer(model).penalty())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("detach_targets", [True, False])
def test_br_moves_scales_only_where_asked(detach_targets):
    model = nn.Linear(10, 5)
    quantizer = qc.quantizers.Lsq(bits=2, role="weight")
    quantizer.initialise(model.weight)
    parametrize.register_parametrization(model, "weight", quantizer)
    r.BinRegularizer(model, detach_targets=detach_targets).penalty().backward()
    assert (quantizer.scale.value.raw.grad is None) == detach_targets
    plain = nn.Linear(10, 5)
    regularizer = r.BinRegularizer(plain, bits=2, detach_targets=detach_targets)
    regularizer.penalty().backward()
    assert all((p.grad is None) == detach_targets for p in regularizer.parameters())
    assert plain.weight.grad is not None


def test_the_losses_of_bins_add_up_to_br():
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    tuned = qc.prepare(
        net,
        qc.Plan.from_flags(bits=2),
        example_inputs=(torch.ones(2, 6),),
        regularizers=[qc.regularizers.BinRegularizer],
    )
    (regularizer,) = tuned.regularizers
    listed = regularizer.numbers()
    assert [(name, what) for name, what, _ in listed[:4]] == [("0.weight", f"bin[{code}]") for code in range(-2, 2)]
    assert sum(loss for *_, loss in listed) == pytest.approx(regularizer.penalty().item() / 0.5, rel=1e-5)
    assert set(listed) <= set(quantizer_values(tuned))
    scales = {(name, what): value for name, what, value in quantizer_values(tuned) if name == "0.weight"}
    first = tuned.quantizers()["0.weight"].scale.value()[0].item()
    assert scales["0.weight", "scale[0]"] == pytest.approx(first)


def test_br_gathers_weights_at_their_grid_points():
    model = nn.Linear(30, 30)
    regularizer = r.BinRegularizer(model, bits=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    first = regularizer.penalty().item()
    for _ in range(200):
        optimizer.zero_grad()
        regularizer.penalty().backward()
        optimizer.step()
    assert regularizer.penalty().item() < 0.5 * first


@pytest.mark.parametrize("kind", ["l2", "kl"])
@pytest.mark.parametrize("method", [name for name, found in qc.quantizers.QUANTIZERS.items() if found.weight])
def test_a_distance_is_the_sum_over_quantized_weights_of_that_to_the_stored_ones(kind, method):
    model, wanted = net(), 0.0
    for i in (0, 6):
        quantizer = qc.quantizers.way(method, "weight", 2).make(bits=2)
        quantizer.initialise(model[i].weight)
        stored = torch.from_numpy(quantizer.weight_artifact(model[i].weight.detach()).dequantize())
        wanted += getattr(r, kind)(model[i].weight.detach(), stored)
        parametrize.register_parametrization(model[i], "weight", quantizer)
    regularizer = r.DistanceRegularizer(model.train(), kind=kind, weight=3.0)
    before = copy.deepcopy(model.state_dict())
    found = regularizer.penalty()
    torch.testing.assert_close(found, 3 * wanted)
    found.backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learned == {"0.parametrizations.weight.original", "6.parametrizations.weight.original"}
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, before[name]), name


def test_a_distance_gathers_weights_at_their_grid_points():
    model = net()
    quantizer = qc.quantizers.Lsq(bits=2, role="weight")
    quantizer.initialise(model[6].weight)
    parametrize.register_parametrization(model[6], "weight", quantizer)
    for kind in ("l2", "kl"):
        trained = copy.deepcopy(model)
        regularizer = r.DistanceRegularizer(trained, kind=kind, weight=1000.0)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        first = regularizer.penalty().item()
        for _ in range(50):
            optimizer.zero_grad()
            regularizer.penalty().backward()
            optimizer.step()
        assert regularizer.penalty().item() < 0.01 * first


def test_kurtosis_is_a_mean_over_layers():
    model = net()
    wanted = torch.stack([r.kurtosis(place.weight(), 3.0) for place in weights(model)]).mean()
    torch.testing.assert_close(r.KurtosisRegularizer(model, target=3.0, weight=2.0).penalty(), 2 * wanted)


@pytest.mark.parametrize("make", [lambda m: r.RangeRegularizer(m), lambda m: r.BinRegularizer(m, bits=2)])
def test_state_is_saved_and_copied(make):
    model = net()
    first, second = make(model), make(model)
    with torch.no_grad():
        for p in first.parameters():
            p.mul_(0.9)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.penalty(), second.penalty())
    assert torch.equal(copy.deepcopy(first).penalty(), first.penalty())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: r.RangeRegularizer(net(), kind="l1"),
            "RangeRegularizer.kind must be one of linf, margin, soft_min_max, got 'l1'.",
        ),
        (lambda: r.RangeRegularizer(net(), dim=0), "RangeRegularizer.dim must be at least 1, got 0."),
        (
            lambda: r.RangeRegularizer(net(), weight=-1),
            "RangeRegularizer.weight must be finite and at least 0, got -1.",
        ),
        (
            lambda: r.RangeRegularizer(net(), kind="margin", relative=True),
            "RangeRegularizer.relative applies to kind soft_min_max only, got 'margin'; remove it.",
        ),
        (lambda: r.BinRegularizer(net(), weight=-1), "BinRegularizer.weight must be finite and at least 0, got -1."),
        (
            lambda: r.KurtosisRegularizer(net(), weight=-1),
            "KurtosisRegularizer.weight must be finite and at least 0, got -1.",
        ),
        (
            lambda: r.DistanceRegularizer(net(), kind="l1"),
            "DistanceRegularizer.kind must be one of l2, kl, got 'l1'.",
        ),
        (
            lambda: r.DistanceRegularizer(net(), weight=math.inf),
            "DistanceRegularizer.weight must be finite and at least 0, got inf.",
        ),
        (
            lambda: r.DistanceRegularizer(net()),
            "DistanceRegularizer found no quantized weight; attach quantizers first (qc.prepare).",
        ),
        (
            lambda: r.RangeRegularizer(nn.ReLU()),
            "ReLU has no weights of convolutions, matrix products or embeddings.",
        ),
        (
            lambda: r.BinRegularizer(net()),
            "BinRegularizer found no weight with a learned scale; give bits for weights without one.",
        ),
        (
            lambda: r.BinRegularizer(net(), bits=1),
            "BinRegularizer: a signed grid of 1 bit has no positive code; "
            "use 2 to 8 bits, or dorefa, dkm or n2uq for weights.",
        ),
        (lambda: r.linf(torch.ones(2), dim=0), "vector_dim must be at least 1, got 0."),
    ],
)
def test_invalid_arguments_are_rejected(make, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make()
