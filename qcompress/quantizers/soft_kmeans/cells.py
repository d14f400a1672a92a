"""Cells: vectors that share an origin, and the centroids that they attend to, computed block by block.

Shape suffixes: G = groups, or cells that are computed together; V = vectors of a group, K = centroids, C = those of
a cell, D = numbers in a vector, H = D + 1, F = any, N = vectors of a block.
"""

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from qcompress.quantizers.soft_kmeans.blocks import ATTENTION, Block, Buffers
from qcompress.quantizers.soft_kmeans.dense import Metric

_CPU_NBYTES: Final = 1 << 20  # of a buffer; a smaller one stays in L2, but takes more calls
_GPU_NBYTES: Final = 1 << 24  # two of them stay in L2


@final
@dataclass(frozen=True, slots=True)
class Kept:
    """The centroids that each of some cells attends to.

    Args:
        index: where they are among all, [G, C].
        is_absent: whether one is there only because another cell has more, [G, C].
    """

    index: Tensor
    is_absent: Tensor


@final
class Cells:
    """Some cells of vectors, and the centroids that each attends to.

    Args:
        c_GKD: all centroids, float64.
        parts: which vectors each block has, along V.
        origin_G1D: the origins, in the dtype of the arithmetic.
        tau_G11: τ, float64.
        metric: of the distance.
        kept: the centroids that matter; None: all of the group.

    Attributes:
        attention: that to these centroids.
    """

    def __init__(
        self,
        c_GKD: Tensor,
        parts: Sequence[slice],
        origin_G1D: Tensor,
        tau_G11: Tensor,
        metric: Metric,
        kept: Kept | None = None,
    ) -> None:
        self._parts, self._origin_G1D, self._kept = parts, origin_G1D, kept
        is_absent_GC1 = None if kept is None else kept.is_absent[..., None]
        self.attention = ATTENTION[metric](self.local(c_GKD), tau_G11, origin_G1D.dtype, is_absent_GC1)

    @property
    def pairs(self) -> int:
        """The number of pairs of a vector and a centroid."""
        vectors: int = sum(part.stop - part.start for part in self._parts)
        return self.attention.count * vectors

    def blocks(self, x_GVD: Tensor, buffers: Buffers) -> Iterator[tuple[slice, Block]]:
        """Yields all blocks with their attention, and which vectors they have."""
        groups, _, size = self._origin_G1D.shape
        for part in self._parts:
            x_GND = self.at(x_GVD, part)
            block = buffers.block(groups, self.attention.count, size, x_GND.shape[1])
            torch.sub(x_GND.mT, self._origin_G1D.mT, out=block.x_GDN)
            self.attention.logits(block)
            block.soften()
            yield part, block

    def at(self, values_GVD: Tensor, part: slice) -> Tensor:
        """Returns the values of some vectors, [G, N, D]: a view, if the values are contiguous."""
        return values_GVD[:, part].view(len(self._origin_G1D), -1, values_GVD.shape[2])

    def pick(self, rows_GKF: Tensor) -> Tensor:
        """Returns the rows of the cells' centroids, [G, C, F]."""
        if self._kept is None:
            return rows_GKF
        index_GC = self._kept.index
        return rows_GKF[0].index_select(0, index_GC.view(-1)).view(*index_GC.shape, -1)

    def local(self, c_GKD: Tensor) -> Tensor:
        """Returns the cells' centroids minus the origin, float64 [G, C, D]."""
        return self.pick(c_GKD) - self._origin_G1D

    def back(self, x_GND: Tensor) -> Tensor:
        """Returns vectors plus the origin."""
        return x_GND + self._origin_G1D

    def zeros(self, size: int) -> Tensor:
        """Returns zeros for each of the cells' centroids, float64 [G, C, F] with F = `size`."""
        return self._origin_G1D.new_zeros(len(self._origin_G1D), self.attention.count, size, dtype=torch.float64)

    def add(self, sums_GKF: Tensor, part_GCF: Tensor) -> None:
        """Adds to the rows of the cells' centroids."""
        if self._kept is None:
            sums_GKF.add_(part_GCF)
        else:
            sums_GKF[0].index_add_(0, self._kept.index.view(-1), part_GCF.flatten(0, 1))

    def add_moments(self, sums_GKH: Tensor, moments_GCH: Tensor) -> None:
        """Adds Σ_v A x and Σ_v A to the rows of the cells' centroids, from those of vectors minus the origin."""
        moments_GCH[..., :-1].addcmul_(self._origin_G1D, moments_GCH[..., -1:])
        self.add(sums_GKH, moments_GCH)


class AbstractPartition(abc.ABC):
    """All vectors of some groups, in cells."""

    @abc.abstractmethod
    def arranged(self, values_GVD: Tensor) -> Tensor:
        """Returns values of the vectors, contiguous, in the order in which cells take them."""

    @abc.abstractmethod
    def restored(self, values_GVD: Tensor) -> Tensor:
        """Returns values of the vectors in the order in which `arranged` got them."""

    @abc.abstractmethod
    def facing(self, c_GKD: Tensor) -> Iterator[Cells]:
        """Yields the cells for attention to some centroids, float64; the same ones for the same centroids."""

    @abc.abstractmethod
    def buffers(self) -> Buffers:
        """Returns buffers for their blocks."""


@final
@dataclass(frozen=True, slots=True)
class Whole(AbstractPartition):
    """One cell for all vectors of a group: they attend to all centroids of their group.

    Args:
        origin: the mean of the first centroids, [G, 1, D] in the dtype of the arithmetic.
        tau: τ, float64 [G, 1, 1].
        metric: of the distance.
        count: K.
        vectors: V.
    """

    origin: Tensor
    tau: Tensor
    metric: Metric
    count: int
    vectors: int

    @classmethod
    def batches(
        cls, c_GKD: Tensor, tau_G: Tensor, vectors: int, metric: Metric, dtype: torch.dtype
    ) -> list[tuple[slice, "Whole"]]:
        """Returns the groups whose blocks fit in buffers together, and their cells."""
        groups, count, size = c_GKD.shape
        origin_G1D = c_GKD.mean(1, keepdim=True, dtype=torch.float64).to(dtype)
        step = max(1, fitting(count, size, origin_G1D) // max(1, vectors))
        some = [slice(start, start + step) for start in range(0, groups, step)]
        return [(part, cls(origin_G1D[part], tau_G[part, None, None], metric, count, vectors)) for part in some]

    def arranged(self, values_GVD: Tensor) -> Tensor:
        return values_GVD.contiguous()

    def restored(self, values_GVD: Tensor) -> Tensor:
        return values_GVD

    def facing(self, c_GKD: Tensor) -> Iterator[Cells]:
        starts = range(0, self.vectors, self._step)
        parts = [slice(start, min(start + self._step, self.vectors)) for start in starts]
        yield Cells(c_GKD, parts, self.origin, self.tau, self.metric)

    def buffers(self) -> Buffers:
        groups, _, size = self.origin.shape
        return Buffers(groups * min(self._step, self.vectors) * max(self.count, 2 * size + 1), self.origin)

    @property
    def _step(self) -> int:
        return fitting(self.count, self.origin.shape[2], self.origin)


def fitting(count: int, size: int, like: Tensor) -> int:
    """Returns how many vectors of D = `size` with attention to K = `count` centroids fit in buffers."""
    nbytes = _CPU_NBYTES if like.device.type == "cpu" else _GPU_NBYTES
    return max(1, nbytes // (max(count, 2 * size + 1) * like.dtype.itemsize))
