"""Neighbouring centroids: where between them the attention changes, and how fast.

Shape suffixes: G = groups, K = centroids, C = cells.
"""

from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

NARROWEST: Final = 1e-30  # least distance of centroids, and least width of a cell, to divide by
SATURATED: Final = 40.0  # difference of logits from which the smaller attention is 0 in float64
_ALMOST: Final = 0.5  # bins made for some midpoints fit others that are this near, in units of τ / gap
_AT_ONCE: Final = 1 << 20  # elements of a density that are computed together


@final
@dataclass(frozen=True, slots=True)
class Neighbours:
    """Neighbouring centroids of each group: float64 [G, K - 1], or [G, 1] for the typical gap and τ.

    Args:
        middle: midpoints.
        gap: distances of the two.
        margin: how far midpoints may move.
        typical: the median gap.
        tau: τ.
    """

    middle: Tensor
    gap: Tensor
    margin: Tensor
    typical: Tensor
    tau: Tensor

    @classmethod
    def of(cls, c_GK: Tensor, tau_G: Tensor, drift: float) -> "Neighbours":
        """Returns the neighbours among sorted centroids."""
        tau = tau_G[:, None]
        gap = c_GK.diff(dim=1).clamp_min(NARROWEST)
        typical = gap.median(1, keepdim=True).values
        margin = (_ALMOST + drift) * tau / gap
        return cls((c_GK[:, 1:] + c_GK[:, :-1]) / 2, gap, margin, typical, tau)

    def density(self, low_GC: Tensor, width_GC: Tensor) -> Tensor:
        """Returns an upper bound of (2 / τ)·(standard deviation of the centroids under the attention) over each cell.

        Between two centroids it is (gap / τ) / cosh(z / 2), where z = 2·gap·(w - midpoint) / τ is the difference of
        their logits; the bound is the sum of these over neighbours.
        """
        density_GC = torch.zeros_like(low_GC, dtype=torch.float64)
        half_G1C = width_GC[:, None] / 2
        step = max(1, _AT_ONCE // low_GC.numel())
        slope = self.gap / self.tau
        for first in range(0, self.gap.shape[1], step):
            part = slice(first, first + step)
            away = (low_GC[:, None] + half_G1C - self.middle[:, part, None]).abs_().sub_(half_G1C)
            half_z = away.sub_(self.margin[:, part, None]).clamp_min_(0).mul_(slope[:, part, None])
            density_GC += (slope[:, part, None] / half_z.clamp_max_(SATURATED).cosh_()).sum(1)
        return density_GC

    def transitions(self) -> Tensor:
        """Returns the sum of the distances over which the attention changes, [G]."""
        return (self.tau / self.gap).sum(1)

    def near(self, c_GK: Tensor) -> bool:
        """Returns whether bins made for these neighbours fit those among other sorted centroids."""
        return bool((((c_GK[:, 1:] + c_GK[:, :-1]) / 2 - self.middle).abs() <= self.margin).all())
