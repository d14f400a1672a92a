"""Vectors in cells around their nearest centroid: they attend only to the few centroids that matter to the cell.

The logits of centroids k and n differ by (2 (c_k - c_n)·r - |c_k - p|² + |c_n - p|²) / τ for a vector p + r. For each
cell n, `reach` is the largest 2 (c_k - c_n)·r of all its vectors, with the first centroids; it is computed once. When
centroids move by δ, it changes by at most 2 |r| (|δ_k| + |δ_n|). This bounds how far any logit can be above that of
the cell's own centroid, however far the centroids move.

Centroid k is left out of a cell only if its attention is at most e^-CUT, and also at most e^-CUT of what it gets
elsewhere: a centroid that is far from all vectors goes where it gets attention, little as that is.

A cell is cut into pieces of 1, 2, 4, ... vectors, so that pieces of equal length are computed together: as the groups
of a block.
"""

# Shape suffixes: G = groups, V = vectors of all groups, K = centroids of a group, L = centroids of all groups,
# n = cells of a group (K of them), D = numbers in a vector, N = some vectors, B = pieces of a block, C = centroids
# that matter to them

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from qcompress.quantizers.soft_kmeans.blocks import Buffers
from qcompress.quantizers.soft_kmeans.cells import AbstractPartition, Cells, Kept, fitting
from qcompress.quantizers.soft_kmeans.dense import Metric
from qcompress.quantizers.soft_kmeans.hard import nearest
from qcompress.quantizers.soft_kmeans.table import is_queued

# What is left out is at most e^-CUT times the number of centroids, and of cells: 1e-4 and 2e-11 for 256 of each.
_CUT: Final[Mapping[torch.dtype, float]] = {torch.float32: 20.0, torch.float64: 36.0}
_FEWEST: Final = 32  # vectors per centroid from which cells are worth their calls
_AT_ONCE: Final = 1 << 16  # vectors times centroids whose distances are computed together
_SLACK: Final = 16.0  # rounding errors of `reach`, in units of 2 |c_k - c_n|·|r|


def is_near(vectors: int, count: int, metric: Metric, device: torch.device) -> bool:
    """Returns whether groups of some vectors are computed in near cells. On a GPU, nothing may depend on values."""
    return metric == "squared" and not is_queued(device) and count > 1 and vectors >= _FEWEST * count


@final
@dataclass(frozen=True, slots=True)
class Pieces:
    """Pieces of equal length, one after the other.

    Args:
        start: the first vector.
        length: vectors of a piece.
        cells: the cell of each piece.
    """

    start: int
    length: int
    cells: tuple[int, ...]


