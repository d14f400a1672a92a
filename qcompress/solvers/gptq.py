"""Error feedback onto levels, coordinate descent, and levels refitted to the codes, in turns.

Source: GPTQ (Frantar et al. 2023) with activation order: weights of a row are rounded one after another, and what each
rounding costs is made good by those that are still free. Then coordinate descent: each weight in turn to the level that
is best beside all others as they are, until hardly any moves. Levels are refitted in closed form in between.
Deviations: the levels are any, not only an even grid; the target is not the float weight but the one that gives the
float layer's outputs from the compressed net's inputs (`posthoc.solve`).

Shape suffixes: as in `base`, B = columns of a block, J = columns.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

import torch

from qcompress.solvers.base import AnyLevels, Levels, Problem, looked_up, middles_of, nearest

_DAMPING = 0.01  # of the mean diagonal, for error feedback
_LEAST_DAMPING = 1e-6  # the same for coordinate descent
_BLOCK = 32
_ROUNDS = 3
_PASSES = 4
_HARDLY_ANY = 1e-3  # share of the weights that move in the last pass


def solve(problem: Problem, levels: AnyLevels, *, rounds: int = _ROUNDS) -> tuple[AnyLevels, torch.Tensor]:
    """Levels and codes with a small error: never a larger one than that of the nearest levels.

    Args:
        problem: what to minimise.
        levels: to begin with.
        rounds: how often codes and levels take turns.

    Returns:
        The levels, and int64 [G, R, K] codes.
    """
    plain = nearest(levels, problem.target)
    best = problem.error(looked_up(levels, plain)), levels, plain
    with _one_thread():
        codes = error_feedback(problem, levels)
        for i in range(rounds + 1):
            codes = descend(problem, levels, codes)
            error = problem.error(looked_up(levels, codes))
            if error < best[0]:
                best = error, levels, codes.clone()
            if i < rounds:
                levels, codes = levels.refit(problem, codes)
    return best[1], best[2]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Column after column is many small steps: more threads gain little, and wait long for each other on a busy CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def error_feedback(problem: Problem, levels: Levels) -> torch.Tensor:
    """Codes by GPTQ: int64 [G, R, K]."""
    damped = _definite(problem)
    groups, rows, columns = problem.target.shape
    order_GK = torch.argsort(damped.diagonal(dim1=1, dim2=2), dim=1, descending=True, stable=True)
    damped = torch.gather(damped, 1, order_GK[:, :, None].expand(-1, -1, columns))
    damped = torch.gather(damped, 2, order_GK[:, None, :].expand(-1, columns, -1))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    left = torch.gather(problem.target, 2, order_GK[:, None, :].expand(-1, rows, -1)).clone()
    grid = _Grid.of(levels, problem)
    if grid.factor is not None:
        grid = replace(grid, factor=torch.gather(grid.factor, 2, order_GK[:, None, :].expand(-1, rows, -1)))
    codes = torch.zeros_like(left, dtype=torch.int64)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.zeros(groups, rows, end - start, dtype=torch.float64)
        for j in range(start, end):
            codes[:, :, j], values = grid.nearest(left[:, :, j], j)
            errors[:, :, j - start] = (left[:, :, j] - values) / upper[:, j, j, None]
            left[:, :, j:end] -= errors[:, :, j - start, None] * upper[:, None, j, j:end]
        left[:, :, end:] -= errors @ upper[:, start:end, end:]
    return torch.gather(codes, 2, torch.argsort(order_GK, dim=1)[:, None, :].expand(-1, rows, -1))


@dataclass(frozen=True, slots=True)
class _Grid:
    """Levels as columns meet them.

    Args:
        values: float64 [G, R, L].
        middles: float64 [G, R, L - 1].
        factor: float64 [G, R, K]; None: 1.
    """

    values: torch.Tensor
    middles: torch.Tensor
    factor: torch.Tensor | None

    @classmethod
    def of(cls, levels: Levels, problem: Problem) -> Self:
        shape = problem.target.shape
        values, middles = (v.reshape(*shape[:2], -1) for v in (levels.values, middles_of(levels)))
        return cls(values, middles, None if levels.factor is None else levels.factor.reshape(shape))

    def nearest(self, wanted_GR: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [G, R] in a column, and what they stand for there."""
        factor_GR = None if self.factor is None else self.factor[:, :, column]
        steps_GR = wanted_GR if factor_GR is None else wanted_GR / factor_GR
        code = torch.searchsorted(self.middles, steps_GR.unsqueeze(2).contiguous())
        value_GR = torch.gather(self.values, 2, code)[..., 0]
        return code[..., 0], value_GR if factor_GR is None else value_GR * factor_GR


def _definite(problem: Problem) -> torch.Tensor:
    """H with as much damping as it takes: the moments of float32 values can have eigenvalues a little below 0."""
    for share in (_DAMPING, 10 * _DAMPING, 100 * _DAMPING):
        damped = problem.damped(share)
        if not torch.linalg.cholesky_ex(damped).info.any():
            break
    return damped


def descend(problem: Problem, levels: Levels, codes_GRK: torch.Tensor, passes: int = _PASSES) -> torch.Tensor:
    """Codes after passes of coordinate descent: int64 [G, R, K]; the error never grows."""
    hessian = problem.damped(_LEAST_DAMPING)
    columns, grid = problem.target.shape[2], _Grid.of(levels, problem)
    codes, now = codes_GRK.clone(), looked_up(levels, codes_GRK)
    pull = (problem.target - now) @ hessian  # half the error's slope
    stiffness = hessian.diagonal(dim1=1, dim2=2)
    for _ in range(passes):
        moved = 0
        for start in range(0, columns, _BLOCK):
            end = min(start + _BLOCK, columns)
            inner, block = pull[:, :, start:end].clone(), hessian[:, start:end, start:end]
            steps = torch.zeros_like(inner)
            for j in range(end - start):
                wanted = now[:, :, start + j] + inner[:, :, j] / stiffness[:, start + j, None]
                code, value = grid.nearest(wanted, start + j)
                step = value - now[:, :, start + j]
                codes[:, :, start + j] = torch.where(step != 0, code, codes[:, :, start + j])
                now[:, :, start + j] += step
                steps[:, :, j] = step
                inner -= step[..., None] * block[:, None, j]
                moved += int(torch.count_nonzero(step))
            pull -= steps @ hessian[:, start:end]
        if moved <= _HARDLY_ANY * codes.numel():
            break
    return codes
