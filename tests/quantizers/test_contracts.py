"""The contract of every quantizer in the table."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import qcompress as qc
from qcompress.artifacts.integer_range import IntegerRange
from qcompress.errors import ConfigError
from qcompress.quantizers import QUANTIZERS, way
from qcompress.quantizers.positive import Positive

SHAPES = {"linear": (6, 10), "conv": (8, 3, 3, 3), "depthwise": (7, 1, 3, 3), "embedding": (50, 4), "conv1d": (5, 2, 3)}
WEIGHTS = [(name, m.weight) for name, m in QUANTIZERS.items() if m.weight]
ACTIVATIONS = [(name, m.activation) for name, m in QUANTIZERS.items() if m.activation]


def granularities(found, channels, axis=0):
    """Returns the arguments that a method can take for its scales."""
    one, each = {}, {"axis": axis, "channels": channels}
    some = [one, {**each, "rows_per_lut": 3, "lut_dtype": "int8"}, {"axis": axis, "vector_dim": 4}]
    some += [{**one, "lut_dtype": "float16"}]
    return {"tensor": [one], "channel": [{"axis": axis}], "either": [one, each], "palette": some}[found.scales]


def weight_cases():
    for name, found in WEIGHTS:
        for bits in {2, 4, 8} & set(found.bits) | {found.bits[0], found.bits[-1]}:
            for kind, shape in SHAPES.items():
                for settings in granularities(found, shape[0]):
                    quantizer = found.make(bits=bits, **settings).eval()  # what it stores, if training differs
                    yield pytest.param(quantizer, shape, id=f"{name}-{bits}-{kind}-{settings}")


def activation_cases():
    for name, found in ACTIVATIONS:
        for bits in {2, 4, 8} & set(found.bits) | {found.bits[0], found.bits[-1]}:
            yield pytest.param(found.make(bits=bits), id=f"{name}-{bits}")
    for bits in (2, 4, 8):
        yield pytest.param(qc.quantizers.Lsq(bits=bits, role="activation", signed=True), id=f"lsq-signed-{bits}")
        for c in (1, 2, 3, 4):
            for init in ("lsq_plus", "min_max", "lsq"):
                plus = qc.quantizers.LsqPlus(bits=bits, role="activation", configuration=c, init=init)
                yield pytest.param(plus, id=f"lsq_plus-{c}-{init}-{bits}")
    for bits in (2, 3, 4):
        for init in ("n2uq", "lsq"):
            yield pytest.param(qc.quantizers.N2uqActivation(bits=bits, init=init), id=f"n2uq-{init}-{bits}")


BATCHES = {
    "swish": [nn.functional.silu(2 * torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(i))) for i in (0, 1)],
    "relu": [torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(i)).relu() for i in (0, 1)],
    "zeros": [torch.zeros(4, 3)],
    "negative": [-torch.rand(4, 3, generator=torch.Generator().manual_seed(2)) - 0.1],
}


def weight_of(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1


def same_bits(a, b):
    assert a.dtype == b.dtype == np.float32
    assert a.shape == b.shape
    np.testing.assert_array_equal(np.ascontiguousarray(a).view(np.uint32), np.ascontiguousarray(b).view(np.uint32))


def shaken(quantizer):
    """Changes the parameters a little, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in quantizer.parameters():
            p.mul_(1 + 0.1 * torch.rand(p.shape, generator=generator))
    return quantizer


@pytest.mark.parametrize(("quantizer", "shape"), [*weight_cases()])
@pytest.mark.parametrize("special", [None, "zeros", "a zero channel", "negative", "large"])
def test_a_weight_artifact_is_the_forward(quantizer, shape, special):
    weight = weight_of(shape)
    if special == "zeros":
        weight.zero_()
    if special == "a zero channel":
        weight[0] = 0
    if special == "negative":
        weight = -weight.abs()
    if special == "large":
        weight *= 1e4
    before = weight.clone()
    quantizer = copy.deepcopy(quantizer)
    quantizer.initialise(weight)
    shaken(quantizer)
    artifact = quantizer.weight_artifact(weight)
    same_bits(artifact.dequantize(), quantizer(weight).detach().numpy())
    assert torch.equal(weight, before)
    assert artifact.bits == quantizer.bits
    assert len(np.unique(artifact.codes)) <= 2**quantizer.bits
    if (integers := artifact.integers()) is not None:
        same_bits(quantizer.weight_scale(weight).numpy(), integers.scale)


