"""Rounding with error feedback, then coordinate descent and refitting of the levels in turns.

Source: GPTQ (Frantar et al. 2023) with activation order: the weights of a row are rounded one after another, and those
still free compensate for each rounding error. Then coordinate descent moves each weight in turn to the level that is
best with all others fixed, until hardly any weight moves. In between, levels are refitted in closed form.
Deviations: levels need not be evenly spaced; the target is not the float weight but the weight that best reproduces the
float layer's outputs from the compressed network's inputs (`posthoc.solve`).

Shape suffixes: as in `base`, J = columns.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

import torch

from qcompress.solvers.base import AnyLevels, Levels, Problem, middles_of, nearest_codes, values_of

_DAMPING = 0.01  # share of the mean diagonal, for error feedback
_LEAST_DAMPING = 1e-6  # the same for coordinate descent
_BLOCK = 32  # columns
_ROUNDS = 3
_PASSES = 4
_HARDLY_ANY = 1e-3  # share of the weights; a pass that moves fewer is the last


def solve(problem: Problem, levels: AnyLevels, *, rounds: int = _ROUNDS) -> tuple[AnyLevels, torch.Tensor]:
    """Return levels and codes, int64 [G, R, K], whose error is never larger than that of the nearest levels.

    Args:
        problem: the objective.
        levels: the levels to start from.
        rounds: how often levels are refitted.
    """
    plain = nearest_codes(levels, problem.target)
    best = problem.error(values_of(levels, plain)), levels, plain
    with _one_thread():
        codes = error_feedback(problem, levels)
        for i in range(rounds + 1):
            codes = descend(problem, levels, codes)
            error = problem.error(values_of(levels, codes))
            if error < best[0]:
                best = error, levels, codes.clone()
            if i < rounds:
                levels, codes = levels.refit(problem, codes)
    return best[1], best[2]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch in one thread: for many small steps, more threads gain little and wait for each other on a busy CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def error_feedback(problem: Problem, levels: Levels) -> torch.Tensor:
    """Return codes by GPTQ, int64 [G, R, K]."""
    damped = _definite(problem)
    groups, rows, columns = problem.target.shape
    order_GK = torch.argsort(damped.diagonal(dim1=1, dim2=2), dim=1, descending=True, stable=True)
    damped = torch.gather(damped, 1, order_GK[:, :, None].expand(-1, -1, columns))
    damped = torch.gather(damped, 2, order_GK[:, None, :].expand(-1, columns, -1))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    left = torch.gather(problem.target, 2, order_GK[:, None, :].expand(-1, rows, -1)).clone()
    by_column = _ColumnLevels.of(levels, problem)
    if by_column.factor is not None:
        by_column = replace(
            by_column, factor=torch.gather(by_column.factor, 2, order_GK[:, None, :].expand(-1, rows, -1))
        )
    codes = torch.zeros_like(left, dtype=torch.int64)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.zeros(groups, rows, end - start, dtype=torch.float64)
        for j in range(start, end):
            codes[:, :, j], values = by_column.round(left[:, :, j], j)
            errors[:, :, j - start] = (left[:, :, j] - values) / upper[:, j, j, None]
            left[:, :, j:end] -= errors[:, :, j - start, None] * upper[:, None, j, j:end]
        left[:, :, end:] -= errors @ upper[:, start:end, end:]
    return torch.gather(codes, 2, torch.argsort(order_GK, dim=1)[:, None, :].expand(-1, rows, -1))


@dataclass(frozen=True, slots=True)
class _ColumnLevels:
    """Levels, reshaped for going through columns.

    Args:
        values: float64 [G, R, L].
        middles: float64 [G, R, L - 1].
        factor: float64 [G, R, K]; None: 1 each.
    """

    values: torch.Tensor
    middles: torch.Tensor
    factor: torch.Tensor | None

    @classmethod
    def of(cls, levels: Levels, problem: Problem) -> Self:
        """Return the levels of a problem."""
        shape = problem.target.shape
        values, middles = (v.reshape(*shape[:2], -1) for v in (levels.values, middles_of(levels)))
        return cls(values, middles, None if levels.factor is None else levels.factor.reshape(shape))

    def round(self, wanted_GR: torch.Tensor, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the nearest codes [G, R] for a column, and their values."""
        factor_GR = None if self.factor is None else self.factor[:, :, column]
        steps_GR = wanted_GR if factor_GR is None else wanted_GR / factor_GR
        code = torch.searchsorted(self.middles, steps_GR.unsqueeze(2).contiguous())
        value_GR = torch.gather(self.values, 2, code)[..., 0]
        return code[..., 0], value_GR if factor_GR is None else value_GR * factor_GR


def _definite(problem: Problem) -> torch.Tensor:
    """Return H, damped until it is positive definite: moments of float32 values can be slightly indefinite."""
    for share in (_DAMPING, 10 * _DAMPING, 100 * _DAMPING):
        damped = problem.damped(share)
        if not torch.linalg.cholesky_ex(damped).info.any():
            break
    return damped


def descend(problem: Problem, levels: Levels, codes_GRK: torch.Tensor, passes: int = _PASSES) -> torch.Tensor:
    """Return codes after passes of coordinate descent, int64 [G, R, K]; the error never grows."""
    hessian = problem.damped(_LEAST_DAMPING)
    columns, by_column = problem.target.shape[2], _ColumnLevels.of(levels, problem)
    codes, now = codes_GRK.clone(), values_of(levels, codes_GRK)
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
                code, value = by_column.round(wanted, start + j)
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
