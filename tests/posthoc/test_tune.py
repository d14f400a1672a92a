"""Tuning all layers together: what it starts from, what it gains, and when it leaves everything as it was."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from qcompress.artifacts import Artifact, FloatWeight, PalettizedWeight
from qcompress.data.dataset import Dataset
from qcompress.errors import ConfigError
from qcompress.palettes.even_grid import round_to_nearest
from qcompress.palettes.int8_palette import palettize_int8
from qcompress.palettes.scalar import palettize
from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.latent import Latent, latent_of
from qcompress.posthoc.settings import PosthocSettings
from qcompress.posthoc.tune import output_error, tune
from tests.helpers.nets import Residual, image, randomized, traced

random = np.random.default_rng(0)
WEIGHT = random.standard_normal((6, 4, 3, 3)).astype(np.float32)
ARTIFACTS = {
    "palette": palettize(WEIGHT, 2),
    "palettes": palettize(WEIGHT, 3, rows_per_lut=4),
    "transposed": palettize(WEIGHT, 2, rows_per_lut=1, axis=1),
    "scaled": PalettizedWeight(
        codes=random.integers(0, 4, WEIGHT.shape).astype(np.uint8), lut=np.array([[-1, 0, 0.5, 1]], np.float32), bits=2,
        scale=np.array([1, -2, 0.5, 3, 1, 1], np.float32),
    ),
    "halves": palettize(WEIGHT, 3, rows_per_lut=2, lut_dtype="float16"),
    "integers": palettize_int8(WEIGHT, 3),
    "integers, one scale": palettize_int8(WEIGHT, 3, per_channel=False),
    "even": round_to_nearest(WEIGHT, 4),
    "blocks": round_to_nearest(WEIGHT.reshape(6, 36), 3, block_size=16),
    "blocks of inputs first": round_to_nearest(WEIGHT.reshape(36, 6), 3, axis=1, block_size=16),
    "even, one scale": round_to_nearest(WEIGHT, 3, per_channel=False),
}  # fmt: skip


def latent(artifact: Artifact) -> Latent:
    found = latent_of(artifact, torch.zeros(artifact.shape), "cpu")
    assert found is not None
    return found


@pytest.mark.parametrize("name", ARTIFACTS)
def test_it_starts_from_what_was_solved(name):
    artifact = ARTIFACTS[name]
    found = latent(artifact)
    np.testing.assert_array_equal(found.value().detach().numpy(), artifact.dequantize())
    np.testing.assert_array_equal(found.artifact().dequantize(), artifact.dequantize())


@pytest.mark.parametrize("name", ARTIFACTS)
def test_gradients_pass_straight_on_and_codes_follow(name):
    artifact = replace(ARTIFACTS[name], codes=np.roll(ARTIFACTS[name].codes, 1, axis=-1))
    tuned = latent(artifact)
    weight = WEIGHT.reshape(artifact.shape)
    wanted = torch.from_numpy(weight)
    optimizer = torch.optim.Adam([*tuned.latents(), *tuned.others()], lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        (tuned.value() - wanted).square().mean().backward()
        optimizer.step()
    found = tuned.artifact()
    np.testing.assert_allclose(found.dequantize(), tuned.value().detach().numpy(), rtol=1e-5, atol=1e-6)
    errors = [float(np.square(a.dequantize() - weight).mean()) for a in (artifact, found)]
    assert errors[1] < 0.5 * errors[0]
    assert (type(found), found.bits, found.shape) == (type(artifact), artifact.bits, artifact.shape)


def test_a_badly_rounded_net_comes_nearer_to_the_float_net():
    torch.manual_seed(0)
    convolutions = [layer for c, o in ((3, 16), (16, 32), (32, 16)) for layer in (nn.Conv2d(c, o, 3), nn.ReLU())]
    program = traced(nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(144, 5)).eval(), x=image(2))
    rough = compress_program(program, Plan.from_flags(bits=1), PosthocSettings(effort="fast"))
    tuned = tune(program, rough.artifacts, [{"input": image(32, seed=seed)} for seed in range(8)])
    new = [{"input": image(256, seed=99)}]
    assert output_error(program, tuned, new) < 0.85 * output_error(program, rough.artifacts, new)
    assert {n: (type(a), a.nbytes) for n, a in tuned.items()} == {
        n: (type(a), a.nbytes) for n, a in rough.artifacts.items()
    }


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Hardswish, nn.SiLU, nn.Hardsigmoid])
def test_in_place_activations_change_nothing(activation):
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(8, 6), activation(inplace), nn.Linear(6, 6), activation(inplace))
        program = traced(nn.Sequential(module, nn.Linear(6, 4)).eval(), x=image(2, shape=(8,)))
        rough = compress_program(program, Plan.from_flags(bits=1), PosthocSettings(effort="fast"))
        batches = [{"input": image(32, shape=(8,))}]
        found.append(tune(program, rough.artifacts, batches, steps=5))
    for name, artifact in found[0].items():
        np.testing.assert_array_equal(artifact.dequantize(), found[1][name].dequantize())


def test_best_keeps_what_was_solved_where_tuning_gains_nothing():
    program = traced(randomized(Residual()), x=image(2))
    plan, data = Plan.from_flags(bits=2), Dataset(inputs={"x": 100 * image(256)}, name="c.npz")
    solved, best = (
        compress_program(program, plan, PosthocSettings(effort=e), calibration=data) for e in ("balanced", "best")
    )
    assert "32 held-back samples" in best.notes[-1]
    assert best.notes[-1].endswith("tuning does not help, so the solved weights are kept.")
    new = [{"x": image(64, seed=9)}]
    errors = [output_error(m.program, m.artifacts, new) for m in (solved, best)]
    assert errors[0] == errors[1]


def test_what_cannot_be_tuned_stays():
    module = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4, bias=False)).eval()
    program, batches = traced(module, x=image(2, shape=(8,))), [{"input": image(8, shape=(8,))}]
    floats = {n: FloatWeight(values=v.detach().numpy(), reason="") for n, v in program.state().items()}
    found = tune(program, {**floats}, batches, steps=3)
    assert all(found[n] is floats[n] for n in floats if "bias" not in n)
    settings, data = PosthocSettings(effort="best"), Dataset(inputs=batches[0])
    few = compress_program(program, Plan.from_flags(bits=1), settings, calibration=data)
    assert few.notes[-1] == 'too few inputs to tune on: effort "best" needs at least 256.'


def test_it_is_for_compute_float():
    program = traced(randomized(Residual()), x=image(2))
    plan, data = Plan.from_flags(bits=4, activation_bits=8), Dataset(inputs={"x": image(8)})
    with pytest.raises(
        ConfigError, match=r'^effort "best" works with compute "float" only, got compute "int8"; use "balanced"\.$'
    ):
        compress_program(program, plan, PosthocSettings(effort="best"), calibration=data)