@pytest.mark.parametrize(("name", "found"), WEIGHTS, ids=[name for name, _ in WEIGHTS])
def test_transposed_convolutions_have_their_channels_on_axis_1(name, found):
    weight = weight_of((3, 4, 2, 2))
    for settings in granularities(found, 4, axis=1):
        quantizer = found.make(bits=2, **settings).eval()
        quantizer.initialise(weight)
        artifact = quantizer.weight_artifact(weight)
        same_bits(artifact.dequantize(), quantizer(weight).detach().numpy())


@pytest.mark.parametrize("quantizer", [*activation_cases()])
@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("moved", [False, True])
def test_an_activation_grid_is_the_forward(quantizer, batches, moved):
    quantizer = copy.deepcopy(quantizer)
    quantizer.initialise(batches)
    if moved:
        shaken(quantizer)
    grid = quantizer.activation_grid(("fc.weight", 0))
    generator = torch.Generator().manual_seed(3)
    middles = grid.dequantize(np.arange(grid.levels, dtype=np.uint8)) + grid.scale / 2
    x = torch.cat([torch.randn(999, generator=generator), torch.tensor([0.0, -0.0, 1e6, -1e6]), torch.tensor(middles)])
    same_bits(grid.dequantize(grid.quantize(x.numpy())), quantizer(x).detach().numpy())
    assert type(grid).from_dict(grid.as_dict()).as_dict() == grid.as_dict()
    assert grid.bits == quantizer.bits
    same_bits(quantizer.activation_scale().numpy(), grid.scale)


@pytest.mark.parametrize("configuration", [3, 4])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("steps", [0, 1, 3, 7, 100, 255, 300, -5])
def test_an_offset_on_the_grid_is_computed_with_as_a_zero_point(configuration, bits, steps):
    quantizer = qc.quantizers.LsqPlus(bits=bits, role="activation", configuration=configuration)
    with torch.no_grad():
        quantizer.scale.value.set(torch.tensor(0.0371))
        quantizer.offset.copy_(-steps * quantizer.scale.value())
    grid = quantizer.activation_grid(("x", -1))
    centers = np.arange(-400, 400, dtype=np.float32) * np.float32(0.0371)
    x = np.concatenate([centers, centers + np.float32(0.01855)])
    same_bits(grid.dequantize(grid.quantize(x)), quantizer(torch.from_numpy(x)).detach().numpy())


@pytest.mark.parametrize(("name", "found"), [w for w in WEIGHTS if w[0] not in ("dorefa", "dkm", "n2uq", "ternary")])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_on_a_uniform_grid_do_not_change(name, found, bits):
    quantizer = found.make(bits=bits)
    quantizer.initialise(weight_of((8, 9)))
    once = quantizer(weight_of((8, 9)))
    assert torch.equal(quantizer(once), once)


@pytest.mark.parametrize("quantizer", [case for case in activation_cases() if not case.id.startswith("n2uq")])
def test_values_on_a_uniform_activation_grid_do_not_change(quantizer):
    quantizer = copy.deepcopy(quantizer)
    quantizer.initialise(BATCHES["swish"])
    once = quantizer(BATCHES["swish"][0])
    twice = quantizer(once)
    torch.testing.assert_close(twice, once)


def trained_once(quantizer, x, rate, uphill):
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=rate, maximize=uphill)
    optimizer.zero_grad()
    quantizer(x).square().sum().backward()
    optimizer.step()
    return quantizer


