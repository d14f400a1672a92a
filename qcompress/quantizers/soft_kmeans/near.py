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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from qcompress.quantizers.soft_kmeans.blocks import Buffers
from qcompress.quantizers.soft_kmeans.cells import AbstractPartition, Cells, Kept, fitting
from qcompress.quantizers.soft_kmeans.hard import nearest
from qcompress.quantizers.soft_kmeans.table import is_queued

# What is left out is at most e^-CUT times the number of centroids, and of cells: 1e-4 and 2e-11 for 256 of each.
_CUT: Final[Mapping[torch.dtype, float]] = {torch.float32: 20.0, torch.float64: 36.0}
_FEWEST: Final = 64  # vectors per centroid from which cells are worth their calls
_AT_ONCE: Final = 1 << 16  # vectors times centroids whose distances are computed together
_SAMPLE: Final = 64  # vectors per centroid that tell how much can be left out
_MOST: Final = 0.35  # share of the attention that may be left at most
_MOST_SPREAD: Final = 1300.0  # variance · D² / τ up to which float32 keeps enough digits, measured for D = 1 to 8
_SLACK: Final = 16.0  # rounding errors of `reach`, in units of 2 |c_k - c_n|·|r|


def is_worthwhile(x_VD: Tensor, c_GKD: Tensor, tau_G: Tensor, lengths: Sequence[int]) -> bool:
    """Returns whether near cells are faster than attention to all centroids. It looks at some of the vectors.

    Args:
        x_VD: the vectors of all groups, one group after the other.
        c_GKD: the centroids.
        tau_G: τ, float64.
        lengths: number of vectors of each group.
    """
    count = c_GKD.shape[1]
    if is_queued(x_VD.device) or min(lengths) < _FEWEST * count:
        return False
    kept = total = 0
    for x, c_KD, tau in zip(torch.split(x_VD, list(lengths)), c_GKD, tau_G, strict=True):
        some = x[:: max(1, len(x) // (_SAMPLE * count))].contiguous()
        near = Near.of(some[None], c_KD[None], tau[None], torch.float32)
        kept += sum(cells.pairs for cells in near.facing(c_KD[None].double()))
        total += len(some) * count
    return kept <= _MOST * total


def near_dtype(variance: float, size: int, tau: float) -> torch.dtype:
    """Returns what `needed_dtype` does, for near cells: around near origins, logits keep more digits.

    Args:
        variance: that of the numbers in the vectors.
        size: D.
        tau: the smallest τ, > 0.

    >>> near_dtype(variance=1.0, size=4, tau=0.02), near_dtype(variance=1.0, size=4, tau=0.002)
    (torch.float32, torch.float64)
    """
    return torch.float32 if variance * size**2 <= _MOST_SPREAD * tau else torch.float64


@final
@dataclass(frozen=True, slots=True)
class Bounds:
    """What bounds the logits of the vectors in each cell; G groups have K cells each.

    Args:
        first: the first centroids, which are the origins, [G, K, D] in the dtype of the arithmetic.
        tau: τ, float64 [G].
        sizes: number of vectors of each cell, float64 [G, K].
        reach: see above, [G, K, K]; -inf for an empty cell.
        radius: the largest |r|, [G, K].
    """

    first: Tensor
    tau: Tensor
    sizes: Tensor
    reach: Tensor
    radius: Tensor

    @classmethod
    def of(cls, x_VD: Tensor, members: Sequence[Tensor], first_GKD: Tensor, tau_G: Tensor) -> "Bounds":
        """Returns the bounds of some cells, given the indices of their vectors."""
        groups, count, size = first_GKD.shape
        sizes_L = torch.tensor([len(member_V) for member_V in members], dtype=torch.float64)
        reach_LK = first_GKD.new_full((groups * count, count), -math.inf)
        radius_L = first_GKD.new_zeros(groups * count)
        for cell, member_V in enumerate(members):
            if not len(member_V):
                continue
            first_KD, n = first_GKD[cell // count], cell % count
            for some in torch.split(member_V, fitting(count, size, first_GKD)):
                r_ND = x_VD.index_select(0, some).to(first_KD.dtype) - first_KD[n]
                radius_L[cell] = r_ND.norm(dim=1).max().maximum(radius_L[cell])
                if size == 1:
                    r_ND = torch.stack(r_ND.aminmax())[:, None]
                reach_LK[cell] = (2 * (first_KD - first_KD[n]) @ r_ND.T).amax(1).maximum(reach_LK[cell])
        shape = groups, count
        return cls(first_GKD, tau_G, sizes_L.view(shape), reach_LK.view(*shape, count), radius_L.view(shape))

    def kept(self, c_1LD: Tensor) -> Tensor:
        """Returns which centroids of its group matter to each cell, [L, K]."""
        c_GKD = c_1LD.view(self.first.shape)
        return torch.cat([self._kept(group, c_KD) for group, c_KD in enumerate(c_GKD)])

    def _kept(self, group: int, c_KD: Tensor) -> Tensor:
        first_KD, cut, tau = self.first[group].double(), _CUT[self.first.dtype], self.tau[group]
        away_nK = torch.cdist(first_KD, c_KD, compute_mode="donot_use_mm_for_euclid_dist")
        own_n1 = away_nK.diagonal()[:, None]
        moved_K = (c_KD - first_KD).norm(dim=1)
        rounding_nK = _SLACK * torch.finfo(self.first.dtype).eps * (away_nK + own_n1)
        spread_nK = 2 * self.radius[group, :, None] * (moved_K + moved_K[:, None] + rounding_nK)
        reach_nK = self.reach[group] - away_nK.square() + own_n1.square()
        highest_nK = (reach_nK + spread_nK) / tau
        # The attention to k is at least this in some vector of cell n, and in all vectors of cell k, up to 1 / K.
        lowest_nK = (reach_nK - spread_nK) / tau - highest_nK.amax(1, keepdim=True).clamp_min_(0)
        log_size_n = self.sizes[group].log()
        elsewhere_K = (lowest_nK + log_size_n.diag_embed()).amax(0)
        matters_to_k_nK: Tensor = highest_nK + log_size_n[:, None] >= elsewhere_K - cut
        return matters_to_k_nK.logical_or(highest_nK >= -cut)


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
        order: the vectors, piece by piece, int32 [V].
        pieces: those of all lengths.
        bounds: tell which centroids matter to each cell.
    """

    order: Tensor
    pieces: tuple[Pieces, ...]
    bounds: Bounds

    @classmethod
    def of(cls, x_1VD: Tensor, c_1LD: Tensor, tau_G: Tensor, dtype: torch.dtype) -> "Near":
        """Returns the cells of some vectors around some centroids."""
        x_VD, groups = x_1VD[0], len(tau_G)
        first_GKD = c_1LD.to(dtype).view(groups, -1, c_1LD.shape[2])
        count, size = first_GKD.shape[1:]
        parts = zip(x_VD.chunk(groups), first_GKD, range(0, groups * count, count), strict=True)
        cell_V = torch.cat([_near_one(part_VD, c_KD).add_(first) for part_VD, c_KD, first in parts])
        sizes = cell_V.bincount(minlength=groups * count).tolist()
        members = torch.split(cell_V.sort(stable=True).indices, sizes)
        bounds = Bounds.of(x_VD, members, first_GKD, tau_G)
        counts = bounds.kept(first_GKD.double()).sum(1).tolist()
        pieces, order_V = _cut(members, counts, fitting(count, size, first_GKD))
        return cls(order_V, pieces, bounds)

    def arranged(self, values_GVD: Tensor) -> Tensor:
        return values_GVD.index_select(1, self.order)

    def restored(self, values_GVD: Tensor) -> Tensor:
        return torch.empty_like(values_GVD).index_copy_(1, self.order.long(), values_GVD)

    def facing(self, c_GKD: Tensor) -> Iterator[Cells]:
        first, count = self.bounds.first, self.bounds.first.shape[1]
        is_kept_LK = self.bounds.kept(c_GKD)
        count_L = is_kept_LK.sum(1)
        # Indices of those kept, then others.
        kept_LK = is_kept_LK.byte().argsort(dim=1, descending=True, stable=True)
        kept_LK += torch.arange(0, len(kept_LK), count).repeat_interleave(count)[:, None]
        for batch in _batches(self.pieces, count_L.tolist(), self._numbers, 2 * first.shape[2] + 1):
            cell_B = torch.tensor(batch.cells)
            counts_B1 = count_L[cell_B, None]
            most = int(counts_B1.max())
            is_absent_BC = torch.arange(most) >= counts_B1
            index_BC = torch.where(is_absent_BC, cell_B[:, None], kept_LK[cell_B, :most])
            parts = [slice(batch.start, batch.start + batch.length * len(cell_B))]
            where = first.view(-1, 1, first.shape[2])[cell_B], self.bounds.tau[cell_B // count, None, None]
            yield Cells(c_GKD, parts, *where, "squared", Kept(index_BC, is_absent_BC))

    def buffers(self) -> Buffers:
        return Buffers(self._numbers, self.bounds.first)

    @property
    def _numbers(self) -> int:
        _, count, size = self.bounds.first.shape
        return fitting(count, size, self.bounds.first) * max(count, 2 * size + 1)


def _near_one(x_VD: Tensor, c_KD: Tensor) -> Tensor:
    """Returns for each vector the nearest centroid, int32 [V], or one that is hardly farther away."""
    if c_KD.shape[1] == 1:
        return torch.cat([nearest(x_ND, c_KD).int() for x_ND in torch.split(x_VD, _AT_ONCE)])
    shift_D = c_KD.mean(0)
    c = c_KD - shift_D
    factors_KH = torch.cat([2 * c, -c.square().sum(1, keepdim=True)], 1)
    # The index of a centroid takes the last bits of its score, so that the largest score tells whose it is. This
    # takes half the time of finding where the largest is.
    integer = torch.int32 if c.dtype == torch.float32 else torch.int64
    index_K1 = torch.arange(len(c), dtype=integer)[:, None]
    bits = (1 << (len(c) - 1).bit_length()) - 1
    step, found = max(1, _AT_ONCE // len(c)), []
    flat = c.new_empty(step * len(c))
    for x_ND in torch.split(x_VD, step):
        x_NH = torch.cat([x_ND.to(c.dtype) - shift_D, shift_D.new_ones(len(x_ND), 1)], 1)
        score_KN = torch.mm(factors_KH, x_NH.T, out=flat[: len(c) * len(x_ND)].view(len(c), -1))
        score_KN.view(integer).bitwise_and_(~bits).bitwise_or_(index_K1)
        found.append(score_KN.amax(0).view(integer).bitwise_and_(bits).int())
    return torch.cat(found)


def _cut(members: Sequence[Tensor], counts: Sequence[int], longest: int) -> tuple[tuple[Pieces, ...], Tensor]:
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


def _batches(pieces: Sequence[Pieces], counts: Sequence[int], numbers: int, least: int) -> Iterator[Pieces]:
    """Yields pieces that fit in buffers together.

    Args:
        pieces: of all lengths.
        counts: how many centroids matter to each cell.
        numbers: how many fit in a buffer.
        least: how many each vector needs at least.
    """
    for some in pieces:
        first, most = 0, least
        for i, cell in enumerate(some.cells):
            most = max(most, counts[cell])
            if i > first and (i + 1 - first) * some.length * most > numbers:
                yield Pieces(some.start + first * some.length, some.length, some.cells[first:i])
                first, most = i, max(least, counts[cell])
        yield Pieces(some.start + first * some.length, some.length, some.cells[first:])
