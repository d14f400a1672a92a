"""A model in training computes the same as its export, and can be unwrapped unchanged."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from qcompress.artifacts import FloatWeight, IntegerWeight
from qcompress.compressed.model import CompressedModel
from qcompress.errors import ConfigError, DataError
from qcompress.finetune.attach import prepare
from qcompress.finetune.methods import Methods
from qcompress.finetune.prepared import Prepared
from qcompress.graph.marks import MarkedRunner, mark, rounding
from qcompress.graph.options import ProgramOptions
from qcompress.graph.tracing import from_module
from qcompress.plan.plan import Plan, parse_plan
from qcompress.quantizers import Lsq, LsqPlus, N2uqActivation
from qcompress.regularizers import BinRegularizer, DistanceRegularizer, KurtosisRegularizer
from qcompress_exporters import build

MIN_MAX = Methods(weight_options={"init": "min_max"}, activation_options={"init": "min_max"})


class Residual(nn.Module):
    """A sum, activations in place, dropout, BatchNorms with every sign of γ."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.drop, self.fc = nn.Dropout(dropout), nn.Linear(8, 4)
        with torch.no_grad():
            for norm in (self.norm1, self.norm2):
                norm.weight.copy_(torch.linspace(-1, 1.2, 8))
                norm.running_mean.normal_(0, 0.1)
                norm.running_var.uniform_(0.3, 0.6)
            self.norm2.weight[2] = 0

    def forward(self, x):
        y = functional.relu(self.norm1(self.conv1(x)), inplace=True)
        y = y + self.norm2(self.conv2(y))
        return self.fc(self.drop(functional.relu_(y).mean((2, 3))))


@pytest.fixture
def x():
    return torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def plan(bits, activation_bits=None):
    return Plan.from_flags(bits=bits, activation_bits=activation_bits)


def without_codes():
    return parse_plan("version = 1\n[default]\nskip = true")


def test_the_model_computes_what_the_artifacts_and_grids_say(x):
    tuned = prepare(Residual().eval(), plan(4, 8), example_inputs=(x,), methods=MIN_MAX)
    tuned.snap_offsets()
    small = tuned.finalize()
    assert small.compute == "int8"
    assert len(small.activations) == 5
    assert all(grid.zero_point is not None for grid in small.activations.values())
    program = small.program.with_state({name: a.dequantize() for name, a in small.artifacts.items()})
    grids = list(small.activations.values())
    wanted = MarkedRunner(mark(program, list(small.activations)))({"x": x.numpy()}, rounding(grids))["output"]
    with torch.no_grad():
        got = tuned(x).numpy()
    deviation = wanted.std(axis=0).max()
    assert np.sqrt(np.square(got - wanted).mean()) < 0.03 * deviation  # some ties are rounded the other way


@pytest.mark.parametrize("batchnorm", ["train", "freeze", "fold"])
def test_weights_are_stored_as_they_were_trained_with(x, batchnorm):
    model = Residual().eval()
    tuned = prepare(model, plan(3), example_inputs=(x,), batchnorm=batchnorm)
    small = tuned.finalize()
    with torch.no_grad():
        wanted = tuned(x)
    np.testing.assert_allclose(small.to_module()(x).detach(), wanted, rtol=1e-4, atol=1e-5)
    assert np.array_equal(small.artifacts["fc.weight"].dequantize(), tuned.model.fc.weight.detach())
    folded = small.artifacts["conv2.weight"]
    assert isinstance(folded, IntegerWeight)
    if batchnorm != "fold":
        trained = model.conv2.weight.detach().double()
        factor = model.norm2.weight.double() / (model.norm2.running_var.double() + model.norm2.eps).sqrt()
        wanted_OIHW = (trained * factor.detach()[:, None, None, None]).numpy()
        np.testing.assert_allclose(folded.dequantize(), wanted_OIHW, rtol=1e-6)
        assert (folded.scale < 0).any()
        assert not folded.dequantize()[2].any()


