"""Cells: vectors that share an origin, and the centroids that they attend to, computed block by block.

Shape suffixes: G = groups, V = vectors of a group, K = centroids, C = those of a cell, D = numbers in a vector,
F = any, N = vectors of a block.
"""

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from qcompress.quantizers.soft_kmeans.blocks import ATTENTION, Block, Buffers
from qcompress.quantizers.soft_kmeans.dense import Metric

Part = slice | Tensor  # where the vectors of a block are along V

CPU_NBYTES: Final = 1 << 20  # of a buffer; a smaller one stays in L2, but takes more calls
_GPU_NBYTES: Final = 1 << 24  # two of them stay in L2


@final
class Cell:
    """Vectors that share an origin, and the centroids that they attend to.

    Args:
        c_GKD: all centroids, float64.
        parts: where the vectors of each block are.
        origin_G1D: the origin, in the dtype of the arithmetic.
        tau_G11: τ, float64.
        metric: of the distance.
        kept: indices of the centroids that they attend to; None: all.

    Attributes:
        attention: that to these centroids.
    """

    def __init__(
        self,
        c_GKD: Tensor,
        parts: Sequence[Part],
        origin_G1D: Tensor,
        tau_G11: Tensor,
        metric: Metric,
        kept: Tensor | None = None,
    ) -> None:
        self._parts, self._origin_G1D, self._kept = parts, origin_G1D, kept
        self.attention = ATTENTION[metric](self.local(c_GKD), tau_G11, origin_G1D.dtype)

    def blocks(self, x_GVD: Tensor, buffers: Buffers) -> Iterator[tuple[Part, Block]]:
        """Yields all blocks with their attention, and where their vectors are."""
        for part in self._parts:
            x_GND = at(x_GVD, part)
            block = Block(buffers, self.attention.count, x_GND.shape[1])
            torch.sub(x_GND.mT, self._origin_G1D.mT, out=block.x_GDN)
            self.attention.logits(block)
            block.soften()
            yield part, block

    def pick(self, rows_GKF: Tensor) -> Tensor:
        """Returns the rows of the cell's centroids, [G, C, F]."""
        return rows_GKF if self._kept is None else rows_GKF.index_select(1, self._kept)

    def local(self, c_GKD: Tensor) -> Tensor:
        """Returns the cell's centroids minus the origin, float64 [G, C, D]."""
        return self.pick(c_GKD) - self._origin_G1D

    def back(self, x_GND: Tensor) -> Tensor:
        """Returns vectors plus the origin."""
        return x_GND + self._origin_G1D

    def zeros(self, sums_GKF: Tensor) -> Tensor:
        """Returns zeros for the rows of the cell's centroids, [G, C, F]."""
        return sums_GKF.new_zeros(sums_GKF.shape[0], self.attention.count, sums_GKF.shape[2])

    def add(self, sums_GKF: Tensor, part_GCF: Tensor) -> None:
        """Adds to the rows of the cell's centroids."""
        if self._kept is None:
            sums_GKF.add_(part_GCF)
        else:
            sums_GKF.index_add_(1, self._kept, part_GCF)

    def add_moments(self, sums_GKH: Tensor, moments_GCH: Tensor) -> None:
        """Adds Σ_v A x and Σ_v A to the rows of the cell's centroids, from those of vectors minus the origin."""
        moments_GCH[..., :-1].addcmul_(self._origin_G1D, moments_GCH[..., -1:])
        self.add(sums_GKH, moments_GCH)


class AbstractCells(abc.ABC):
    """All vectors of some groups."""

    @abc.abstractmethod
    def facing(self, c_GKD: Tensor) -> Iterator[Cell]:
        """Yields the cells for attention to some centroids, float64; the same ones for the same centroids."""

    @abc.abstractmethod
    def buffers(self) -> Buffers:
        """Returns buffers for their blocks."""


@final
@dataclass(frozen=True, slots=True)
class Whole(AbstractCells):
    """One cell for all vectors of some groups: they attend to all centroids of their group.

    Args:
        origin_G1D: the mean of the first centroids, in the dtype of the arithmetic.
        tau_G11: τ, float64.
        metric: of the distance.
        count: K.
        vectors: V.
    """

    origin_G1D: Tensor
    tau_G11: Tensor
    metric: Metric
    count: int
    vectors: int

    @classmethod
    def batches(
        cls, c_GKD: Tensor, tau_G: Tensor, vectors: int, metric: Metric, dtype: torch.dtype
    ) -> list[tuple[slice, "Whole"]]:
        """Returns the groups whose blocks fit in buffers together, and their cell."""
        groups, count, size = c_GKD.shape
        origin_G1D = c_GKD.mean(1, keepdim=True, dtype=torch.float64).to(dtype)
        step = max(1, _fitting(count, size, origin_G1D) // max(1, vectors))
        some = [slice(start, start + step) for start in range(0, groups, step)]
        return [(part, cls(origin_G1D[part], tau_G[part, None, None], metric, count, vectors)) for part in some]

    def facing(self, c_GKD: Tensor) -> Iterator[Cell]:
        starts = range(0, self.vectors, self._step)
        parts = [slice(start, min(start + self._step, self.vectors)) for start in starts]
        yield Cell(c_GKD, parts, self.origin_G1D, self.tau_G11, self.metric)

    def buffers(self) -> Buffers:
        length = min(self._step, self.vectors)
        groups, _, size = self.origin_G1D.shape
        return Buffers(groups, size, length, length * self.count, self.origin_G1D)

    @property
    def _step(self) -> int:
        return _fitting(self.count, self.origin_G1D.shape[2], self.origin_G1D)


def _fitting(count: int, size: int, like: Tensor) -> int:
    """Returns how many vectors fit in buffers together."""
    nbytes = CPU_NBYTES if like.device.type == "cpu" else _GPU_NBYTES
    return max(1, nbytes // (max(count, 2 * size + 1) * like.dtype.itemsize))


def at(values_GVD: Tensor, part: Part) -> Tensor:
    """Returns the values of some vectors, [G, N, D]."""
    return values_GVD[:, part] if isinstance(part, slice) else values_GVD.index_select(1, part)


def put(values_GVD: Tensor, part: Part, new_GND: Tensor) -> None:
    """Writes the values of some vectors."""
    if isinstance(part, slice):
        values_GVD[:, part] = new_GND
    else:
        values_GVD.index_copy_(1, part, new_GND.to(values_GVD.dtype))
