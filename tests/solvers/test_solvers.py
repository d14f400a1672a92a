"""Solvers against slow references, and what they must never do: a larger error than the nearest levels."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompress.artifacts.integer_range import IntegerRange
from qcompress.solvers import Problem
from qcompress.solvers.base import nearest_codes, values_of
from qcompress.solvers.gptq import descend, error_feedback
from qcompress.solvers.gptq import solve as gptq
from qcompress.solvers.palette_levels import Int8PaletteLevels, PaletteLevels
from qcompress.solvers.uniform_levels import UniformLevels
from tests.helpers import reference
from tests.helpers.examples import examples

SEEDS = st.integers(0, 2**32 - 1)


def problem(seed: int, groups: int = 2, rows: int = 3, columns: int = 7, rank: int = 20) -> Problem:
    random = np.random.default_rng(seed)
    x = random.standard_normal((groups, rank, columns)) * random.lognormal(0, 1, columns)
    target = random.standard_normal((groups, rows, columns))
    return Problem(target=torch.from_numpy(target), hessian=torch.from_numpy(x.transpose(0, 2, 1) @ x / rank))


def levels(kind: str, given: Problem, bits: int):
    rows = given.target.reshape(-1, given.target.shape[2]).numpy()
    weights = np.ones_like(rows)
    if "uniform" in kind:
        block_size = 3 if "blocks" in kind else None
        return UniformLevels.fit(rows, weights, bits, IntegerRange(bits, signed=True), block_size)
    if kind == "int8 palette":
        return Int8PaletteLevels.fit(rows, weights, bits, None, largest=127)
    return PaletteLevels.fit(
        rows, weights, bits, 2 if "rows" in kind else None, scaled="scaled" in kind, halves="halves" in kind
    )


KINDS = (
    "uniform", "uniform blocks", "palette", "palette scaled", "palette rows", "palette rows scaled",
    "palette rows scaled halves", "int8 palette",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@examples(20)
@given(seed=SEEDS, bits=st.integers(2, 4))
def test_error_feedback_is_the_slow_loop(kind, seed, bits):
    given = problem(seed)
    found = levels(kind, given, bits)
    codes = error_feedback(given, found)
    factor = torch.ones(6, 7) if found.factor is None else found.factor
    values = (found.values[:, None] * factor[:, :, None]).reshape(2, 3, 7, -1).numpy()
    for g, r in np.ndindex(2, 3):
        wanted = reference.gptq(given.target[g, r].numpy(), given.hessian[g].numpy(), values[g, r], damping=0.01)
        got, each = codes[g, r].numpy(), np.arange(7)
        assert values[g, r][each, got].tolist() == values[g, r][each, wanted].tolist()


@pytest.mark.parametrize("kind", KINDS)
@examples(20)
@given(seed=SEEDS, bits=st.integers(2, 4))
def test_descent_ends_where_no_single_weight_can_better_it(kind, seed, bits):
    given = problem(seed)
    found = levels(kind, given, bits)
    start = nearest_codes(found, given.target)
    codes = descend(given, found, start, passes=100)
    least = given.error(values_of(found, codes))
    assert least <= given.error(values_of(found, start)) * (1 + 1e-9)
    for place in np.ndindex(*codes.shape):
        for code in range(found.values.shape[1]):
            other = codes.clone()
            other[place] = code
            assert given.error(values_of(found, other)) >= least * (1 - 1e-5) - 1e-12


@pytest.mark.parametrize("kind", KINDS)
@examples(20)
@given(seed=SEEDS, bits=st.integers(2, 4))
def test_refitted_levels_are_better_and_sorted(kind, seed, bits):
    given = problem(seed)
    found = levels(kind, given, bits)
    codes = nearest_codes(found, given.target)
    before = given.error(values_of(found, codes))
    better, codes = found.refit(given, codes)
    assert (better.values.diff(dim=1) >= 0).all()
    slack = 1.02 if kind == "int8 palette" else 1.005 if "halves" in kind else 1 + 1e-9  # entries are rounded
    assert given.error(values_of(better, codes)) <= before * slack + 1e-12


@given(seed=SEEDS)
def test_a_palette_is_refitted_by_least_squares(seed):
    given = problem(seed, groups=1)
    found = levels("palette", given, 2)
    codes = nearest_codes(found, given.target)
    better, _ = found.refit(given, codes)
    root = np.linalg.cholesky(given.hessian[0].numpy() + 1e-12 * np.eye(7))
    one_hot = np.eye(4)[codes[0].numpy()]  # [R, K, L]
    left = np.concatenate([root.T @ row for row in one_hot])
    right = np.concatenate([root.T @ row for row in given.target[0].numpy()])
    ridge = np.sqrt(1e-4 * np.mean(np.square(left).sum(0)))  # towards the entries as they were
    left, right = np.concatenate([left, ridge * np.eye(4)]), np.concatenate([right, ridge * found.lut[0].numpy()])
    wanted = np.linalg.lstsq(left, right, rcond=None)[0]
    assert np.allclose(better.lut[0].numpy(), np.sort(wanted), rtol=1e-6, atol=1e-8)


def test_a_block_of_more_inputs_than_there_are_is_a_channel():
    given = problem(0)
    rows = given.target.reshape(6, 7).numpy()
    made = {
        size: UniformLevels.fit(rows, np.ones_like(rows), 3, IntegerRange(3, signed=True), size)
        for size in (None, 7, 10**12)
    }
    found = {
        size: gptq(given, start)[0].artifact(np.zeros((6, 7), np.uint8), (6, 7), 0) for size, start in made.items()
    }
    np.testing.assert_array_equal(found[7].scale, found[10**12].scale)
    np.testing.assert_allclose(found[7].scale[:, 0], found[None].scale, rtol=0.02)


@given(seed=SEEDS, bits=st.integers(2, 4))
def test_scales_of_blocks_are_refitted_together(seed, bits):
    given = problem(seed)
    found = levels("uniform blocks", given, bits)
    codes = nearest_codes(found, given.target)
    better, _ = found.refit(given, codes)
    assert (better.scale >= 0.1 * found.scale * (1 - 1e-9)).all()
    integers = (values_of(found, codes) / found.factor.reshape(codes.shape)).numpy()
    for g, r in np.ndindex(2, 3):
        root = np.linalg.cholesky(given.hessian[g].numpy() + 1e-12 * np.eye(7))
        blocks = np.stack([np.where(np.arange(7) // 3 == n, integers[g, r], 0) for n in range(3)])
        left, before = root.T @ blocks.T, found.scale[3 * g + r].numpy()
        ridge = np.sqrt(1e-4 * np.mean(np.square(left).sum(0))) or 1.0  # towards the scales as they were
        both = np.concatenate([left, ridge * np.eye(3)])
        best = np.linalg.lstsq(both, np.append(root.T @ given.target[g, r].numpy(), ridge * before), rcond=None)[0]
        got = better.scale[3 * g + r].numpy()
        if (best >= 0.1 * before).all():
            np.testing.assert_allclose(got, best, rtol=1e-6)
        else:  # on the way there
            way = (got - before) / (best - before)
            np.testing.assert_allclose(way, way[0], rtol=1e-5)
            assert 0 <= way[0] < 1


@pytest.mark.parametrize("kind", KINDS)
@examples(20)
@given(seed=SEEDS, bits=st.integers(2, 4), rank=st.sampled_from([1, 3, 20]))
def test_never_worse_than_the_nearest_levels(kind, seed, bits, rank):
    given = problem(seed, rank=rank)
    start = levels(kind, given, bits)
    found, codes = gptq(given, start)
    plain = given.error(values_of(start, nearest_codes(start, given.target)))
    assert given.error(values_of(found, codes)) <= plain


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_zeros_are_solved_by_the_nearest_levels(kind):
    given = Problem(target=problem(0).target, hessian=torch.zeros(2, 7, 7, dtype=torch.float64))
    start = levels(kind, given, 3)
    found, codes = gptq(given, start)
    assert torch.equal(values_of(found, codes), values_of(start, nearest_codes(start, given.target)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "axis"), [((6, 7), 0), ((7, 6), 1), ((6, 7, 1, 1), 0)])
def test_the_artifact_holds_what_the_codes_stand_for(kind, shape, axis):
    if kind == "uniform blocks" and len(shape) > 2:
        return  # matrices alone
    given = problem(3)
    found, codes = gptq(given, levels(kind, given, 3))
    small = found.artifact(codes.reshape(6, 7).numpy().astype(np.uint8), shape, axis)
    assert small.shape == shape
    rows = np.moveaxis(small.dequantize(), axis, 0).reshape(6, 7)
    assert np.allclose(rows, values_of(found, codes).reshape(6, 7).numpy(), rtol=1e-5)