def test_without_quantizers_it_trains_as_the_module_does(x):
    module, again = Residual(dropout=0.5), Residual(dropout=0.5)
    tuned = prepare(again, without_codes(), example_inputs=(x,))
    assert all(module.training for module in tuned.modules())
    assert tuned.finalize().notes == ()
    torch.manual_seed(3)
    wanted = module(x)
    torch.manual_seed(3)
    got = tuned(x)
    assert torch.equal(got, wanted)
    assert all(torch.equal(a, b) for a, b in zip(again.buffers(), module.buffers(), strict=True))
    got.sum().backward()
    wanted.sum().backward()
    for mine, theirs in zip(again.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_frozen_statistics_stay(x):
    model = Residual()
    before = model.norm1.running_mean.clone()
    tuned = prepare(model, plan(4), example_inputs=(x,), batchnorm="freeze")
    tuned(x).sum().backward()
    assert torch.equal(model.norm1.running_mean, before)
    assert model.norm1.weight.grad is not None


def test_folded_training_leaves_the_module_alone(x):
    model = Residual().eval()
    before = copy.deepcopy(model.state_dict())
    tuned = prepare(model, plan(4), example_inputs=(x,), batchnorm="fold")
    tuned(x).sum().backward()
    assert {name for name, _ in tuned.model.named_parameters()} >= {"conv1.bias", "fc.bias"}
    assert all(p.grad is not None for p in tuned.parameters())
    assert not parametrize.is_parametrized(model.conv1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_every_parameter_learns(x):
    tuned = prepare(Residual(), plan(2, 4), example_inputs=(x,), regularizers=[BinRegularizer])
    (tuned(x).square().sum() + tuned.penalty()).backward()
    assert [name for name, p in tuned.named_parameters() if p.grad is None] == []


def test_state_dict_and_deepcopy(x):
    tuned = prepare(Residual().eval(), plan(2, 4), example_inputs=(x,))
    other = copy.deepcopy(tuned)
    with torch.no_grad():
        wanted = tuned(x)
        for parameter in other.parameters():
            parameter.add_(0.01)
        assert not torch.equal(other(x), wanted)
        assert torch.equal(tuned(x), wanted)
        tuned.snap_offsets()
        other.load_state_dict(tuned.state_dict())
        assert torch.equal(other(x), tuned(x))


def test_unwrapping_gives_the_plain_model_back(x):
    model = Residual().eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        wanted = model(x)
        found = prepare(model, plan(2, 4), example_inputs=(x,)).unwrap()
        assert found is model
        assert set(model.state_dict()) == set(before)
        assert torch.equal(model(x), wanted)


def test_tied_weights_are_one(x):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids):
            return self.out(self.embed(ids).relu())

    ids = torch.randint(0, 10, (4, 5))
    tuned = prepare(Tied(), plan(2), example_inputs=(ids,))
    assert len(tuned.quantizers()) == 1
    weight = tuned.finalize().artifacts["embed.weight"].dequantize()
    wanted = functional.linear(functional.embedding(ids, torch.from_numpy(weight)).relu(), torch.from_numpy(weight))
    torch.testing.assert_close(tuned(ids).detach(), wanted)


def test_inputs_by_name_and_several_outputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

        def forward(self, left, right):
            return {"sum": self.a(left) + self.b(right), "left": self.a(left)}

    left, right = torch.randn(6, 4), torch.randn(6, 5)
    tuned = prepare(Two(), plan(4, 8), example_inputs={"left": left, "right": right})
    found = tuned(left, right=right)
    assert list(found) == ["sum", "left"]
    assert torch.equal(found["sum"], tuned(right=right, left=left)["sum"])
    with pytest.raises(DataError, match=r"^The model was prepared with the inputs left, right, got left\.$"):
        tuned(left)


def test_one_input_may_be_a_plain_tensor(x):
    tuned = prepare(Residual().eval(), plan(4, 4), example_inputs=x)
    with torch.no_grad():
        assert torch.equal(tuned(x), prepare(Residual().eval(), plan(4, 4), example_inputs=(x,))(x))


def test_a_method_without_negative_codes_leaves_such_sites_to_lsq_plus_and_says_so(x):
    methods = Methods(activations="n2uq", activation_options={"init": "n2uq"})
    tuned = prepare(Residual(), plan(2, 2), example_inputs=(x,), methods=methods, placement="paper")
    kinds = dict(zip((s.name for s in tuned.parts.sites), map(type, tuned.activations), strict=True))
    assert kinds.pop("x") is LsqPlus
    assert set(kinds.values()) == {N2uqActivation}
    note = (
        "lsq_plus quantizes the activations at x, because n2uq has no codes for negative values; "
        "activation_options (init) had no effect there."
    )
    assert tuned.notes == tuned.finalize().notes == (note,)


def test_notes_on_methods_reach_the_export_of_a_saved_model(x, tmp_path):
    """Weights and activations: what took another method's place, and what had no effect."""
    methods = Methods(weights="n2uq", activations="pact", per_channel=False, bias_bits=8)
    tuned = prepare(Residual(), plan(2, 2), example_inputs=(x,), methods=methods)
    assert tuned.notes == (
        "per_channel = False had no effect: n2uq has a scale for each output channel.",
        "lsq_plus quantizes the activations at x, conv2d_1, because pact has no codes for negative values.",
        "lsq quantizes the biases of layers whose weights n2uq quantizes.",
        "bias_bits = 8 had no effect at conv1.weight, conv2.weight, whose layers have no bias in training.",
        "2 of 3 layers take activations at 2 bits, 1 at 8.",
    )
    tuned.finalize().save(tmp_path / "ckpt")
    assert set(tuned.notes[:-1]) <= set(build(CompressedModel.load(tmp_path / "ckpt")).report.notes)


def test_the_widths_of_activations_are_counted(x):
    tuned = prepare(Residual(), plan(2, 2), example_inputs=(x,))
    assert tuned.activation_bits() == {"conv1.weight": 2, "conv2.weight": 8, "fc.weight": 2}
    text = "2 of 3 layers take activations at 2 bits, 1 at 8"
    assert repr(tuned) == f"Prepared(Residual; bits of weights: 3 at 2; {text})"
    assert repr(prepare(Residual(), plan(4), example_inputs=(x,))) == "Prepared(Residual; bits of weights: 3 at 4)"
    paper = prepare(Residual(), plan(2, 2), example_inputs=(x,), placement="paper")
    assert set(paper.activation_bits().values()) == {2}
    report = build(tuned.finalize()).report
    assert {layer.weight: layer.activation_bits for layer in report.layers} == tuned.activation_bits()


def test_sites_have_options_of_their_own(x):
    options = {"*": {"configuration": 4}, "conv2.weight": {"configuration": 1}, "mean": {"learn_offset": False}}
    methods = Methods(site_options=options)
    tuned = prepare(Residual(), plan(2, 4), example_inputs=(x,), methods=methods, placement="paper")
    offsets = {s.name: q.offset for s, q in zip(tuned.parts.sites, tuned.activations, strict=True)}
    assert offsets["x"].requires_grad
    assert offsets["conv2.weight"] is None
    assert not offsets["mean"].requires_grad
    methods = Methods(site_options={"conv2.wieght": {}})
    with pytest.raises(ConfigError, match=r"^Methods\.site_options: 'conv2\.wieght' matches .* mean conv2\.weight\?$"):
        prepare(Residual(), plan(2, 4), example_inputs=(x,), methods=methods, placement="paper")


def test_a_fixed_offset_stays_and_is_exported(x):
    methods = Methods(activation_options={"configuration": 3, "learn_offset": False})
    tuned = prepare(Residual(), plan(4, 4), example_inputs=(x,), methods=methods)
    before = {s.key: q.offset.item() for s, q in zip(tuned.parts.sites, tuned.activations, strict=True)}
    scales = [q.scale.value.raw.detach().clone() for q in tuned.activations]
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        tuned(x).square().sum().backward()
        optimizer.step()
    assert all(old != q.scale.value.raw for old, q in zip(scales, tuned.activations, strict=True))
    assert {s.key: q.offset.item() for s, q in zip(tuned.parts.sites, tuned.activations, strict=True)} == before
    grids = tuned.finalize().activations
    assert {key: float(grids[key].offset) for key in before} == pytest.approx(before)


def test_options_without_effect_are_noted(x):
    methods = Methods(activations="pact", activation_options={"init": "min_max"})
    tuned = prepare(Residual(), plan(4), example_inputs=(x,), methods=methods)
    assert tuned.finalize().notes == ("activation_options (init) had no effect: no activation is quantized.",)


def test_placement_is_that_of_export(x):
    deployed = prepare(Residual(), plan(4, 4), example_inputs=(x,))
    papers = prepare(Residual(), plan(4, 4), example_inputs=(x,), placement="paper")
    assert len(papers.activations) == 3 < len(deployed.activations)


def test_statistics_are_estimated_again(x):
    tuned = prepare(Residual().eval(), plan(8), example_inputs=(x,))
    tuned.reestimate_batchnorm(x.split(8))
    norm, conv = tuned.model.norm1, tuned.model.conv1
    with torch.no_grad():
        parts = [conv(part).mean((0, 2, 3)) for part in x.split(8)]
    torch.testing.assert_close(norm.running_mean, torch.stack(parts).mean(0), rtol=1e-4, atol=1e-5)
    assert not norm.training
    assert norm.momentum == 0.1


def test_regularizers_add_up(x):
    kinds = [BinRegularizer, KurtosisRegularizer, DistanceRegularizer, partial(DistanceRegularizer, kind="kl")]
    tuned = prepare(Residual(), plan(2), example_inputs=(x,), regularizers=kinds)
    parts = [regularizer.penalty() for regularizer in tuned.regularizers]
    torch.testing.assert_close(tuned.penalty(), sum(parts))
    assert all(part > 0 for part in parts)
    assert prepare(Residual(), plan(2), example_inputs=(x,)).penalty() == 0


def test_quantizers_have_names(x):
    tuned = prepare(Residual(), plan(2, 4), example_inputs=(x,), methods=Methods(per_channel=False))
    found = tuned.quantizers()
    assert list(found)[:3] == ["conv1.weight", "conv2.weight", "fc.weight"]
    assert "x (activation)" in found
    assert isinstance(found["conv1.weight"], Lsq)
    assert len(tuned.quantizer_parameters()) == sum(1 for q in found.values() for _ in q.parameters())
    assert found["conv1.weight"].scale.value().shape == ()


def test_the_setting_of_bin_regularization_on_tqt(x):
    """Table 9: one width for all layers, operands of sums quantized, 8-bit biases, BatchNorm folded while training."""
    methods = Methods(weights="tqt", activations="tqt", bias_bits=8)
    tuned = prepare(
        Residual(), plan(4, 4), example_inputs=(x,), methods=methods, regularizers=[BinRegularizer], batchnorm="fold"
    )
    (tuned(x).square().sum() + tuned.penalty()).backward()
    assert all(p.grad is not None for p in tuned.parameters())
    found = tuned.quantizers()
    assert {"conv1.bias", "conv2.bias", "fc.bias"} < set(found)
    scale = found["conv1.bias"].step_size(tuned.model.conv1.bias).item()
    assert np.log2(scale) == round(np.log2(scale))
    steps = tuned.model.conv1.bias.detach().numpy() / scale
    assert np.array_equal(steps, steps.round())
    small = tuned.finalize()
    sites = [name for name, _ in small.activations]
    assert "conv2d_1" in sites  # an operand of the sum
    assert any("relu" in name for name in sites)  # its result
    stored = small.artifacts["conv1.bias"]
    step = float(small.activations["x", -1].scale) * np.abs(small.artifacts["conv1.weight"].scale).max()
    np.testing.assert_allclose(stored.dequantize(), tuned.model.conv1.bias.detach(), atol=0.51 * step)  # in int32 steps
    floats = prepare(Residual(), plan(4), example_inputs=(x,), methods=methods, batchnorm="fold")
    assert np.array_equal(floats.finalize().artifacts["fc.bias"].dequantize(), floats.model.fc.bias.detach())


class Scaled(nn.Module):
    """A module with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return x @ self.table


@pytest.mark.parametrize(
    ("layer", "shape", "name"),
    [
        (nn.Conv1d(4, 6, 3), (2, 4, 9), "weight"),
        (nn.Conv3d(2, 4, 2), (2, 2, 4, 4, 4), "weight"),
        (nn.ConvTranspose2d(3, 5, 2), (2, 3, 4, 4), "weight"),
        (nn.MultiheadAttention(8, 2, batch_first=True), (2, 3, 8), "in_proj_weight"),
        (Scaled(), (2, 6), "table"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_layers_of_every_kind(layer, shape, name):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x):
            if isinstance(self.layer, nn.MultiheadAttention):
                return self.layer(x, x, x, need_weights=False)[0]
            return self.layer(x)

    x = torch.randn(shape)
    model = Net().eval()
    tuned = prepare(model, plan(4), example_inputs=(x,))
    small = tuned.finalize()
    stored = small.artifacts[f"layer.{name}"]
    assert isinstance(stored, IntegerWeight)
    assert np.array_equal(stored.dequantize(), getattr(model.layer, name).detach())
    with torch.no_grad():
        torch.testing.assert_close(small.to_module()(x), tuned(x))
    tuned(x).sum().backward()
    assert all(p.grad is not None for p in tuned.quantizer_parameters())


def test_what_would_not_get_smaller_is_stored_as_floats():
    tuned = prepare(nn.Linear(1, 1), plan(8), example_inputs=(torch.randn(2, 1),))
    stored = tuned.finalize().artifacts["weight"]
    assert isinstance(stored, FloatWeight)
    assert stored.reason.startswith("too small")
    assert np.array_equal(stored.dequantize(), tuned.model.weight.detach())


def test_nan_is_not_stored():
    model = nn.Linear(4, 4)
    tuned = prepare(model, plan(4), example_inputs=(torch.randn(2, 4),))
    with torch.no_grad():
        model.bias[1] = torch.nan
    with pytest.raises(
        ConfigError, match=r"^bias must be finite, but training made it NaN or Inf; go back to the last good"
    ):
        tuned.finalize()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"methods": Methods(weights="lqs")}, r"^Unknown method 'lqs'; known: .* Did you mean lsq"),
        ({"methods": Methods(weights="pact")}, r"^pact does not quantize weights;"),
        ({"methods": Methods(activations="dorefa")}, r"^dorefa does not quantize activations;"),
        ({"plan": plan(1)}, r"^lsq quantizes weights at 2 to 8 bits, got 1; dorefa, dkm and n2uq work there\.$"),
        ({"batchnorm": "none"}, r"^batchnorm must be one of train, freeze, fold, got 'none'\.$"),
    ],
)
def test_conflicting_arguments_are_rejected(x, changed, message):
    model = Residual()
    given = {"plan": plan(2, 4), "example_inputs": (x,), **changed}
    with pytest.raises(ConfigError, match=message):
        prepare(model, given.pop("plan"), **given)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


@pytest.mark.parametrize(
    ("field", "where"),
    [
        ("rows_per_lut = 4", "post-hoc compression and the method dkm"),
        ("vector_dim = 2", "post-hoc compression and the method dkm"),
        ('lut_dtype = "float16"', "post-hoc compression and the method dkm"),
        ('scheme = "uniform"\nblock_size = 2', "post-hoc compression"),
    ],
)
def test_a_plan_for_palettes_is_rejected(x, field, where):
    chosen = parse_plan(f"version = 1\n[default]\nbits = 4\n{field}", "plan.toml")
    *_, last = field.splitlines()
    message = (
        rf"^(conv1|fc)\.weight: {last} \(plan\.toml:\d \[default\]\) is supported by {where} only; remove it from "
        r"plans passed to prepare\(\)\.$"
    )
    with pytest.raises(ConfigError, match=message):
        prepare(Residual(), chosen, example_inputs=(x,))


def test_a_model_is_prepared_once(x):
    tuned = prepare(Residual(), plan(4), example_inputs=(x,))
    with pytest.raises(
        ConfigError, match=r"^prepare needs a float model, but this one is already prepared; call unwrap\(\) on it"
    ):
        prepare(tuned.model, plan(2), example_inputs=(x,))
    assert len(prepare(tuned.unwrap(), plan(2), example_inputs=(x,)).quantizers()) == 3


def test_a_batchnorm_that_fits_no_scale():
    net = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 4, 3, 3)
    with pytest.raises(
        ConfigError, match=r'^0\.weight: the BatchNorm after a grouped .* \(\[name\."0\.weight"\] skip = true\)'
    ):
        prepare(net, plan(4), example_inputs=(x,))
    assert isinstance(prepare(net, plan(4), example_inputs=(x,), batchnorm="fold"), Prepared)


class Recurrent(nn.Module):
    """Weights that are no weights of common layers: recurrent, behind a norm, a table of positions, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.1 * torch.randn(1, 7, 16))
        self.layer = nn.LSTM(16, 24, 2, batch_first=True, bidirectional=True)
        with pytest.warns(FutureWarning, match="deprecated"):
            self.old = nn.utils.weight_norm(nn.Linear(48, 16))
        self.new = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.register_buffer("mixing", torch.randn(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x + self.positions)[0].mean(1)
        return self.new(self.old(y).relu()).relu() @ self.mixing


def test_every_parameter_trains_with_a_quantizer() -> None:
    torch.manual_seed(0)
    net, x = Recurrent(), torch.randn(8, 7, 16)
    tuned = prepare(net, Plan.from_flags(bits=4), example_inputs=(x,))
    recurrent = {f"layer.weight_{i}h_l{n}{way}" for i in "ih" for n in (0, 1) for way in ("", "_reverse")}
    assert {*tuned.quantizers()} == {"positions", "old.weight_v", "mixing", *recurrent}
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = tuned(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    wanted = tuned.eval()(x).detach()
    small = tuned.finalize()
    assert {n for n, a in small.artifacts.items() if not a.reason} == {*tuned.quantizers()}
    torch.testing.assert_close(small.to_module()(x), wanted, rtol=1e-4, atol=1e-4)


def test_a_program_with_computed_weights_is_refused_beside_its_module() -> None:
    net, x = nn.utils.parametrizations.weight_norm(nn.Linear(16, 8)).eval(), torch.randn(4, 16)
    program = from_module(net, ProgramOptions(inputs={"input": x.numpy()}))
    with pytest.raises(ConfigError, match=r"original1 has other values in it; trace the model again, with Program"):
        prepare(net, Plan.from_flags(bits=4), example_inputs=(x,), program=program)
