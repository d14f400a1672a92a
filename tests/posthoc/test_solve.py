"""Moments, the walk over both nets, and what solving weights on calibration data gains."""

import numpy as np
import pytest
import torch
from torch import nn

from qcompress.artifacts import FloatWeight
from qcompress.data.dataset import Dataset
from qcompress.errors import ConfigError
from qcompress.graph.layers import weight_layers
from qcompress.graph.marks import MarkedRunner, mark
from qcompress.graph.tensors import program_tensors
from qcompress.plan.plan import Plan
from qcompress.plan.resolve import resolve
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.input_moments import Moments, has_moments, places
from qcompress.posthoc.settings import PosthocSettings
from qcompress.posthoc.solve import SolveSettings, solve_weights
from qcompress.posthoc.walk import walk
from qcompress.solvers import SOLVERS
from tests.helpers.nets import image, residual, traced
from tests.helpers.odd_nets import odd_inputs, odd_net

GPTQ = SolveSettings("gptq")
LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (5,)),
    "linear 3d": (lambda: nn.Linear(5, 4), (3, 5)),
    "conv": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (3, 7, 8)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (4, 6, 6)),
    "same": (lambda: nn.Conv2d(3, 4, 4, padding="same"), (3, 6, 6)),
    "valid": (lambda: nn.Conv2d(3, 4, 4, padding="valid"), (3, 6, 6)),
    "1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=2), (3, 9)),
    "3d": (lambda: nn.Conv3d(3, 4, 2, padding=1), (3, 4, 3, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_places_are_what_a_layer_multiplies(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    module, x = make().eval(), torch.randn(2, *shape)
    program = traced(module, input=x.numpy())
    (layer,) = weight_layers(program).values()
    assert has_moments(layer)
    x_gpk = places(layer, module.weight.shape, x)
    groups = len(x_gpk)
    rows = module.weight.detach().reshape(groups, len(module.weight) // groups, -1)
    got = (x_gpk @ rows.mT).permute(0, 2, 1).reshape(len(module.weight), -1) + module.bias.detach()[:, None]
    wanted = module(x).detach()
    wanted = wanted.reshape(-1, 4).T if "linear" in name else wanted.transpose(0, 1).flatten(1)
    assert torch.allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("centred", [True, False])
def test_moments_are_numpys(centred):
    torch.manual_seed(0)
    program = traced(nn.Linear(5, 4).eval(), input=np.zeros((2, 5), np.float32))
    (layer,) = weight_layers(program).values()
    x, y = (np.random.default_rng(i).standard_normal((40, 5)).astype(np.float32) + i for i in range(2))
    batches = [[torch.from_numpy(part) for part in np.split(v, 4)] for v in (x, y)]
    found = Moments.gather(layer, (4, 5), *batches, centred=centred)
    if centred:
        x, y = x - x.mean(0), y - y.mean(0)
    assert found.count == 40
    assert np.allclose(found.second[0], x.T @ x / 40, atol=1e-5)
    assert np.allclose(found.cross[0], y.T @ x / 40, atol=1e-5)
    alone = Moments.gather(layer, (4, 5), batches[0], batches[0], centred=centred)
    assert alone.cross is alone.second


@pytest.mark.parametrize(
    "name", ["option A", "u-net", "transformer", "lstm", "in place", "twice", "chunks", "unused", "fixed batch"]
)
def test_the_walk_computes_what_both_nets_compute(name):
    samples = 2 if name == "fixed batch" else 6
    inputs = odd_inputs(name, samples)
    size = 1 if name == "fixed batch" else 3
    batches = [{k: v[i : i + size] for k, v in inputs.items()} for i in range(0, samples, size)]
    program = traced(odd_net(name), **batches[0])
    settled, reached = {}, []

    def settle(found):
        reached.append((found.layer.weight, dict(settled), found.inputs, found.float_inputs))
        names = (found.layer.weight, found.bias)
        fresh = {n: v * 1.1 for n, v in program.state().items() if n in names}
        settled.update({n: v.numpy() for n, v in fresh.items()})
        if len(reached) == 1:
            assert found.inputs is found.float_inputs
            assert all(torch.equal(a, b) for a, b in zip(found.outputs, found.run(found.weight), strict=True))
        return fresh

    walk(program, batches, settle)
    kinds = {name: layer.kind for name, layer in weight_layers(program).items()}
    assert [r[0] for r in reached] == list(kinds)
    for weight, state, *values in reached:
        if kinds[weight] == "recurrent":  # no node gives what it takes; see test_recurrent
            continue
        for net, inputs_of in zip((program.with_state(state), program), values, strict=True):
            seen = []
            runner = MarkedRunner(mark(net, [(weight, 0)]))
            for batch in batches:
                runner(batch, lambda _, value, first, seen=seen: seen.append(value) or value if first else value)
            assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(seen, inputs_of, strict=True)), weight


def noise(program, small, inputs):
    """Share of the outputs' variance that compression makes."""
    wanted = program.run(inputs)["output"].astype(np.float64)
    weights = {name: artifact.dequantize() for name, artifact in small.items()}
    got = program.with_state(weights).run(inputs)["output"]
    return float(np.square(wanted - got).sum() / np.square(wanted - wanted.mean(0)).sum())


@pytest.mark.parametrize("scheme", ["palette", "uniform"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_solved_weights_make_less_noise_on_new_inputs(bits, scheme):
    x, program = image(96), residual()
    plan = Plan.from_flags(bits=bits, scheme=scheme)
    plain = compress_program(program, plan, PosthocSettings(effort="fast"))
    tensors = {t.name: t for t in resolve(plan, program_tensors(plain.program)).compressed}
    batches = [{"x": part} for part in np.split(x, 3)]
    solved = solve_weights(plain.program, tensors, plain.artifacts, batches, GPTQ)
    found, gains = solved.artifacts, solved.gains
    new = {"x": image(64, seed=9)}
    assert noise(plain.program, found, new) < 0.6 * noise(plain.program, plain.artifacts, new)
    layers = [n for n in weight_layers(plain.program) if not isinstance(plain.artifacts[n], FloatWeight)]
    assert [g.weight for g in gains] == layers
    assert all(g.solved_db >= g.nearest_db - 0.1 for g in gains)
    assert all(found[n].nbytes <= plain.artifacts[n].nbytes + 4 * 8 for n in layers)  # scales of channels


def test_what_is_exact_stays_so():
    module = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    with torch.no_grad():
        for layer in (module[0], module[2]):
            layer.weight.copy_(torch.sign(layer.weight) * 0.25)
    x = image(16, shape=(8,))
    program = traced(module, x=x[:2])
    plan = Plan.from_flags(bits=2)
    plain = compress_program(program, plan)
    tensors = {t.name: t for t in resolve(plan, program_tensors(program)).compressed}
    solved = solve_weights(program, tensors, plain.artifacts, [{"x": x}], GPTQ)
    found, gains = solved.artifacts, solved.gains
    assert all(np.array_equal(found[n].dequantize(), v.numpy()) for n, v in program.state().items())
    assert [g.solved_db for g in gains] == [None] * len(gains)


class Odds(nn.Module):
    """A bag of embeddings and a transposed convolution, which are not solved, and a recurrent layer, which is."""

    def __init__(self):
        super().__init__()
        self.bag, self.up = nn.EmbeddingBag(40, 16), nn.ConvTranspose1d(1, 4, 3)
        self.recur, self.head = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, ids):
        x = self.up(self.bag(ids).unsqueeze(1)).relu()
        return self.head(self.recur(x.transpose(1, 2))[0][:, -1])


@pytest.mark.parametrize("samples", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_other_layers_are_in_nobodys_way(samples):
    torch.manual_seed(0)
    ids = np.random.default_rng(0).integers(0, 40, (samples, 6))
    program = traced(Odds().eval(), ids=np.zeros((2, 6), np.int64))
    small = compress_program(program, Plan.from_flags(bits=3), calibration=Dataset(inputs={"ids": ids}, name="c.npz"))
    solved = ["up.weight", "recur.weight_ih_l0", "recur.weight_hh_l0", "head.weight"]
    assert [g.weight for g in small.gains] == solved


@pytest.mark.parametrize("value", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_constant_inputs_are_no_worse_than_the_nearest_levels(value):
    program = residual()
    data = Dataset(inputs={"x": np.full((8, 3, 9, 9), value, np.float32)}, name="c.npz")
    plan = Plan.from_flags(bits=3)
    plain, small = compress_program(program, plan), compress_program(program, plan, calibration=data)
    assert noise(plain.program, small.artifacts, {"x": data.inputs["x"] + 1e-3 * image(8)}) <= noise(
        plain.program, plain.artifacts, {"x": data.inputs["x"] + 1e-3 * image(8)}
    )


def test_each_solver_does_better_than_the_one_before_it():
    size = np.random.default_rng(0).lognormal(0, 1, 48).astype(np.float32)  # inputs that count more, and less
    layer = nn.Linear(48, 32).eval()
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    program = traced(layer, x=np.zeros((2, 48), np.float32))
    x, new = (image(256, seed=seed, shape=(48,)) * size for seed in (1, 2))
    data, plan, new = Dataset(inputs={"x": x}), Plan.from_flags(bits=2), {"x": new}
    found = [compress_program(program, plan, PosthocSettings(solver=solver), calibration=data) for solver in SOLVERS]
    noises = [noise(small.program, small.artifacts, new) for small in found]
    assert noises == sorted(noises, reverse=True), noises
    with pytest.raises(ConfigError, match="solver must be one of nearest, weighted, gptq, got 'best'"):
        compress_program(program, plan, PosthocSettings(solver="best"), calibration=data)
