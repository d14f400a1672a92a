"""Differentiable k-means without its attention tensors: exact, block by block, with closed-form gradients.

The attention A of a block is computed anew in each of 2 (T + 1) visits. With z = -distance / τ, the gradient g of the
soft vectors, and λ_T = Σ_v A g plus the gradient of the last centroids, iteration t adds, from T down to 1:

    μ = λ_t / Σ_v A,    R = μ·(x - c_t), in the last iteration also + c_T·g,    V = A (R - Σ_k A R),
    dL/dx += Σ_k A μ + Σ_k V dz/dx,    λ_(t-1) = Σ_v V dz/dc.

Sums over blocks and centroids are float64. Nothing waits for the device, and inputs are not modified.
"""

# Shape suffixes: G = groups, V = vectors of a group, K = centroids, D = numbers in a vector; in a block:
# N = vectors, H = D + 1, F = D + 1 or 2 D + 1

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qcompress.quantizers.soft_kmeans.blocks import ATTENTION, AbstractAttention
from qcompress.quantizers.soft_kmeans.dense import EMPTY, Metric

_CPU_NBYTES: Final = 1 << 20  # of a buffer; a smaller one stays in L2, but takes more calls
_GPU_NBYTES: Final = 1 << 24  # two of them stay in L2


def chunked(
    x_GVD: Tensor, c_GKD: Tensor, tau_G: Tensor, iterations: int, metric: Metric, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Computes what `dense` does, in a few MB.

    Args:
        x_GVD: the vectors, any floating dtype; not modified.
        c_GKD: the first centroids; not modified.
        tau_G: τ of each group, > 0, float64; gets no gradient.
        iterations: how often the centroids move, at least once.
        metric: "squared" or "euclidean".
        dtype: that of the arithmetic, float32 or float64; see `needed_dtype`.

    Returns:
        The soft vectors in the shape and dtype of the vectors, and the last centroids in those of the first.

    >>> x, c = torch.tensor([[[0.0], [1.0], [5.0]]]), torch.tensor([[[0.0], [4.0]]])
    >>> tau = torch.tensor([0.1], dtype=torch.float64)
    >>> soft, centroids = chunked(x, c, tau, 2, "squared", dtype=torch.float32)
    >>> soft.flatten().tolist(), centroids.flatten().tolist()
    ([0.5, 0.5, 5.0], [0.5, 5.0])
    """
    with torch.autocast(x_GVD.device.type, enabled=False):
        out: tuple[Tensor, Tensor] = _Chunked.apply(x_GVD, c_GKD, tau_G, iterations, metric, dtype)  # type: ignore[no-untyped-call]
    return out


def needed_dtype(variance: float, tau: float, metric: Metric) -> torch.dtype:
    """Returns the dtype of arithmetic that keeps the relative error of gradients of float32 vectors below 5e-4.

    Rounding a logit moves the border between two centroids. In float32 the error is about 3e-7 · variance / τ, and up
    to 1e-5 · variance / τ for a few tensors. The plain distance has a kink at 0, on whose sides gradients differ: a
    vector that rounding takes across it has an error at any τ.

    Args:
        variance: that of the numbers in the vectors, around the mean of their group.
        tau: the smallest τ, > 0.
        metric: "squared" or "euclidean".

    >>> needed_dtype(variance=1.0, tau=0.1, metric="squared"), needed_dtype(variance=1.0, tau=1e-3, metric="squared")
    (torch.float32, torch.float64)
    """
    return torch.float32 if metric == "squared" and variance <= 20 * tau else torch.float64


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_GVD: Tensor, c_GKD: Tensor, tau_G: Tensor, iterations: int, metric: Metric, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        shift_G1D = c_GKD.mean(1, keepdim=True, dtype=torch.float64).to(dtype)
        path_TGKD = (c_GKD.double() - shift_G1D).repeat(iterations + 1, 1, 1, 1)
        inverse_TGK1 = path_TGKD.new_empty(iterations, *c_GKD.shape[:2], 1)
        soft_GVD = torch.empty_like(x_GVD)
        for some, attention in _attentions(metric, x_GVD, shift_G1D, tau_G, c_GKD.shape[1]):
            _forward(attention, path_TGKD[:, some], inverse_TGK1[:, some], soft_GVD[some])
        ctx.save_for_backward(x_GVD, tau_G, shift_G1D, path_TGKD, inverse_TGK1)
        ctx.metric, ctx.c_dtype = metric, c_GKD.dtype
        return soft_GVD, (path_TGKD[-1] + shift_G1D).to(c_GKD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_GVD: Tensor, gc_GKD: Tensor) -> tuple[Tensor | None, ...]:
        x_GVD, tau_G, shift_G1D, path_TGKD, inverse_TGK1 = ctx.saved_tensors
        gx_GVD = torch.zeros_like(x_GVD, dtype=torch.promote_types(x_GVD.dtype, torch.float32))
        pull_GKD = gc_GKD.to(torch.float64, copy=True)
        with torch.autocast(x_GVD.device.type, enabled=False):
            for some, attention in _attentions(ctx.metric, x_GVD, shift_G1D, tau_G, path_TGKD.shape[2]):
                constants = path_TGKD[:, some], inverse_TGK1[:, some], g_GVD[some]
                _backward(attention, *constants, gx_GVD[some], pull_GKD[some], ctx.needs_input_grad[1])
        return gx_GVD.to(x_GVD.dtype), pull_GKD.to(ctx.c_dtype), None, None, None, None


def _attentions(
    metric: Metric, x_GVD: Tensor, shift_G1D: Tensor, tau_G: Tensor, count: int
) -> Iterator[tuple[slice, AbstractAttention]]:
    """Yields groups whose blocks fit in the buffers, and their attention."""
    groups, vectors, size = x_GVD.shape
    vector_nbytes = max(count, 2 * size + 1) * shift_G1D.dtype.itemsize
    fitting = max(1, (_CPU_NBYTES if x_GVD.device.type == "cpu" else _GPU_NBYTES) // vector_nbytes)
    step = max(1, fitting // max(1, vectors))
    for start in range(0, groups, step):
        some = slice(start, start + step)
        yield some, ATTENTION[metric](x_GVD[some], shift_G1D[some], tau_G[some], count, fitting)


def _forward(attention: AbstractAttention, path_TGKD: Tensor, inverse_TGK1: Tensor, soft_GVD: Tensor) -> None:
    """Computes the centroids after each iteration, 1 / Σ_v A or 0 where there is next to none, and soft vectors."""
    vectors = soft_GVD.shape[1]
    for t in range(len(inverse_TGK1)):
        sums_GKH = torch.cat([path_TGKD[t], inverse_TGK1[t]], -1).zero_()
        for block in attention.to(path_TGKD[t]):
            sums_GKH.add_(torch.bmm(block.e_GKN, (block.x_GHN / block.sum()).mT))
        total_GK1 = sums_GKH[..., -1:]
        is_empty = total_GK1 < EMPTY * vectors
        inverse_TGK1[t] = total_GK1.reciprocal().masked_fill_(is_empty, 0.0)
        path_TGKD[t + 1] = torch.where(is_empty, path_TGKD[t], sums_GKH[..., :-1] * inverse_TGK1[t])
    last_GHK = torch.cat([path_TGKD[-1], torch.ones_like(inverse_TGK1[-1])], -1).to(attention.dtype).mT
    for block, soft_GND in zip(attention.to(path_TGKD[-2]), attention.split(soft_GVD), strict=True):
        mixed_GHN = torch.bmm(last_GHK, block.e_GKN)
        torch.add(mixed_GHN[:, :-1].div_(mixed_GHN[:, -1:]), attention.shift_GD1, out=soft_GND.mT)


def _backward(
    attention: AbstractAttention,
    path_TGKD: Tensor,
    inverse_TGK1: Tensor,
    g_GVD: Tensor,
    gx_GVD: Tensor,
    pull_GKD: Tensor,
    wants_centroids: bool,
) -> None:
    """Adds to the gradient of the vectors, and turns that of the last centroids into that of the first."""
    last = len(inverse_TGK1) - 1
    for block, g_GND in zip(attention.to(path_TGKD[-2]), attention.split(g_GVD), strict=True):
        weighted_GDN = torch.div(g_GND.mT, block.sum(), out=block.g_GDN)
        pull_GKD.add_(torch.bmm(block.e_GKN, weighted_GDN.mT))
    for t in range(last, -1, -1):
        mean_GKD = pull_GKD * inverse_TGK1[t]
        offset_GK1 = -(mean_GKD * path_TGKD[t + 1]).sum(-1, keepdim=True)
        factors = [path_TGKD[-1], mean_GKD, offset_GK1] if t == last else [mean_GKD, offset_GK1]
        factors_GKF = torch.cat(factors, -1).to(attention.dtype)
        attention.prepare_gradients(path_TGKD[t], mean_GKD)
        pull_GKD.masked_fill_(inverse_TGK1[t] != 0, 0.0)
        parts = attention.split(g_GVD), attention.split(gx_GVD)
        for block, g_GND, gx_GND in zip(attention.to(path_TGKD[t]), *parts, strict=True):
            if t == last:
                block.g_GDN.copy_(g_GND.mT)
            torch.bmm(factors_GKF, block.rows_GMN if t == last else block.x_GHN, out=block.r_GKN)
            gx_GDN, gc_GKD = attention.gradients(block, t > 0 or wants_centroids)
            gx_GND.mT.add_(gx_GDN)
            if gc_GKD is not None:
                pull_GKD.add_(gc_GKD)