LEARNED = [
    *(
        (name, found.make(bits=2), weight_of((8, 9)))
        for name, found in WEIGHTS
        if list(found.make(bits=2).parameters())
    ),
    *((name, found.make(bits=2), [BATCHES["swish"][0]]) for name, found in ACTIVATIONS),
]
LEARNING = pytest.mark.parametrize(("name", "quantizer", "values"), LEARNED, ids=[name for name, *_ in LEARNED])


@LEARNING
@pytest.mark.parametrize("uphill", [False, True])
def test_scales_stay_positive_after_a_huge_step(name, quantizer, values, uphill):
    quantizer = copy.deepcopy(quantizer)
    quantizer.initialise(values)
    assert not quantizer.collapsed
    x = values if isinstance(values, torch.Tensor) else values[0]
    trained_once(quantizer, x, 1e9, uphill)
    down = copy.deepcopy(quantizer)
    with torch.no_grad():
        for p in down.parameters():
            p.fill_(-1e9)
    assert down.collapsed
    for q in (quantizer, down):
        assert torch.isfinite(q(x)).all()
        artifact = q.weight_artifact(x) if isinstance(values, torch.Tensor) else None
        scale = artifact.scale if artifact is not None else q.activation_grid(("x", -1)).scale
        assert 0 < scale < np.inf


@LEARNING
def test_a_collapsed_scale_still_gets_a_gradient(name, quantizer, values):
    quantizer = copy.deepcopy(quantizer)
    quantizer.initialise(values)
    with torch.no_grad():
        for p in quantizer.parameters():
            p.fill_(-1e9)
    quantizer(values if isinstance(values, torch.Tensor) else values[0]).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in quantizer.parameters())


@pytest.mark.parametrize(("quantizer", "shape"), [*weight_cases()])
def test_weights_survive_state_dict_deepcopy_and_parametrization(quantizer, shape):
    weight = weight_of(shape)
    trained, fresh = copy.deepcopy(quantizer), copy.deepcopy(quantizer)
    trained.initialise(weight)
    shaken(trained)
    fresh.load_state_dict(trained.state_dict())
    wanted = trained(weight)
    assert torch.equal(fresh(weight), wanted)
    assert torch.equal(copy.deepcopy(trained)(weight), wanted)
    holder = nn.Module()
    holder.weight = nn.Parameter(weight.clone())
    parametrize.register_parametrization(holder.eval(), "weight", trained)
    assert torch.equal(holder.weight, wanted)
    holder.weight.sum().backward()
    assert holder.parametrizations.weight.original.grad.shape == weight.shape
    parametrize.remove_parametrizations(holder, "weight", leave_parametrized=False)
    assert torch.equal(holder.weight, weight)


@pytest.mark.parametrize("quantizer", [*activation_cases()])
def test_activations_survive_state_dict_and_deepcopy(quantizer):
    trained, fresh, x = copy.deepcopy(quantizer), copy.deepcopy(quantizer), BATCHES["swish"][0]
    trained.initialise(BATCHES["swish"])
    shaken(trained)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(x), trained(x))
    assert torch.equal(copy.deepcopy(trained)(x), trained(x))


@pytest.mark.parametrize(("name", "found"), WEIGHTS + ACTIVATIONS)
def test_modules_compute_in_float64_too(name, found):
    quantizer = found.make(bits=2).double()
    x = weight_of((8, 9)).double()
    quantizer.initialise(x)
    assert quantizer(x).dtype == torch.float64


