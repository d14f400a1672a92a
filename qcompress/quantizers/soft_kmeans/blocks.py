"""The attention of differentiable k-means for a block of vectors, and its gradient: one class per metric.

A block's attention is [K, N], so that every operation runs along the vectors, and it is not divided by its sum over
the centroids: the division costs less where there is one number per vector. Blocks have coordinates around an origin
of their own: in float32, logits keep more digits the nearer it is. All blocks use the same buffers.
"""

# Shape suffixes: G = groups, K = centroids, D = numbers in a vector, H = D + 1, M = 2 D + 1, N = vectors of a block

import abc
import math
from collections.abc import Mapping
from typing import Final, final

import torch
from torch import Tensor

from qcompress.quantizers.soft_kmeans.dense import Metric

_LOWEST_LOGIT: Final = -80.0  # exp stays a normal float32: MKL takes ten times as long where it underflows
_ABSENT: Final = -1e38  # logit of a centroid that is not there


@final
class Buffers:
    """Memory for blocks, one at a time.

    Args:
        numbers: the largest G x N x max(K, M).
        like: a tensor of the buffers' dtype, on their device.
    """

    def __init__(self, numbers: int, like: Tensor) -> None:
        self.dtype = like.dtype
        self._rows, self._e, self._r, self._one = (like.new_empty(numbers) for _ in range(4))

    def block(self, groups: int, count: int, size: int, length: int) -> "Block":
        """Returns a block for N = `length` vectors of each group."""
        rows_GMN = _view(self._rows, groups, 2 * size + 1, length)
        rows_GMN[:, -1:].fill_(1.0)
        e_GKN, r_GKN = (_view(flat, groups, count, length) for flat in (self._e, self._r))
        return Block(rows_GMN, e_GKN, r_GKN, _view(self._one, groups, 1, length))


def _view(flat: Tensor, *shape: int) -> Tensor:
    return flat[: math.prod(shape)].view(shape)


@final
class Block:
    """Some vectors of every group, and what is computed of them; valid until the next block.

    Args:
        rows_GMN: room for the gradient of the soft vectors, the vectors minus the origin, and a row of ones.
        e_GKN: room for attention times its sum over K.
        r_GKN: room for the gradient of the attention.
        one_G1N: room for one number per vector.

    Attributes:
        g_GDN, x_GDN, x_GHN: the first rows of `rows_GMN`, the next, and the next with the ones.
    """

    def __init__(self, rows_GMN: Tensor, e_GKN: Tensor, r_GKN: Tensor, one_G1N: Tensor) -> None:
        size = rows_GMN.shape[1] // 2
        self.rows_GMN, self.e_GKN, self.r_GKN, self._one_G1N = rows_GMN, e_GKN, r_GKN, one_G1N
        self.g_GDN, self.x_GHN, self.x_GDN = rows_GMN[:, :size], rows_GMN[:, size:], rows_GMN[:, size:-1]

    def soften(self) -> None:
        """Turns logits in `e_GKN` into attention times its sum over K."""
        torch.amax(self.e_GKN, 1, keepdim=True, out=self._one_G1N)
        self.e_GKN.sub_(self._one_G1N).clamp_min_(_LOWEST_LOGIT).exp_()

    def sum(self) -> Tensor:
        """Returns the sum of `e_GKN` over K, [G, 1, N], in a buffer."""
        return torch.sum(self.e_GKN, 1, keepdim=True, out=self._one_G1N)


class AbstractAttention(abc.ABC):
    """Computes attention to given centroids.

    Args:
        c_GKD: the centroids minus the origin, float64.
        tau_G11: τ, float64.
        dtype: that of the arithmetic.
        is_absent_GK1: which centroids get no attention; None: none of them.

    Attributes:
        count: K.
    """

    count: int

    @abc.abstractmethod
    def __init__(
        self, c_GKD: Tensor, tau_G11: Tensor, dtype: torch.dtype, is_absent_GK1: Tensor | None = None
    ) -> None: ...

    @abc.abstractmethod
    def logits(self, block: Block) -> None:
        """Writes -distance / τ of a block's vectors to `e_GKN`, up to one number per vector."""

    @abc.abstractmethod
    def gradients(self, block: Block, mean_GKD: Tensor, wants_centroids: bool) -> tuple[Tensor, Tensor | None]:
        """Returns gradients of the vectors, [G, D, N], and, if wanted, of the centroids, [G, K, D].

        Args:
            block: attention, and its gradient in `r_GKN`; both are overwritten.
            mean_GKD: μ, the gradient of Σ_v A x.
            wants_centroids: whether to compute the gradient of the centroids.
        """


@final
class _Squared(AbstractAttention):
    """-||x - c||² / τ is 2 x·c / τ - ||c||² / τ and a number per vector: one product of matrices."""

    def __init__(self, c_GKD: Tensor, tau_G11: Tensor, dtype: torch.dtype, is_absent_GK1: Tensor | None = None) -> None:
        self.count = c_GKD.shape[1]
        norm_GK1 = c_GKD.square().sum(-1, keepdim=True)
        self._factors_GKH = torch.cat([2 * c_GKD, -norm_GK1], -1).div_(tau_G11).to(dtype)
        if is_absent_GK1 is not None:
            self._factors_GKH.masked_fill_(is_absent_GK1, 0.0)[..., -1:].masked_fill_(is_absent_GK1, _ABSENT)
        self._c_GKD, self._slope_G11 = c_GKD.to(dtype), (2 / tau_G11).to(dtype)

    def logits(self, block: Block) -> None:
        torch.bmm(self._factors_GKH, block.x_GHN, out=block.e_GKN)

    def gradients(self, block: Block, mean_GKD: Tensor, wants_centroids: bool) -> tuple[Tensor, Tensor | None]:
        inverse_G1N = block.sum().reciprocal_()
        gx_GDN = torch.bmm(mean_GKD.mT, block.e_GKN)
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

    def __init__(self, c_GKD: Tensor, tau_G11: Tensor, dtype: torch.dtype, is_absent_GK1: Tensor | None = None) -> None:
        self.count = c_GKD.shape[1]
        self._columns = torch.split(c_GKD.to(dtype), 1, -1)
        self._slope_G11 = (-1 / tau_G11).to(dtype)

    def _distances(self, block: Block, out: Tensor) -> Tensor:
        difference_GKN = torch.empty_like(out)
        out.zero_()
        for d, c_GK1 in enumerate(self._columns):
            torch.sub(block.x_GDN[:, d : d + 1], c_GK1, out=difference_GKN)
            out.addcmul_(difference_GKN, difference_GKN)
        return out.sqrt_()

    def logits(self, block: Block) -> None:
        self._distances(block, block.e_GKN).mul_(self._slope_G11)

    def gradients(self, block: Block, mean_GKD: Tensor, wants_centroids: bool) -> tuple[Tensor, Tensor | None]:
        attention_GKN = block.e_GKN.div_(block.sum())
        gx_GDN = torch.bmm(mean_GKD.mT, attention_GKN)
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
