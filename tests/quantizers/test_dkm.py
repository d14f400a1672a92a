"""DKM: the tabulated form against the exact one, and the quantizer."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import qcompress as qc
from qcompress.errors import ConfigError
from qcompress.finetune import LoopConfig, Methods, prepare, train
from qcompress.palettes.scalar import fit_lut
from qcompress.plan.plan import Plan
from qcompress.quantizers.dkm import Dkm, choose_form, dkm
from qcompress.quantizers.soft_kmeans import table, tabulated
from qcompress.quantizers.soft_kmeans.forms import Exact
from qcompress.quantizers.soft_kmeans.table import Table


def weights(kind, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = 0.05 * torch.randn(count, generator=generator)
    if kind == "outliers":
        w[torch.randperm(count, generator=generator)[: count // 1000]] *= 8
    if kind == "bimodal":
        w = 0.3 * w + torch.where(torch.rand(count, generator=generator) < 0.5, -0.1, 0.1)
    return w


def start(w, bits, kind):
    if kind == "k-means":
        return torch.from_numpy(fit_lut(w.numpy(), bits))
    return w.quantile((torch.arange(1 << bits) + 0.5) / (1 << bits))


def gradients(w, c, tau, form, iterations=3):
    """Returns the soft weights, the centroids, and the gradients of both inputs from both outputs."""
    w, c = w.clone().requires_grad_(), c.clone().requires_grad_()
    out, moved = dkm(w, c, tau, iterations, form=form)
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(w.shape, generator=generator).to(w.dtype) + 20 * w.detach()
    g_c = torch.randn(c.shape, generator=generator).to(c.dtype)
    return out.detach(), moved.detach(), *torch.autograd.grad([out, moved], [w, c], [g, g_c])


def relative(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def check(w, c, tau):
    """Compares the form that "auto" takes with the exact one in float64; returns the form."""
    form = choose_form(w, c, tau, drift=0.0)
    found = gradients(w, c, tau, form)
    wanted = gradients(w.double(), c.double(), tau, "chunked")
    limit = 1e-2 if isinstance(form, Table) else 5e-4
    assert relative(found[0], wanted[0]) < 3e-4
    assert relative(found[2], wanted[2]) < limit
    assert float(torch.cosine_similarity(found[2].double(), wanted[2], dim=0)) > 0.9999
    # Where the attention is sharp, the first centroids' gradient comes from very few weights.
    assert float((found[3] - wanted[3]).norm()) < 0.05 * max(1e-3, float(wanted[3].norm()))
    return form


@pytest.mark.parametrize("kind", ["gaussian", "outliers", "bimodal"])
@pytest.mark.parametrize("first", ["k-means", "quantiles"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_form_that_is_chosen_is_right(kind, first, bits):
    w = weights(kind, 20_000)
    c, variance = start(w, bits, first), float(w.double().var())
    forms = [type(check(w, c, share * variance)) for share in (1e-1, 1e-3, 1e-4, 1e-6)]
    assert forms[:2] == [Table, Table]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gaussian", "outliers", "bimodal"])
@pytest.mark.parametrize("first", ["k-means", "quantiles"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_the_form_that_is_chosen_is_right_for_many_weights(kind, first, bits):
    w = weights(kind, 100_000)
    c, variance = start(w, bits, first), float(w.double().var())
    for share in (1e-3, 1e-4, 1e-5, 1e-6):
        check(w, c, share * variance)


@pytest.mark.parametrize("iterations", [1, 2, 8])
def test_a_table_serves_any_number_of_iterations(iterations):
    w = weights("gaussian", 10_000)
    c = start(w, 3, "k-means")
    found = gradients(w, c, 1e-5, "tabulated", iterations)
    wanted = gradients(w.double(), c.double(), 1e-5, "chunked", iterations)
    assert [relative(f, v) < 1e-2 for f, v in zip(found, wanted, strict=True)] == [True] * 4


def test_a_table_serves_bfloat16():
    w = weights("gaussian", 10_000).bfloat16()
    c = start(w.float(), 2, "k-means")
    out, *_ = gradients(w, c, 1e-5, "tabulated")
    wanted = gradients(w.double(), c.double(), 1e-5, "chunked")[0]
    assert out.dtype == torch.bfloat16
    assert relative(out, wanted) < 4e-3  # bfloat16 has 8 bits


def test_weights_beyond_the_bins_count_with_their_values():
    w = torch.cat([weights("gaussian", 10_000), torch.tensor([9.0, -7.0, 8.0])])
    c = torch.tensor([-0.04, 0.04])
    found, wanted = gradients(w, c, 1e-5, "tabulated"), gradients(w.double(), c.double(), 1e-5, "chunked")
    assert relative(found[1], wanted[1]) < 1e-5
    assert relative(found[2], wanted[2]) < 1e-2


def test_a_table_keeps_serving_when_weights_and_centroids_move_a_little():
    w, generator = weights("gaussian", 20_000), torch.Generator().manual_seed(2)
    c, tau = start(w, 4, "k-means"), 2e-6
    for _ in range(5):  # to the soft fixed point
        c = dkm(w, c, tau, 8)[1]
    form = choose_form(w, c, tau)
    assert isinstance(form, Table)
    w = w + 1e-4 * torch.randn(w.shape, generator=generator)
    c = dkm(w, c, tau, 1, form="chunked")[1]
    assert form.fits(c[None])
    assert not form.fits(c[None] + 0.01)
    wanted = gradients(w.double(), c.double(), tau, "chunked")[2]
    assert relative(gradients(w, c, tau, form)[2], wanted) < 1e-2


def test_steps_read_no_value_back_from_the_device(monkeypatch):
    for module in (table, tabulated):  # as on a GPU
        monkeypatch.setattr(module, "is_queued", lambda _: True)
    ws = [weights("gaussian", 9000).reshape(9, 1000), weights("bimodal", 70_000).reshape(70, 1000)]
    quantizers = [Dkm(bits=2), Dkm(bits=2, channels=70, rows_per_lut=35)]
    for quantizer, w in zip(quantizers, ws, strict=True):
        quantizer.initialise(w)
    Dkm.together(quantizers, ws)  # chooses the forms
    assert {type(quantizer._form) for quantizer in quantizers} == {Table}
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:  # tensors without values: whatever asks for one fails
        leaves = [fakes.from_tensor(w).requires_grad_() for w in ws]
        outs = Dkm.together(quantizers, leaves)
        found = torch.autograd.grad([out.sum() for out in outs], leaves)
    assert [tuple(gradient.shape) for gradient in found] == [(9, 1000), (70, 1000)]


def test_nan_reaches_the_output():
    w = weights("gaussian", 10_000)
    form = choose_form(w, torch.tensor([-0.04, 0.04]), 1e-4)
    w[5] = torch.nan
    assert dkm(w, torch.tensor([-0.04, 0.04]), 1e-4, form=form)[0].isnan().all()


@pytest.mark.parametrize("form", ["auto", "dense", "chunked"])
def test_a_constant_tensor_stays_as_it_is(form):
    w = torch.full((6, 5), 0.25, requires_grad=True)
    quantizer = Dkm(bits=2)
    quantizer.initialise(w)
    out, _ = dkm(w, quantizer.centroids[0, :, 0], quantizer.tau, form=form)
    torch.testing.assert_close(out, w)
    out.sum().backward()
    torch.testing.assert_close(w.grad, torch.ones_like(w))  # every weight moves their mean


def test_groups_have_their_own_centroids():
    w = torch.stack([weights("gaussian", 9000), 10 * weights("bimodal", 9000), weights("outliers", 9000)])
    c = torch.stack([start(row, 4, "k-means") for row in w])
    tau = 1e-2 * w.double().var(1)
    for form in ("tabulated", "chunked", "dense"):
        out, moved = dkm(w, c, tau, form=form)
        for row, centroids, t, found, after in zip(w, c, tau, out, moved, strict=True):
            wanted, wanted_after = dkm(row.double(), centroids.double(), float(t), form="chunked")
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(after.double(), wanted_after, rtol=1e-4, atol=1e-4)


def test_shapes_of_centroids():
    w = weights("gaussian", 64).reshape(8, 8)
    for shape, options in (((4,), {}), ((4, 2), {}), ((4, 16), {}), ((4, 2, 4), {}), ((2, 4), {"rows_per_lut": 4})):
        out, moved = dkm(w, torch.randn(shape), 1e-3, **options)
        assert out.shape == w.shape
        assert moved.shape == shape


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metric": "cosine"}, "dkm: metric must be one of squared, euclidean, got 'cosine'."),
        ({"iterations": 0}, "dkm: iterations must be at least 1, got 0."),
        ({"tau": 0.0}, "dkm: tau must be positive, got 0.0."),
        ({"tau": torch.ones(3)}, "dkm: tau must be one number, or one for each of 1 groups; got 3."),
        ({"w": torch.ones(4, 5).int()}, "dkm: w and centroids must hold floats, got torch.int32 and torch.float32."),
        ({"form": "sparse"}, "dkm: form must be one of auto, dense, chunked, tabulated, got 'sparse'."),
        (
            {"form": "tabulated", "metric": "euclidean"},
            'dkm: form="tabulated" needs scalar centroids, metric="squared"',
        ),
        ({"centroids": torch.zeros(2, 4, 3)}, "dkm: vectors of 1, 2, 4 or 8 weights are supported, got 3."),
        ({"centroids": torch.zeros(3, 16)}, "dkm: w of shape [4, 5] has 2 groups of 2 output channels"),
        ({"w": torch.zeros(0)}, "dkm: w must not be empty, and centroids must be [K], [K, D], [G, K] or [G, K, D]"),
        ({"centroids": torch.zeros(2, 4, 4), "rows_per_lut": 2}, "rows_per_lut=2 gives groups of 10 weights"),
    ],
)
def test_invalid_arguments_are_rejected(given, message):
    arguments = {"w": torch.ones(4, 5), "centroids": torch.tensor([0.0, 1.0]), "tau": 0.1, **given}
    with pytest.raises(ConfigError, match=re.escape(message)):
        dkm(**arguments)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 9}, "bits"),
        ({"vector_dim": 3}, "Dkm.vector_dim must be 1, 2, 4 or 8, got 3."),
        ({"vector_dim": 2, "rows_per_lut": 4}, "Dkm: vectors have one palette for the whole weight"),
        ({"metric": "cosine"}, "Dkm.metric must be one of squared, euclidean, got 'cosine'."),
        ({"tau": (1.0, 0.0)}, "Dkm.tau must be two positive numbers, the first and the last value, got (1.0, 0.0)."),
        ({"tau": 0.1}, "Dkm.tau must be two positive numbers, the first and the last value, got 0.1."),
        ({"hold": 1.0}, "Dkm.hold must be a share of training below 1, got 1.0."),
        ({"iterations": 0}, "Dkm.iterations and Dkm.every must be at least 1, got 0 and 16."),
    ],
)
def test_invalid_settings_are_rejected(given, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Dkm(**{"bits": 2, **given})


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("settings", [{}, {"metric": "euclidean"}, {"vector_dim": 2}])
def test_softness_does_not_depend_on_the_size_of_weights(factor, settings):
    w = weights("gaussian", 4000)
    outs = []
    for scale in (1.0, factor):
        quantizer = Dkm(bits=3, **settings)
        quantizer.initialise(scale * w)
        outs.append(quantizer(scale * w) / scale)
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-3, atol=1e-4)


def test_an_absolute_tau_is_taken_as_it_is():
    quantizer = Dkm(bits=2, tau=(1e-4, 1e-6), absolute=True)
    w = weights("gaussian", 1000)
    quantizer.initialise(w)
    assert float(quantizer.tau) == pytest.approx(1e-4)
    quantizer.advance(0.5)
    quantizer(w)
    assert float(quantizer.tau) == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("settings", "last"),
    [({"bits": 1}, 1.0), ({"bits": 1, "hold": 0.3}, 0.7), ({"bits": 1, "vector_dim": 2, "hold": 0.5}, 0.5)],
)
def test_tau_stays_at_the_end_of_training(settings, last):
    quantizer, w = Dkm(tau=(1e-2, 1e-4), absolute=True, every=1, **settings), weights("gaussian", 1000)
    quantizer.initialise(w)
    for done, tau in ((0.0, 1e-2), (last / 2, 1e-3), (last, 1e-4), (1.0, 1e-4)):
        quantizer.advance(done)
        quantizer(w)
        assert float(quantizer.tau) == pytest.approx(tau)


def test_soft_weights_become_hard_as_training_goes_on():
    quantizer, w = Dkm(bits=2, every=1), weights("gaussian", 5000)
    quantizer.initialise(w)
    drops = []
    for done in (0.0, 0.5, 1.0):
        quantizer.advance(done)
        quantizer(w)
        drops.append(quantizer.drop(w))
    assert drops[0] > 2 * drops[1] > 4 * drops[2] > 0
    assert drops[2] < 0.05


def test_centroids_start_at_their_soft_fixed_point():
    quantizer, w = Dkm(bits=2), weights("gaussian", 5000)
    quantizer.initialise(w)
    quantizer(w)
    before = quantizer.centroids.clone()
    quantizer(w)
    torch.testing.assert_close(quantizer.centroids, before, rtol=0, atol=1e-4 * float(w.std()))


def test_the_stored_palette_holds_the_means_of_its_weights():
    quantizer, w = Dkm(bits=2), weights("gaussian", 4000).reshape(40, 100)
    quantizer.initialise(w)
    quantizer(w)
    artifact = quantizer.weight_artifact(w)
    for code, entry in enumerate(artifact.lut[0]):
        assert w.numpy()[artifact.codes == code].mean() == pytest.approx(entry, rel=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_weights_are_quantized_together_as_they_are_alone(bits):
    shapes = [(16, 3, 3, 3), (32, 16, 3, 3), (10, 64), (600, 40)]
    generator = torch.Generator().manual_seed(0)
    ws = [0.1 * torch.randn(shape, generator=generator) for shape in shapes]
    quantizers = [
        Dkm(bits=bits, channels=len(w), rows_per_lut=rows) for w, rows in zip(ws, (None, 16, 5, None), strict=True)
    ]
    for quantizer, w in zip(quantizers, ws, strict=True):
        quantizer.initialise(w)
    alone = copy.deepcopy(quantizers)
    leaves = [w.clone().requires_grad_() for w in ws]
    assert any(
        isinstance(q._chosen(q._groups(w).split(w), q._groups(w)), Table) for q, w in zip(alone, ws, strict=True)
    )
    for first in (0, 1, 0):  # another set of weights may be computed in one go in the next step
        found = Dkm.together(quantizers[first:], leaves[first:])
        wanted = [quantizer(w) for quantizer, w in zip(alone[first:], leaves[first:], strict=True)]
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(quantizers, alone, strict=True):
        torch.testing.assert_close(a.centroids, b.centroids, rtol=1e-4, atol=1e-6)
    together = torch.autograd.grad([out.square().sum() for out in found], leaves)
    separate = torch.autograd.grad([out.square().sum() for out in wanted], leaves)
    for a, b in zip(together, separate, strict=True):
        assert relative(a, b.double()) < 1e-2


class Small(nn.Module):
    """A convolution, an embedding and a matrix."""

    def __init__(self):
        super().__init__()
        self.table, self.conv, self.fc = nn.Embedding(64, 16), nn.Conv1d(16, 32, 3), nn.Linear(32, 2)

    def forward(self, ids):
        return self.fc(self.conv(self.table(ids).mT).relu().mean(2))


@pytest.mark.parametrize(
    ("plan", "epochs"),
    [
        ({"bits": 1}, 15),
        ({"bits": 2, "rows_per_lut": 8}, 15),
        ({"bits": 4, "vector_dim": 4}, 15),
        pytest.param({"bits": 8}, 12, marks=pytest.mark.slow),
    ],
)
def test_a_trained_model_becomes_palettes(plan, epochs):
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (32, 12))
    labels = (ids < 32).sum(1) // 7 % 2
    tuned = prepare(Small(), Plan.from_flags(**plan), example_inputs=ids, methods=Methods(weights="dkm"))
    losses = [r.loss for r in train(tuned, [(ids, labels)] * 4, LoopConfig(epochs=epochs, rate=1e-2))]
    assert losses[-1] < 0.5 * losses[0]
    assert set(tuned.drops()) == {"table.weight", "conv.weight", "fc.weight"}
    small = tuned.finalize()
    kinds = {name: artifact.kind for name, artifact in small.artifacts.items() if "weight" in name}
    wanted = {"table.weight", "conv.weight", "fc.weight"}
    assert {name for name in wanted if kinds[name] == "palette"} >= (
        {"table.weight", "conv.weight"} if plan["bits"] < 8 else set()
    )
    tuned.eval()
    torch.testing.assert_close(small.to_module()(ids), tuned(ids))
    assert any(note.startswith("Stored weights differ from those of the last training step: ") for note in small.notes)


def test_training_goes_on_from_a_state_dict():
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (32, 12))
    tuned = prepare(Small(), Plan.from_flags(bits=2), example_inputs=ids, methods=Methods(weights="dkm"))
    list(train(tuned, [(ids, ids[:, 0] % 2)], LoopConfig(epochs=5, rate=1e-2)))
    fresh = prepare(Small(), Plan.from_flags(bits=2), example_inputs=ids, methods=Methods(weights="dkm"))
    fresh.load_state_dict(tuned.state_dict())
    for name, artifact in fresh.finalize().artifacts.items():
        np.testing.assert_array_equal(artifact.dequantize(), tuned.finalize().artifacts[name].dequantize())


def test_a_form_for_another_tensor_is_rejected():
    form = choose_form(weights("gaussian", 20_000), torch.tensor([-0.04, 0.04]), 1e-4)
    with pytest.raises(
        ConfigError, match=r"^dkm: the form was chosen for 20,000 weights, but w has 5; call choose_form"
    ):
        dkm(torch.ones(5), torch.tensor([-0.04, 0.04]), 1e-4, form=form)


def test_a_small_tensor_is_computed_exactly():
    assert choose_form(torch.randn(50), torch.tensor([-1.0, 1.0]), 0.1) == Exact("dense")
    assert isinstance(qc.quantizers.QUANTIZERS["dkm"].weight.make(bits=1), Dkm)


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({"bits": 2}, "table"),
        ({"bits": 2, "rows_per_lut": 16, "channels": 64}, "table"),
        ({"bits": 4, "vector_dim": 2}, "chunked"),
        ({"bits": 5, "vector_dim": 2}, "near"),
    ],
)
def test_training_goes_on_bit_for_bit_from_a_state_that_json_can_hold(options, form):
    def steps(quantizer, w, numbers):
        for number in numbers:
            quantizer.advance(number / 40)
            soft = quantizer(w)
            (gradient,) = torch.autograd.grad(soft.square().sum(), w)
            w.data -= 0.01 * gradient
        return w.detach().clone(), quantizer.centroids.clone()

    first = weights("gaussian", 64 * 80).view(64, 80)
    quantizer, w = Dkm(**options), first.clone().requires_grad_()
    quantizer.initialise(first)
    steps(quantizer, w, range(13))
    assert getattr(quantizer._form, "kind", "table") == form
    state = {name: copy.deepcopy(value) for name, value in quantizer.state_dict().items()}
    state["_extra_state"] = json.loads(json.dumps(state["_extra_state"]))
    kept = w.detach().clone().requires_grad_()
    wanted = steps(quantizer, w, range(13, 30))
    fresh = Dkm(**options)
    fresh.initialise(first)
    fresh.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(steps(fresh, kept, range(13, 30)), wanted, strict=True))


def test_a_palette_that_outweighs_its_codes_is_remarked():
    quantizer, w = Dkm(bits=8, vector_dim=8), weights("gaussian", 4096)
    quantizer.initialise(w)
    assert quantizer.remark(quantizer.weight_artifact(w)).startswith(
        "its palette takes 8,192 bytes and its codes 512; fewer bits"
    )
    scalar = Dkm(bits=1)
    scalar.initialise(w)
    assert scalar.remark(scalar.weight_artifact(w)) is None
    half = Dkm(bits=8, vector_dim=8, lut_dtype="float16")
    half.initialise(w)
    assert half.weight_artifact(w).lut.nbytes == 4096


def test_integer_layers_get_integer_palettes():
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (32, 12))
    plan = Plan.from_flags(bits=2, activation_bits=4)
    small = prepare(Small(), plan, example_inputs=ids, methods=Methods(weights="dkm")).finalize()
    assert small.artifacts["conv.weight"].lut.dtype == np.int8
    assert small.artifacts["conv.weight"].integers() is not None
