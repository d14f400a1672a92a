"""What a solver is given, and what its codes stand for.

Shape suffixes: G = groups of channels, R = output channels of a group, O = output channels (G * R), K = weights of one
output channel, L = levels.
"""

from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Minimise sum over output channels of (t - q) H (t - q)ᵀ over codes q of given levels.

    Args:
        target: float64 [G, R, K]; t, what the weight would best be without codes.
        hessian: float64 [G, K, K], symmetric, positive semidefinite; H, the second moments of the inputs.
    """

    target: torch.Tensor
    hessian: torch.Tensor

    def error(self, values_GRK: torch.Tensor) -> float:
        """The objective for a weight."""
        left = self.target - values_GRK
        return float(((left @ self.hessian) * left).sum())

    def damped(self, share: float) -> torch.Tensor:
        """H plus a share of its mean diagonal; 1 where all of it is 0, so that any inputs give a solvable system."""
        mean_G = self.hessian.diagonal(dim1=1, dim2=2).mean(1)
        added_G = torch.where(mean_G > 0, share * mean_G, torch.ones_like(mean_G))
        return self.hessian + added_G[:, None, None] * torch.eye(self.hessian.shape[1], dtype=torch.float64)


class Levels(Protocol):
    """What the codes of each output channel stand for: values, times a factor of each weight where there are any."""

    @property
    def values(self) -> torch.Tensor:
        """float64 [O, L], sorted in each row."""

    @property
    def factor(self) -> torch.Tensor | None:
        """float64 [O, K], > 0; None: 1."""

    def refit(self, problem: Problem, codes_GRK: torch.Tensor) -> tuple[Self, torch.Tensor]:
        """Levels with a smaller error for the same codes, and these codes in the order of the new levels."""


AnyLevels = TypeVar("AnyLevels", bound=Levels)


class Solve(Protocol):
    """What a solver does: codes, int64 [G, R, K], for levels, or for better ones."""

    def __call__(self, problem: Problem, levels: AnyLevels) -> tuple[AnyLevels, torch.Tensor]:
        """Levels and codes with a small error."""


def looked_up(levels: Levels, codes_GRK: torch.Tensor) -> torch.Tensor:
    """float64 [G, R, K], what codes stand for."""
    values = levels.values.reshape(*codes_GRK.shape[:2], -1)
    found = torch.gather(values, 2, codes_GRK)
    return found if levels.factor is None else found * levels.factor.reshape(found.shape)


def nearest(levels: Levels, values_GRK: torch.Tensor) -> torch.Tensor:
    """int64 [G, R, K], the codes of the levels that are nearest to some values."""
    middles = middles_of(levels).reshape(*values_GRK.shape[:2], -1)
    if levels.factor is not None:
        values_GRK = values_GRK / levels.factor.reshape(values_GRK.shape)
    return torch.searchsorted(middles, values_GRK.contiguous())


def middles_of(levels: Levels) -> torch.Tensor:
    """float64 [O, L - 1], where one level gives way to the next, before factors."""
    values = levels.values
    return ((values[:, 1:] + values[:, :-1]) / 2).contiguous()