def test_g_counts_the_weights_of_a_scale_and_the_features_of_a_sample():
    weight = torch.full((4, 8), 9.0)  # all above the range: each adds p to the gradient of its scale
    for settings, wanted in (({}, 32 / 32**0.5), ({"axis": 0, "channels": 4}, 8 / 8**0.5)):
        quantizer = qc.quantizers.Lsq(bits=2, role="weight", **settings)
        quantizer(weight).sum().backward()
        assert quantizer.scale.value.raw.grad.reshape(-1)[0].item() == pytest.approx(wanted)
    for features, wanted in ((None, 8), (50, 50)):
        quantizer = qc.quantizers.LsqPlus(bits=2, role="activation", features=features)
        quantizer(weight).sum().backward()
        assert quantizer.scale.value.raw.grad.item() == pytest.approx(3 * 32 / (wanted * 3) ** 0.5)
        assert quantizer.offset.grad.item() == pytest.approx(32 / (wanted * 3) ** 0.5)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_adam_moves_scales_by_shares_of_their_start_and_sgd_by_their_gradients(size):
    for kind, wanted in ((torch.optim.Adam, 0.99), (torch.optim.SGD, 1 - 0.01 * 9 / size)):
        scale = Positive(())
        scale.set(torch.tensor(size))
        optimizer = kind(scale.parameters(), lr=0.01)
        (9 * scale()).backward()
        optimizer.step()
        assert scale().item() / size == pytest.approx(max(wanted, 1e-3), rel=1e-4)


def test_the_decay_of_pact_is_l2():
    quantizer = qc.quantizers.Pact(bits=4)
    quantizer.initialise([torch.tensor([0.0, 3.0])])
    alpha = quantizer.alpha().item()
    quantizer.penalty().backward()
    assert quantizer.penalty().item() == pytest.approx(1e-4 * alpha**2)
    assert quantizer.alpha.raw.grad.item() == pytest.approx(2e-4 * alpha / quantizer.alpha.start.item())
    assert qc.quantizers.Pact(bits=4, decay=0).penalty() is None


def test_initial_scales_are_the_papers():
    w = torch.tensor([[-1.0, 0.5], [0.25, 3.0]])
    mean, sigma = w.mean(), w.std(correction=0)
    wanted = {
        "lsq": 2 * w.abs().mean() / 7**0.5,
        "min_max": torch.tensor(3 / 7),
        "lsq_plus": max(abs(mean - 3 * sigma), abs(mean + 3 * sigma)) / 8,
    }
    for init, scale in wanted.items():
        quantizer = qc.quantizers.Lsq(bits=4, role="weight", init=init)
        quantizer.initialise(w)
        torch.testing.assert_close(quantizer.scale.value().detach(), scale)
    each = qc.quantizers.Lsq(bits=4, role="weight", axis=0, channels=2, init="min_max")
    each.initialise(w)
    torch.testing.assert_close(each.scale.value().detach(), torch.tensor([1 / 8, 3 / 7]))


