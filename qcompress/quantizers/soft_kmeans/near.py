"""Cells of vectors that are nearest to one centroid: they attend to the few centroids that matter to them.

The logits of centroids k and n differ by (2 (c_k - c_n)·r - |c_k - p|² + |c_n - p|²) / τ for a vector p + r. Of each
cell n, `reach` is the largest 2 (c_k - c_n)·r for the first centroids, which are computed with all vectors, once.
When a centroid moves by δ_k, that changes by at most 2 |r| (|δ_k| + |δ_n|). So how far logits can be above that of
the cell's own centroid is bounded, however far the centroids move.

Centroid k is left out of a cell only if its attention is at most e^-CUT, and also at most e^-CUT of the attention that
it gets elsewhere: a centroid far from all vectors goes where the attention to it is, small as it is.
"""

# Shape suffixes: G = groups, V = vectors of all groups, K = centroids of a group, L = centroids of all groups,
# n = cells (as many as centroids), D = numbers in a vector, N = vectors of a block

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from qcompress.quantizers.soft_kmeans.blocks import Buffers
from qcompress.quantizers.soft_kmeans.cells import CPU_NBYTES, AbstractCells, Cell
from qcompress.quantizers.soft_kmeans.dense import Metric
from qcompress.quantizers.soft_kmeans.hard import nearest
from qcompress.quantizers.soft_kmeans.table import is_queued

# What is left out is below e^-CUT times the number of centroids, and of cells: 1e-4 and 1e-11 of 256 of each, if all
# of it were as large as it may be.
_CUT: Final[Mapping[torch.dtype, float]] = {torch.float32: 20.0, torch.float64: 36.0}
_FEWEST: Final = 32  # vectors per centroid from which cells are worth their calls
_SLACK: Final = 16.0  # rounding errors of `reach`, in units of 2 |c_k - c_n|·|r|


def is_near(vectors: int, count: int, metric: Metric, device: torch.device) -> bool:
    """Returns whether groups of some vectors are computed in near cells. On a GPU, nothing may depend on values."""
    return metric == "squared" and not is_queued(device) and count > 1 and vectors >= _FEWEST * count


@final
@dataclass(frozen=True, slots=True)
class Near(AbstractCells):
    """The cells of all vectors of some groups, as one group.

    Args:
        order_V: the vectors, cell by cell.
        lengths: number of vectors of each cell.
        c_GKD: the first centroids, which are the origins, in the dtype of the arithmetic.
        tau_G: τ, float64.
        reach_GnK: see above; -inf where a cell is empty.
        radius_Gn: the largest |r|.
    """

    order_V: Tensor
    lengths: tuple[int, ...]
    c_GKD: Tensor
    tau_G: Tensor
    reach_GnK: Tensor
    radius_Gn: Tensor

    @classmethod
    def of(cls, x_1VD: Tensor, c_1LD: Tensor, tau_G: Tensor, dtype: torch.dtype) -> "Near":
        """Returns the cells of some vectors around some centroids."""
        x_VD, groups = x_1VD[0], len(tau_G)
        c_GKD = c_1LD.to(dtype).view(groups, -1, c_1LD.shape[2])
        count, size = c_GKD.shape[1:]
        step = _pairs(dtype) // max(count, size)
        codes = [
            nearest(some_ND, c_GKD[group]).add_(group * count).int()
            for group, part_VD in enumerate(x_VD.chunk(groups))
            for some_ND in part_VD.split(step)
        ]
        code_V = torch.cat(codes)
        lengths = code_V.bincount(minlength=groups * count).tolist()
        order_V = code_V.sort(stable=True).indices
        reach_LK = c_GKD.new_full((groups * count, count), -math.inf)
        radius_L = c_GKD.new_zeros(groups * count)
        for cell, part in enumerate(order_V.split(lengths)):
            group, n = divmod(cell, count)
            directions_KD = 2 * (c_GKD[group] - c_GKD[group, n])
            for some in part.split(step):
                r_ND = x_VD.index_select(0, some) - c_GKD[group, n]
                radius_L[cell] = r_ND.norm(dim=1).max().maximum(radius_L[cell])
                if size == 1:
                    r_ND = torch.stack(r_ND.aminmax())[:, None]
                reach_LK[cell] = (directions_KD @ r_ND.T).amax(1).maximum(reach_LK[cell])
        shape = groups, count
        return cls(order_V, tuple(lengths), c_GKD, tau_G, reach_LK.view(*shape, count), radius_L.view(shape))

    def facing(self, c_GKD: Tensor) -> Iterator[Cell]:
        groups, count, size = self.c_GKD.shape
        parts, pairs = self.order_V.split(self.lengths), _pairs(self.c_GKD.dtype)
        for group in range(groups):
            first = group * count
            is_kept_nK = self._is_kept(group, c_GKD[0, first : first + count])
            indices = is_kept_nK.nonzero()[:, 1].add_(first).split(is_kept_nK.sum(1).tolist())
            for n, kept in enumerate(indices):
                if self.lengths[first + n]:
                    some = parts[first + n].split(pairs // max(len(kept), 2 * size + 1))
                    origin = self.c_GKD[group, None, n : n + 1]
                    yield Cell(c_GKD, some, origin, self.tau_G[group].view(1, 1, 1), "squared", kept)

    def buffers(self) -> Buffers:
        size, pairs = self.c_GKD.shape[2], _pairs(self.c_GKD.dtype)
        length = min(max(self.lengths), pairs // (2 * size + 1))
        return Buffers(1, size, length, pairs, self.c_GKD)

    def _is_kept(self, group: int, c_KD: Tensor) -> Tensor:
        """Returns which centroids matter to each cell of a group, [n, K]."""
        first_KD, tau, dtype = self.c_GKD[group].double(), self.tau_G[group], self.c_GKD.dtype
        away_nK = torch.cdist(first_KD, c_KD, compute_mode="donot_use_mm_for_euclid_dist")
        own_n1 = away_nK.diagonal()[:, None]
        moved_K = (c_KD - first_KD).norm(dim=1)
        rounding_nK = _SLACK * torch.finfo(dtype).eps * (away_nK + own_n1)
        spread_nK = 2 * self.radius_Gn[group, :, None] * (moved_K + moved_K[:, None] + rounding_nK)
        reach_nK = self.reach_GnK[group] - away_nK.square() + own_n1.square()
        highest_nK = (reach_nK + spread_nK) / tau
        size_n = torch.tensor(self.lengths, dtype=torch.float64).view(self.radius_Gn.shape)[group].log_()
        # The attention to k is at least this in some vector of cell n, and in all vectors of cell k, up to 1 / K.
        lowest_nK = (reach_nK - spread_nK) / tau - highest_nK.amax(1, keepdim=True).clamp_min_(0)
        elsewhere_K = (lowest_nK + size_n.diag_embed()).amax(0)
        cut = _CUT[dtype]
        return (highest_nK >= -cut) | (highest_nK + size_n[:, None] >= elsewhere_K - cut)


def _pairs(dtype: torch.dtype) -> int:
    """Returns how many vectors times centroids fit in a buffer."""
    return CPU_NBYTES // dtype.itemsize
