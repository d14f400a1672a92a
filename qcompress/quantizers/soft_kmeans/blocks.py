"""The attention of differentiable k-means, block by block of vectors, and its gradient: one class per metric.

A block's attention is [K, N], so that every operation runs along the vectors, and it is not divided by its sum over
the centroids: the division costs less where there is one number per vector. All blocks use the same buffers.
"""

# Shape suffixes: G = groups, V = vectors of a group, K = centroids, D = numbers in a vector, H = D + 1,
# M = 2 D + 1, N = vectors of a block

import abc
from collections.abc import Iterator, Mapping
from typing import Final, final

import torch
from torch import Tensor

from qcompress.quantizers.soft_kmeans.dense import Metric

_LOWEST_LOGIT: Final = -80.0  # exp stays a normal float32: MKL takes ten times as long where it underflows


@final
class Block:
    """Buffers for some vectors of every group; what is in them is valid until the next block.

    Args:
        groups: G.
        count: K.
        size: D.
        length: N.
        like: a tensor of the buffers' dtype, on their device.

    Attributes:
        rows_GMN: room for the gradient of the soft vectors, the vectors minus the shift, and a row of ones.
        g_GDN, x_GDN, x_GHN: its first rows, the next, and the next with the ones.
        e_GKN: attention times its sum over K.
        r_GKN: room for the gradient of the attention.
    """

    def __init__(self, groups: int, count: int, size: int, length: int, like: Tensor) -> None:
        self.rows_GMN = like.new_ones(groups, 2 * size + 1, length)
        self.g_GDN, self.x_GHN = self.rows_GMN[:, :size], self.rows_GMN[:, size:]
        self.x_GDN = self.x_GHN[:, :-1]
        self.e_GKN, self.r_GKN = (like.new_empty(groups, count, length) for _ in range(2))
        self._one_G1N = like.new_empty(groups, 1, length)

    def soften(self) -> None:
        """Turns logits in `e_GKN` into attention times its sum over K."""
        torch.amax(self.e_GKN, 1, keepdim=True, out=self._one_G1N)
        self.e_GKN.sub_(self._one_G1N).clamp_min_(_LOWEST_LOGIT).exp_()

    def sum(self) -> Tensor:
        """Returns the sum of `e_GKN` over K, [G, 1, N], in a buffer."""
        return torch.sum(self.e_GKN, 1, keepdim=True, out=self._one_G1N)


class AbstractAttention(abc.ABC):
    """Computes attention to given centroids, block by block.

    Args:
        x_GVD: the vectors.
        shift_G1D: subtracted from vectors and centroids; its dtype is that of the arithmetic.
        tau_G: τ of each group.
        count: K, the number of centroids.
        step: N, the number of vectors in a block.
    """

    def __init__(self, x_GVD: Tensor, shift_G1D: Tensor, tau_G: Tensor, count: int, step: int) -> None:
        self.dtype, self._step = shift_G1D.dtype, step
        self.shift_GD1, self._tau_G11 = shift_G1D.mT, tau_G[:, None, None]
        self._parts = self.split(x_GVD)
        groups, _, size = x_GVD.shape
        lengths = {part_GND.shape[1] for part_GND in self._parts}
        self._blocks = {length: Block(groups, count, size, length, shift_G1D) for length in lengths}

    def split(self, values_GVD: Tensor) -> tuple[Tensor, ...]:
        """Splits a tensor in the shape of the vectors into that of each block, [G, N, D]."""
        return torch.split(values_GVD, self._step, 1)

    def to(self, c_GKD: Tensor) -> Iterator[Block]:
        """Yields all blocks, with their attention to the centroids, which are shifted and float64."""
        self._prepare(c_GKD)
        for part_GND in self._parts:
            block = self._blocks[part_GND.shape[1]]
            torch.sub(part_GND.mT, self.shift_GD1, out=block.x_GDN)
            self._logits(block)
            block.soften()
            yield block

    @abc.abstractmethod
    def _prepare(self, c_GKD: Tensor) -> None:
        """Remembers centroids."""

    @abc.abstractmethod
    def _logits(self, block: Block) -> None:
        """Writes -distance / τ to `e_GKN`, up to one number per vector."""

    @abc.abstractmethod
    def prepare_gradients(self, c_GKD: Tensor, mean_GKD: Tensor) -> None:
        """Remembers centroids and μ, the gradient of Σ_v A x."""

    @abc.abstractmethod
    def gradients(self, block: Block, wants_centroids: bool) -> tuple[Tensor, Tensor | None]:
        """Returns gradients of the vectors, [G, D, N], and, if wanted, of the centroids, [G, K, D].

        Args:
            block: attention, and its gradient in `r_GKN`; both are overwritten.
            wants_centroids: whether to compute the gradient of the centroids.
        """


