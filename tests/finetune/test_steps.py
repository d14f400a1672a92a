"""What a training step costs: it never waits for the device, and has few kernels."""

import copy

import pytest
import torch
from torch import nn

from qcompress.finetune.attach import prepare
from qcompress.finetune.methods import Methods
from qcompress.plan.plan import Plan
from qcompress.regularizers import BinRegularizer, DistanceRegularizer, KurtosisRegularizer, RangeRegularizer
from tests.helpers.dispatched import Kernels

METHODS = {
    "float": (None, None, Methods()),
    "lsq W2": (2, None, Methods()),
    "lsq W2A2": (2, 2, Methods(activations="lsq")),
    "lsq_plus": (4, 4, Methods(weights="lsq_plus", activation_options={"configuration": 4})),
    "n2uq": (2, 2, Methods(weights="n2uq", activations="n2uq")),
    "ewgs": (2, 2, Methods(weights="ewgs", activations="ewgs")),
    "tqt": (2, 2, Methods(weights="tqt", activations="tqt")),
    "pact": (2, 2, Methods(weights="dorefa", activations="pact")),
    "ternary": (2, None, Methods(weights="ternary")),
    "bmpq": (4, None, Methods(weights="bmpq")),
}


def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    layers += [nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)]
    return nn.Sequential(*layers)


@pytest.fixture
def x():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def prepared(name, x, **more):
    bits, activation_bits, methods = METHODS[name]
    if bits is None:
        return net()
    plan = Plan.from_flags(bits=bits, activation_bits=activation_bits)
    return prepare(net(), plan, example_inputs=(x,), methods=methods, **more).train()


def kernels(model, x):
    """Returns the kernels of forward and backward, after a step that makes what is kept."""
    model(x).sum().backward()
    model.zero_grad()
    with Kernels() as found:
        model(x).sum().backward()
    return found


@pytest.mark.parametrize("name", [name for name in METHODS if name != "float"])
def test_a_step_never_waits_for_the_device(x, name):
    """A tensor on the meta device has no values: whatever would wait for one raises."""
    regularizers = [BinRegularizer] if name.startswith("lsq W2A2") else []
    regularizers += [RangeRegularizer, KurtosisRegularizer, DistanceRegularizer] if name == "lsq W2" else []
    tuned = prepared(name, x, regularizers=regularizers).to("meta")
    x = x.to("meta")
    for step in range(2):
        tuned.step(step / 2)
        with Kernels("meta" if step else None):  # the first step makes constants and moves them
            loss = tuned(x).square().sum() + tuned.penalty()
            loss.backward()
            assert tuned.is_good(loss).device.type == "meta"
            tuned.hold_scales()
        tuned.snap_offsets()


@pytest.mark.parametrize(
    ("name", "beside"),
    [("lsq W2", 23), ("lsq W2A2", 83), ("lsq_plus", 179), ("n2uq", 295), ("ewgs", 103), ("tqt", 113), ("pact", 109)],
)
def test_kernels_of_a_step_do_not_creep_up(x, name, beside):
    """`beside` are those that the float step does not have; the nets have 4 weights and up to 7 sites."""
    found = kernels(prepared(name, x), x)
    assert found.total - kernels(net(), x).total == beside, found.found


def test_a_step_is_good_or_not(x):
    tuned = prepared("lsq W2A2", x)

    def step(loss):
        tuned.zero_grad()
        loss.backward()
        return bool(tuned.is_good(loss))

    assert step(tuned(x).sum())
    assert step(1e20 * tuned(x).sum())  # squares of these gradients would overflow
    assert not step(torch.nan * tuned(x).sum())
    y = tuned(x).sum()
    assert not step((y - y.detach()).sqrt())  # 0, with an infinite gradient
    assert not bool(tuned.is_good(torch.tensor(torch.inf)))
    other = copy.deepcopy(tuned)
    with torch.no_grad():
        other.quantizers()["0.weight"].scale.value.raw.fill_(-1)
    other.zero_grad()
    assert not bool(other.is_good(torch.zeros(())))
    assert bool(prepared("ternary", x).is_good(torch.zeros(())))


COMPILING = pytest.mark.filterwarnings("ignore")  # torch warns itself while it compiles


@COMPILING
def test_without_a_compiler_training_goes_on_and_says_so(x, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/no/compiler"))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    tuned = prepared("lsq W2A2", x)
    wanted, notes = copy.deepcopy(tuned), tuned.notes
    tuned.compile()
    torch.manual_seed(1)
    found = tuned(x)
    found.sum().backward()
    torch.manual_seed(1)
    assert torch.equal(found, wanted(x))
    assert tuned.notes[:-1] == notes
    assert tuned.notes[-1].startswith("Training runs without torch.compile: ")
    assert tuned.finalize().notes[0] == tuned.notes[0]


@COMPILING
@pytest.mark.parametrize(
    ("name", "snapped"),
    [
        ("lsq_plus", True),
        *(
            pytest.param(name, False, marks=pytest.mark.slow)
            for name in ("n2uq", "lsq W2A2", "lsq_plus", "ewgs", "tqt", "pact")
        ),
    ],
)
def test_the_compiler_takes_the_graph_in_one_piece(x, name, snapped):
    tuned = prepared(name, x)
    if snapped:
        tuned.snap_offsets()
    graph, norms = tuned._live()
    function = torch.compile(graph.function, backend="aot_eager", fullgraph=True)
    out = function(*tuned._arguments(graph, [x], tuned._activations, norms))
    out[0].sum().backward()
    assert all(p.grad is not None for p in tuned.quantizer_parameters())


@COMPILING
@pytest.mark.slow
@pytest.mark.parametrize("name", ["lsq W2A2", "lsq_plus", "n2uq"])
def test_a_compiled_step_is_the_same_step(x, name):
    plain = prepared(name, x)
    plain.model[5].p = 0.0
    compiled = copy.deepcopy(plain)
    compiled.compile()
    for model in (plain, compiled):
        model(x).square().sum().backward()
    assert compiled.notes == plain.notes
    for (key, mine), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        scale = float(theirs.grad.abs().max()) + 1e-6
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3 * scale, msg=key)
    for model in (plain, compiled):
        model.load_state_dict(plain.state_dict())
        model.eval()
    assert torch.equal(plain(x), compiled(x))
