"""The problem that a solver solves, and the levels that its codes stand for.

Shape suffixes: G = groups of channels, R = output channels of a group, O = output channels (G * R), K = weights of one
output channel, L = levels.
"""

from dataclasses import dataclass
from typing import Final, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch

Doubles = npt.NDArray[np.float64]

RIDGE: Final = 1e-4  # share of the mean diagonal by which refitted levels are drawn towards the old ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Minimise the sum over output channels of (t - q) H (t - q)ᵀ, where q are values at given levels.

    Args:
        target: float64 [G, R, K]; t, the best weight if it had no codes.
        hessian: float64 [G, K, K], symmetric, positive semidefinite; H, the second moments of the inputs.
    """

    target: torch.Tensor
    hessian: torch.Tensor

    def error(self, values_GRK: torch.Tensor) -> float:
        """Return the objective for a weight, float64 [G, R, K]."""
        left = self.target - values_GRK
        return float(((left @ self.hessian) * left).sum())

    def damped(self, share: float) -> torch.Tensor:
        """Return H plus a share of its mean diagonal on the diagonal, or plus 1 if H is 0: always a solvable system."""
        mean_G = self.hessian.diagonal(dim1=1, dim2=2).mean(1)
        added_G = torch.where(mean_G > 0, share * mean_G, torch.ones_like(mean_G))
        return self.hessian + added_G[:, None, None] * torch.eye(self.hessian.shape[1], dtype=torch.float64)


class Levels(Protocol):
    """The values of the codes in each output channel, times a factor of each weight if there are factors."""

    @property
    def values(self) -> torch.Tensor:
        """float64 [O, L], sorted in each row."""

    @property
    def factor(self) -> torch.Tensor | None:
        """float64 [O, K], > 0; None: 1 each."""

    def refit(self, problem: Problem, codes_GRK: torch.Tensor) -> tuple[Self, torch.Tensor]:
        """Return levels with a smaller error for the same codes, and the codes in the order of the new levels."""


AnyLevels = TypeVar("AnyLevels", bound=Levels)


class Solve(Protocol):
    """The signature of a solver."""

    def __call__(self, problem: Problem, levels: AnyLevels) -> tuple[AnyLevels, torch.Tensor]:
        """Return the levels, or better ones, and codes, int64 [G, R, K], with a small error."""


def values_of(levels: Levels, codes_GRK: torch.Tensor) -> torch.Tensor:
    """Return the values of codes, float64 [G, R, K]."""
    values = levels.values.reshape(*codes_GRK.shape[:2], -1)
    found = torch.gather(values, 2, codes_GRK)
    return found if levels.factor is None else found * levels.factor.reshape(found.shape)


def nearest_codes(levels: Levels, values_GRK: torch.Tensor) -> torch.Tensor:
    """Return the codes of the levels that are nearest to the values, int64 [G, R, K]."""
    middles = middles_of(levels).reshape(*values_GRK.shape[:2], -1)
    if levels.factor is not None:
        values_GRK = values_GRK / levels.factor.reshape(values_GRK.shape)
    return torch.searchsorted(middles, values_GRK.contiguous())


def middles_of(levels: Levels) -> torch.Tensor:
    """Return the middles between neighbouring levels, without factors, float64 [O, L - 1]."""
    values = levels.values
    return ((values[:, 1:] + values[:, :-1]) / 2).contiguous()
