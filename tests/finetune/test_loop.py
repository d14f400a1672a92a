"""The training loop: it trains, yields records, and stops with an error when training diverges."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from qcompress.errors import ConfigError, DivergenceError
from qcompress.finetune.attach import prepare
from qcompress.finetune.config import LoopConfig
from qcompress.finetune.loop import call, train
from qcompress.finetune.losses import distillation
from qcompress.finetune.methods import Methods
from qcompress.plan.plan import Plan
from qcompress.quantizers import Pact
from qcompress.regularizers import BinRegularizer


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 32, 4, generator=generator)
    return [(part, (part[:, 0] * part[:, 1] > 0).long()) for part in x]


def prepared(batches, bits=2, activation_bits=4, **more):
    plan = Plan.from_flags(bits=bits, activation_bits=activation_bits)
    return prepare(net(), plan, example_inputs=(batches[0][0],), **more)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_lowers_the_loss(batches, optimizer):
    tuned = prepared(batches)
    config = LoopConfig(epochs=30, optimizer=optimizer, rate=0.02 if optimizer == "adamw" else 0.1)
    records = list(train(tuned, batches, config))
    assert [r.step for r in records] == list(range(120))
    assert {r.epoch for r in records} == set(range(30))
    first, last = (sum(r.loss for r in part) / 4 for part in (records[:4], records[-4:]))
    assert last < 0.6 * first


def test_nothing_happens_until_records_are_asked_for(batches):
    tuned = prepared(batches)
    before = copy.deepcopy(tuned.state_dict())
    records = train(tuned, batches, LoopConfig(epochs=1))
    assert all(torch.equal(torch.as_tensor(before[n]), torch.as_tensor(v)) for n, v in _tensors(tuned).items())
    next(records)


def _tensors(module):
    return {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


def test_a_teacher_replaces_labels(batches):
    teacher = net().eval()
    tuned = prepared(batches, bits=2, activation_bits=None)
    records = list(train(tuned, [(x, None) for x, _ in batches], LoopConfig(epochs=40, rate=0.02), teacher=teacher))
    assert records[-1].loss < 0.3 * records[0].loss
    logits = torch.tensor([[1.0, -1.0]])
    assert distillation(logits, -logits).item() == pytest.approx(1.5231883)  # 2 tanh(1)


def test_a_teacher_does_not_share_parameters(batches):
    tuned = prepared(batches)
    with pytest.raises(
        ConfigError, match=r"^train: the teacher must not share parameters .* copy\.deepcopy made before"
    ):
        next(train(tuned, batches, LoopConfig(epochs=1), teacher=tuned.model))
    teacher = net().train()
    next(train(tuned, batches, LoopConfig(epochs=1), teacher=teacher))
    assert not teacher.training


@pytest.mark.parametrize(("stage", "acts"), [("S1", [1, 1, 1]), ("S2", [0, 1, 1]), ("S3", [0, 1, 0])])
def test_regularizers_act_in_their_stage(batches, stage, acts):
    tuned = prepared(batches, activation_bits=None, regularizers=[BinRegularizer])
    records = list(train(tuned, batches, LoopConfig(epochs=3, stage=stage)))
    assert [int(r.loss > r.task_loss) for r in records[::4]] == acts


def test_regularizers_wait_for_the_first_third_unless_the_config_says_otherwise():
    acts = {epochs: [LoopConfig(epochs=epochs).regularizes(e) for e in range(epochs)] for epochs in (1, 2, 3, 8)}
    assert acts == {1: [True], 2: [True] * 2, 3: [False, True, True], 8: [False] * 2 + [True] * 6}


@pytest.mark.parametrize(("stage", "held"), [("S1", []), ("S2", []), ("S3", [1, 3])])
def test_scales_of_weights_stay_in_the_epochs_of_s3_with_regularizers(batches, stage, held):
    tuned = prepared(batches, regularizers=[partial(BinRegularizer, detach_targets=False)])
    scale, *others = (q.scale.value.raw for q in (tuned.quantizers()["0.weight"], *tuned.activations))
    values, stayed = (scale, *others, tuned.model[0].parametrizations.weight.original), []
    before = [value.detach().clone() for value in values]
    for record in train(tuned, batches, LoopConfig(epochs=4, stage=stage)):
        same, *moved = (torch.equal(old, new) for old, new in zip(before, values, strict=True))
        assert not any(moved)
        stayed.append((record.epoch, same))
        before = [value.detach().clone() for value in values]
    assert sorted(set(stayed)) == [(epoch, epoch in held) for epoch in range(4)]


def test_scales_are_held_for_one_step(batches):
    tuned = prepared(batches, activation_bits=None)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.1, weight_decay=0.1)
    scales = tuned.quantizer_parameters()
    for hold in (False, True, False):
        before = [p.detach().clone() for p in scales]
        optimizer.zero_grad()
        tuned(batches[0][0]).square().sum().backward()
        if hold:
            tuned.hold_scales()
        optimizer.step()
        assert all(torch.equal(a, b) == hold for a, b in zip(before, scales, strict=True))


def test_the_decay_of_pact_acts_in_every_epoch(batches):
    methods = Methods(activations="pact", activation_options={"decay": 0.5})
    tuned = prepared(batches, methods=methods, regularizers=[BinRegularizer])
    alphas = [q.alpha() for q in tuned.quantizers().values() if isinstance(q, Pact)]
    wanted = sum(0.25 * alpha.item() ** 2 for alpha in alphas)
    assert alphas
    assert tuned.penalty(regularizers=False).item() == pytest.approx(wanted)
    (regularizer,) = tuned.regularizers
    assert tuned.penalty().item() == pytest.approx(wanted + regularizer.penalty().item())
    first = next(train(tuned, batches, LoopConfig(epochs=3)))
    assert first.loss - first.task_loss == pytest.approx(wanted, rel=1e-4)
    free = prepared(batches, methods=Methods(activations="pact", activation_options={"decay": 0.0}))
    assert free.penalty().item() == 0


def test_rates_rise_and_fall():
    config = LoopConfig(epochs=1, warm_up=0.2, schedule="linear")
    shares = [config.share_of_rate(done / 10) for done in range(11)]
    assert shares[:3] == [0, 0.5, 1]
    assert shares[10] == 0
    assert shares[2:] == sorted(shares[2:], reverse=True)
    assert LoopConfig(epochs=1).share_of_rate(0.5) == pytest.approx(0.5)


def test_quantizers_have_a_rate_of_their_own(batches):
    tuned = prepared(batches, activation_bits=None)
    before = [p.detach().clone() for p in tuned.quantizer_parameters()]
    list(train(tuned, batches, LoopConfig(epochs=1, quantizer_rate=0.0)))
    assert all(torch.equal(a, b) for a, b in zip(before, tuned.quantizer_parameters(), strict=True))


def test_offsets_keep_to_zero_points_at_the_end(batches):
    tuned = prepared(batches)
    list(train(tuned, batches, LoopConfig(epochs=2, rate=0.01)))
    assert all(grid.zero_point is not None for grid in tuned.finalize().activations.values())
    free = prepared(batches)
    list(train(free, batches, LoopConfig(epochs=2, rate=0.01, snap_offsets=0, settle=0)))
    assert any(grid.zero_point is None for grid in free.finalize().activations.values())


@pytest.mark.parametrize(("share", "settled"), [(0.5, [False, False, True, True]), (0, 4 * [False]), (1, 4 * [True])])
def test_the_model_settles_for_a_share_of_the_steps(batches, share, settled):
    tuned = prepared(batches)
    records = train(tuned, batches, LoopConfig(epochs=1, settle=share))
    assert [tuned.get_extra_state()["is_settled"] for _ in records] == settled


def test_a_loss_that_is_not_finite_ends_training(batches):
    tuned = prepared(batches)

    def poisoned():
        for step in range(60):
            if step == 55:
                with torch.no_grad():
                    tuned.model[2].bias[0] = torch.nan
            yield batches[step % 4]

    class Batches:
        def __len__(self):
            return 60

        def __iter__(self):
            return poisoned()

    message = r"^Step 55: the loss is nan; the first NaN or Inf appears at 2\.bias\. The model is back in its last"
    with pytest.raises(DivergenceError, match=message) as caught:
        list(train(tuned, Batches(), LoopConfig(epochs=1)))
    assert caught.value.exit_code == 1
    assert all(value.isfinite().all() for value in _tensors(tuned).values())
    assert call(tuned, batches[0][0]).isfinite().all()


def test_a_layer_that_overflows_is_named(batches):
    tuned = prepared(batches, activation_bits=None)
    with torch.no_grad():
        huge = [(3e38 * tuned.model[0].weight[:2].sign(), torch.zeros(2, dtype=torch.long))]
        assert (tuned.model[0].weight[:2].abs().sum(1) > 1.2).any()
    with pytest.raises(DivergenceError, match=r"^Step 0: the loss is nan; the first NaN or Inf appears at 0\.weight\."):
        list(train(tuned, huge, LoopConfig(epochs=1)))


def test_a_gradient_that_is_not_finite_ends_training(batches):
    tuned = prepared(batches, activation_bits=None)
    with pytest.raises(DivergenceError, match=r"^Step 0: the gradient of model\.0\.bias is not finite\."):
        list(train(tuned, batches, LoopConfig(epochs=1), loss=lambda y, _: (y.sum() - y.sum().detach()).sqrt()))


def test_a_collapsed_scale_ends_training(batches):
    tuned = prepared(batches, activation_bits=None, methods=None)
    with torch.no_grad():
        tuned.quantizers()["2.weight"].scale.value.raw.fill_(-1)
    with pytest.raises(DivergenceError, match=r"^Step 0: the scale of 2\.weight collapsed to a thousandth"):
        list(train(tuned, batches, LoopConfig(epochs=1)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("optimizer", "lamb", r"^LoopConfig\.optimizer must be one of adamw, adam, sgd, got 'lamb'\.$"),
        ("schedule", "step", r"^LoopConfig\.schedule must be one of cosine, linear, constant, got 'step'\.$"),
        ("stage", "S4", r"^LoopConfig\.stage must be one of S1, S2, S3, got 'S4'\.$"),
        ("epochs", 0, r"^LoopConfig\.epochs must be in \[1, inf\], got 0\.$"),
        ("warm_up", 1.5, r"^LoopConfig\.warm_up must be in \[0, 1\], got 1\.5\.$"),
    ],
)
def test_invalid_settings_are_rejected(field, value, message):
    with pytest.raises(ConfigError, match=message):
        LoopConfig(**{"epochs": 1, field: value})