@final
@dataclass(frozen=True, slots=True)
class Near(AbstractPartition):
    """The cells of all vectors of some groups, as one group.

    Args:
        order_V: the vectors, piece by piece.
        pieces: those of all lengths.
        size_Gn: number of vectors of each cell, float64.
        c_GKD: the first centroids, which are the origins, in the dtype of the arithmetic.
        tau_G: τ, float64.
        reach_GnK: see above; -inf where a cell is empty.
        radius_Gn: the largest |r|.
    """

    order_V: Tensor
    pieces: tuple[Pieces, ...]
    size_Gn: Tensor
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
        step = fitting(count, size, c_GKD)
        parts = zip(x_VD.chunk(groups), c_GKD, range(0, groups * count, count), strict=True)
        codes = [_near_one(part_VD, c_KD).add_(first) for part_VD, c_KD, first in parts]
        code_V = torch.cat(codes)
        size_L = code_V.bincount(minlength=groups * count)
        order_V = code_V.sort(stable=True).indices
        members = order_V.split(size_L.tolist())
        reach_LK = c_GKD.new_full((groups * count, count), -math.inf)
        radius_L = c_GKD.new_zeros(groups * count)
        for cell, member_V in enumerate(members):
            group, n = divmod(cell, count)
            directions_KD = 2 * (c_GKD[group] - c_GKD[group, n])
            for some in member_V.split(step):
                r_ND = x_VD.index_select(0, some) - c_GKD[group, n]
                radius_L[cell] = r_ND.norm(dim=1).max().maximum(radius_L[cell])
                if size == 1:
                    r_ND = torch.stack(r_ND.aminmax())[:, None]
                reach_LK[cell] = (directions_KD @ r_ND.T).amax(1).maximum(reach_LK[cell])
        shape = groups, count
        bounds = size_L.double().view(shape), c_GKD, tau_G, reach_LK.view(*shape, count), radius_L.view(shape)
        counts = torch.cat([_is_kept(group, c_GKD[group].double(), *bounds) for group in range(groups)]).sum(1).tolist()
        pieces, order_V = _cut(members, counts, step)
        return cls(order_V, pieces, *bounds)

    def arranged(self, values_GVD: Tensor) -> Tensor:
        return values_GVD.index_select(1, self.order_V)

    def restored(self, values_GVD: Tensor) -> Tensor:
        return torch.empty_like(values_GVD).index_copy_(1, self.order_V.long(), values_GVD)

    def facing(self, c_GKD: Tensor) -> Iterator[Cells]:
        groups, count, size = self.c_GKD.shape
        bounds = self.size_Gn, self.c_GKD, self.tau_G, self.reach_GnK, self.radius_Gn
        kept, counts = [], []
        for group in range(groups):
            is_kept_nK = _is_kept(group, c_GKD[0, group * count : (group + 1) * count], *bounds)
            kept.append(is_kept_nK.byte().argsort(dim=1, descending=True, stable=True).add_(group * count))
            counts.append(is_kept_nK.sum(1))
        kept_LK, count_L = torch.cat(kept), torch.cat(counts)
        listed, origin_L1D, tau_G11 = count_L.tolist(), self.c_GKD.view(-1, 1, size), self.tau_G[:, None, None]
        for start, length, cells in _batches(self.pieces, listed, self._numbers, size):
            cell_B = torch.tensor(cells)
            most = max(listed[cell] for cell in cells)
            is_absent_BC = torch.arange(most) >= count_L[cell_B, None]
            index_BC = torch.where(is_absent_BC, cell_B[:, None], kept_LK[cell_B, :most])
            parts = [slice(start, start + length * len(cells))]
            where = origin_L1D[cell_B], tau_G11[cell_B // count]
            yield Cells(c_GKD, parts, *where, "squared", Kept(index_BC, is_absent_BC[..., None]))

    def buffers(self) -> Buffers:
        return Buffers(self._numbers, self.c_GKD)

    @property
    def _numbers(self) -> int:
        _, count, size = self.c_GKD.shape
        return fitting(count, size, self.c_GKD) * max(count, 2 * size + 1)


def _near_one(x_VD: Tensor, c_KD: Tensor) -> Tensor:
    """Returns for each vector the nearest centroid, int32 [V], or one that is hardly farther away."""
    if c_KD.shape[1] == 1:
        return torch.cat([nearest(x_ND, c_KD).int() for x_ND in x_VD.split(_AT_ONCE)])
    shift_D = c_KD.mean(0)
    c = c_KD - shift_D
    factors_KH = torch.cat([2 * c, -c.square().sum(1, keepdim=True)], 1)
    # The index of a centroid takes the last bits of its score, so that the largest score tells whose it is. This
    # takes half the time of finding where the largest is.
    integer = torch.int32 if c.dtype == torch.float32 else torch.int64
    index_K1 = torch.arange(len(c), dtype=integer)[:, None]
    bits = (1 << (len(c) - 1).bit_length()) - 1
    found = []
    for x_ND in x_VD.split(max(1, _AT_ONCE // len(c))):
        x_NH = torch.cat([x_ND - shift_D, shift_D.new_ones(len(x_ND), 1)], 1)
        score_KN = factors_KH @ x_NH.T
        score_KN.view(integer).bitwise_and_(~bits).bitwise_or_(index_K1)
        found.append(score_KN.amax(0).view(integer).bitwise_and_(bits).int())
    return torch.cat(found)


def _is_kept(
    group: int, c_KD: Tensor, size_Gn: Tensor, c_GKD: Tensor, tau_G: Tensor, reach_GnK: Tensor, radius_Gn: Tensor
) -> Tensor:
    """Returns which centroids matter to each cell of a group, [n, K]; see `Near`."""
    first_KD, cut = c_GKD[group].double(), _CUT[c_GKD.dtype]
    away_nK = torch.cdist(first_KD, c_KD, compute_mode="donot_use_mm_for_euclid_dist")
    own_n1 = away_nK.diagonal()[:, None]
    moved_K = (c_KD - first_KD).norm(dim=1)
    rounding_nK = _SLACK * torch.finfo(c_GKD.dtype).eps * (away_nK + own_n1)
    spread_nK = 2 * radius_Gn[group, :, None] * (moved_K + moved_K[:, None] + rounding_nK)
    reach_nK = reach_GnK[group] - away_nK.square() + own_n1.square()
    highest_nK = (reach_nK + spread_nK) / tau_G[group]
    # The attention to k is at least this in some vector of cell n, and in all vectors of cell k, up to 1 / K.
    lowest_nK = (reach_nK - spread_nK) / tau_G[group] - highest_nK.amax(1, keepdim=True).clamp_min_(0)
    log_size_n = size_Gn[group].log()
    elsewhere_K = (lowest_nK + log_size_n.diag_embed()).amax(0)
    return (highest_nK >= -cut) | (highest_nK + log_size_n[:, None] >= elsewhere_K - cut)


def _cut(members: tuple[Tensor, ...], counts: list[int], longest: int) -> tuple[tuple[Pieces, ...], Tensor]:
    """Cuts cells into pieces; those of equal length follow each other, by the number of centroids that matter to them.

    Args:
        members: the vectors of each cell.
        counts: how many centroids matter to each.
        longest: the largest number of vectors of a piece.

    Returns:
        The pieces, and the order of the vectors.
    """
    found: dict[int, list[tuple[int, Tensor]]] = {}
    for cell in sorted(range(len(members)), key=lambda cell: -counts[cell]):
        rest = members[cell]
        while length := min(longest, len(rest)):
            length = 1 << (length.bit_length() - 1)
            found.setdefault(length, []).append((cell, rest[:length]))
            rest = rest[length:]
    pieces, order, start = [], [], 0
    for length, some in found.items():
        pieces.append(Pieces(start, length, tuple(cell for cell, _ in some)))
        order += [part for _, part in some]
        start += length * len(some)
    return tuple(pieces), torch.cat(order).int()


def _batches(
    pieces: tuple[Pieces, ...], counts: list[int], numbers: int, size: int
) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Yields pieces whose attention fits in buffers: their first vector, their length, and their cells."""
    for some in pieces:
        first, most = 0, 2 * size + 1
        for i, cell in enumerate(some.cells):
            more = max(most, counts[cell])
            if i > first and (i + 1 - first) * some.length * more > numbers:
                yield some.start + first * some.length, some.length, some.cells[first:i]
                first, more = i, max(2 * size + 1, counts[cell])
            most = more
        yield some.start + first * some.length, some.length, some.cells[first:]