@final
class _Squared(AbstractAttention):
    """-||x - c||² / τ is 2 x·c / τ - ||c||² / τ and a number per vector: one product of matrices."""

    def _prepare(self, c_GKD: Tensor) -> None:
        norm_GK1 = c_GKD.square().sum(-1, keepdim=True)
        self._factors_GKH = torch.cat([2 * c_GKD, -norm_GK1], -1).div_(self._tau_G11).to(self.dtype)

    def _logits(self, block: Block) -> None:
        torch.bmm(self._factors_GKH, block.x_GHN, out=block.e_GKN)

    def prepare_gradients(self, c_GKD: Tensor, mean_GKD: Tensor) -> None:
        self._mean_GDK, self._c_GKD = mean_GKD.to(self.dtype).mT, c_GKD.to(self.dtype)
        self._slope_G11 = (2 / self._tau_G11).to(self.dtype)

    def gradients(self, block: Block, wants_centroids: bool) -> tuple[Tensor, Tensor | None]:
        inverse_G1N = block.sum().reciprocal_()
        gx_GDN = torch.bmm(self._mean_GDK, block.e_GKN)
        v_GKN = block.r_GKN.mul_(block.e_GKN)
        v_GKN.addcmul_(block.e_GKN, v_GKN.sum(1, keepdim=True).mul_(inverse_G1N), value=-1)
        gx_GDN.add_(torch.bmm(self._c_GKD.mT, v_GKN).mul_(self._slope_G11)).mul_(inverse_G1N)
        if not wants_centroids:
            return gx_GDN, None
        sums_GKH = torch.bmm(v_GKN, (block.x_GHN * inverse_G1N).mT)
        gc_GKD = torch.addcmul(sums_GKH[..., :-1], self._c_GKD, sums_GKH[..., -1:], value=-1)
        return gx_GDN, gc_GKD.mul_(self._slope_G11)


@final
class _Euclidean(AbstractAttention):
    """-||x - c|| / τ from the differences themselves: near distance 0 an expanded square has no correct digit."""

    def _prepare(self, c_GKD: Tensor) -> None:
        self._columns = torch.split(c_GKD.to(self.dtype), 1, -1)
        self._slope_G11 = (-1 / self._tau_G11).to(self.dtype)

    def _distances(self, block: Block, out: Tensor) -> Tensor:
        difference_GKN = torch.empty_like(out)
        out.zero_()
        for d, c_GK1 in enumerate(self._columns):
            torch.sub(block.x_GDN[:, d : d + 1], c_GK1, out=difference_GKN)
            out.addcmul_(difference_GKN, difference_GKN)
        return out.sqrt_()

    def _logits(self, block: Block) -> None:
        self._distances(block, block.e_GKN).mul_(self._slope_G11)

    def prepare_gradients(self, c_GKD: Tensor, mean_GKD: Tensor) -> None:
        self._mean_GDK = mean_GKD.to(self.dtype).mT

    def gradients(self, block: Block, wants_centroids: bool) -> tuple[Tensor, Tensor | None]:
        attention_GKN = block.e_GKN.div_(block.sum())
        gx_GDN = torch.bmm(self._mean_GDK, attention_GKN)
        v_GKN = block.r_GKN.mul_(attention_GKN)
        v_GKN.addcmul_(attention_GKN, v_GKN.sum(1, keepdim=True), value=-1)
        inverse_GKN = self._distances(block, block.e_GKN).reciprocal_().nan_to_num_(posinf=0.0)
        v_GKN.mul_(inverse_GKN).mul_(self._slope_G11)
        columns = []
        for d, c_GK1 in enumerate(self._columns):
            product_GKN = torch.sub(block.x_GDN[:, d : d + 1], c_GK1, out=block.e_GKN).mul_(v_GKN)
            gx_GDN[:, d].add_(product_GKN.sum(1))
            columns.append(product_GKN.sum(2).neg_())
        return gx_GDN, torch.stack(columns, -1) if wants_centroids else None


ATTENTION: Final[Mapping[Metric, type[AbstractAttention]]] = {"squared": _Squared, "euclidean": _Euclidean}