@pytest.mark.parametrize("init", ["lsq", "min_max", "lsq_plus"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_weight_on_a_grid_keeps_it(init, bits):
    torch.manual_seed(0)
    scale, limits = torch.rand(6, 1) + 0.1, IntegerRange(bits, signed=True)
    weight = scale * torch.randint(limits.n, limits.p + 1, (6, 40))
    quantizer = qc.quantizers.Lsq(bits=bits, role="weight", axis=0, channels=6, init=init)
    quantizer.initialise(weight)
    torch.testing.assert_close(quantizer(weight).detach(), weight, rtol=1e-5, atol=0)
    few = scale * torch.tensor([0, -2, 1] if bits == 2 else [-3, 0, 2])
    quantizer.initialise(few)
    torch.testing.assert_close(quantizer(few).detach(), few, rtol=1e-5, atol=0)
    quantizer.initialise(weight + 0.2 * torch.randn(6, 40))
    assert not torch.allclose(quantizer.scale.value().detach(), scale[:, 0], rtol=1e-3)


@pytest.mark.parametrize("configuration", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_mse_start_is_better_than_min_max_where_there_are_outliers(configuration, bits):
    x = torch.cat([*(batch.reshape(-1) for batch in BATCHES["swish"]), torch.tensor([6.0])])
    errors = {}
    for init in ("min_max", "lsq_plus"):
        quantizer = qc.quantizers.LsqPlus(bits=bits, role="activation", configuration=configuration, init=init)
        quantizer.initialise([x])
        errors[init] = (quantizer(x) - x).square().mean().item()
    assert errors["lsq_plus"] < errors["min_max"]


@pytest.mark.parametrize(
    ("method", "role", "bits", "message"),
    [
        ("lsq", "weight", 1, "lsq quantizes weights at 2 to 8 bits, got 1; dorefa, dkm and n2uq work there."),
        ("tqt", "weight", 1, "tqt quantizes weights at 2 to 8 bits, got 1; dorefa, dkm and n2uq work there."),
        ("bmpq", "weight", 1, "bmpq quantizes weights at 2 to 8 bits, got 1; dorefa, dkm and n2uq work there."),
        (
            "ternary", "weight", 4,
            "ternary quantizes weights at 2 bits, got 4; "
            "lsq, lsq_plus, dorefa, ewgs, tqt, dkm, bmpq and n2uq work there.",
        ),
        (
            "n2uq", "activation", 8,
            "n2uq quantizes activations at 2 to 4 bits, got 8; lsq, lsq_plus, pact, ewgs and tqt work there.",
        ),
        (
            "pact", "weight", 4,
            "pact does not quantize weights; lsq, lsq_plus, dorefa, ewgs, tqt, dkm, ternary, bmpq and n2uq do.",
        ),
        (
            "dorefa", "activation", 4,
            "dorefa does not quantize activations; lsq, lsq_plus, pact, ewgs, tqt and n2uq do.",
        ),
        (
            "lsqplus", "weight", 4,
            "Unknown method 'lsqplus'; known: lsq, lsq_plus, pact, dorefa, ewgs, tqt, dkm, ternary, bmpq, n2uq. "
            "Did you mean lsq_plus or lsq?",
        ),
        ("lsq", "bias", 4, "way.role must be 'weight' or 'activation', got 'bias'."),
    ],
)  # fmt: skip
def test_unsupported_roles_and_widths_are_rejected(method, role, bits, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        way(method, role, bits)


@pytest.mark.parametrize(("name", "found"), ACTIVATIONS, ids=[name for name, _ in ACTIVATIONS])
def test_what_a_method_cannot_quantize_has_a_fallback_that_can(name, found):
    cases = [(bits, has_negative) for bits in range(1, 9) for has_negative in (False, True)]
    left = [case for case in cases if found.obstacle(*case) is not None]
    assert (found.fallback is None) == (not left)
    for bits, has_negative in left:
        assert way(found.fallback, "activation", bits).obstacle(bits, has_negative) is None


@pytest.mark.parametrize(("name", "found"), ACTIVATIONS, ids=[name for name, _ in ACTIVATIONS])
def test_the_table_says_which_methods_have_codes_for_negative_values(name, found):
    for has_negative, options in ((False, found.without_negative), (True, found.with_negative or {})):
        quantizer = found.make(bits=4, **options)
        quantizer.initialise(BATCHES["swish" if has_negative else "relu"])
        grid = quantizer.activation_grid(("x", -1))
        lowest = grid.dequantize(np.arange(grid.levels, dtype=np.uint8)).min()
        assert (lowest < 0) == (has_negative and found.obstacle(4, has_negative=True) is None)


@pytest.mark.parametrize("method", QUANTIZERS.values(), ids=QUANTIZERS)
def test_biases_are_quantized_by_a_method_for_weights(method):
    quantizer = way(method.bias, "weight", 8).make(bits=8)
    quantizer.initialise(torch.tensor([0.5, -1.0]))
    assert quantizer.step_size(torch.zeros(2)) is not None


@pytest.mark.parametrize("bits", [0, 9])
@pytest.mark.parametrize("role", ["weight", "activation"])
def test_no_method_has_other_widths(role, bits):
    with pytest.raises(ConfigError, match=f"^bits must be in \\[1, 8\\], got {bits}\\.$"):
        way("lsq", role, bits)
    for _, found in WEIGHTS if role == "weight" else ACTIVATIONS:
        with pytest.raises(ConfigError):
            found.make(bits=bits)


@pytest.mark.parametrize(("name", "found"), WEIGHTS)
def test_a_weight_quantizer_has_no_activation_grid(name, found):
    quantizer = found.make(bits=2)
    who = type(quantizer).__name__
    with pytest.raises(ConfigError, match=f"^{who} quantizes a weight here and has no activation grid\\.$"):
        quantizer.activation_grid(("x", -1))


@pytest.mark.parametrize(("name", "found"), ACTIVATIONS)
def test_an_activation_quantizer_has_no_weight_artifact(name, found):
    quantizer = found.make(bits=2)
    who = type(quantizer).__name__
    with pytest.raises(ConfigError, match=f"^{who} quantizes an activation here and has no weight artifact\\.$"):
        quantizer.weight_artifact(torch.zeros(2, 2))
    assert quantizer.step_size(torch.zeros(2, 2)) is not None or name in ("pact", "n2uq")


q = qc.quantizers
ONE_BIT = "a signed grid of 1 bit has no positive code; use 2 to 8 bits, or dorefa, dkm or n2uq for weights."


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: q.Lsq(bits=1, role="weight"), f"Lsq: {ONE_BIT}"),
        (lambda: q.Ewgs(bits=1, role="activation", signed=True), f"Ewgs: {ONE_BIT}"),
        (lambda: q.Tqt(bits=1, role="weight"), f"Tqt: {ONE_BIT}"),
        (lambda: q.Bmpq(bits=1), f"Bmpq: {ONE_BIT}"),
        (lambda: q.bmpq(torch.ones(2), 1), f"bmpq: {ONE_BIT}"),
        (lambda: q.LsqPlus(bits=1, role="activation", configuration=3), f"LsqPlus: {ONE_BIT}"),
        (
            lambda: q.LsqPlus(bits=4, role="activation", configuration=5),
            "LsqPlus.configuration must be 1, 2, 3 or 4, got 5.",
        ),
        (
            lambda: q.LsqPlus(bits=4, role="weight", configuration=4),
            "LsqPlus.configuration must be 2 for a weight, got 4.",
        ),
        (lambda: q.Lsq(bits=4, role="bias"), "Lsq.role must be 'weight' or 'activation', got 'bias'."),
        (
            lambda: q.Lsq(bits=4, role="weight", init="mse"),
            "Lsq.init must be one of lsq, min_max, lsq_plus, got 'mse'.",
        ),
        (
            lambda: q.Lsq(bits=4, role="weight", axis=0),
            "Lsq: axis and channels must be given together, got axis=0 and channels=None.",
        ),
        (
            lambda: q.Lsq(bits=4, role="activation", axis=0, channels=3),
            "Lsq: an activation has one scale, got axis=0; remove axis and channels.",
        ),
        (lambda: q.Tqt(bits=4, role="activation", features=0), "Tqt.features must be at least 1, got 0."),
        (
            lambda: q.Lsq(bits=4, role="weight", axis=0, channels=3).initialise(torch.ones(4, 3)),
            "Lsq.channels is 3, but the weight has 4 on axis 0.",
        ),
        (lambda: q.Ewgs(bits=4, role="weight", delta=-1), "Ewgs.delta must be finite and at least 0, got -1."),
        (lambda: q.Ternary(bits=3), "Ternary.bits must be 2, got 3."),
        (lambda: q.Pact(bits=3, decay=-1), "Pact.decay must be finite and at least 0, got -1."),
        (lambda: q.N2uqActivation(bits=5), "N2uqActivation.bits must be in [2, 4], got 5."),
        (
            lambda: q.N2uqActivation(bits=2, init="min_max"),
            "N2uqActivation.init must be one of n2uq, lsq_plus, lsq, got 'min_max'.",
        ),
        (
            lambda: q.Lsq(bits=4, role="activation").initialise([]),
            "A quantizer needs at least one value to be initialised from, got an empty tensor or list.",
        ),
    ],
)
def test_invalid_arguments_are_rejected(make, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make()
