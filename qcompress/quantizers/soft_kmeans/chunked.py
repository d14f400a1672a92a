"""Differentiable k-means without its attention tensors: exact, block by block, with closed-form gradients.

The attention A of a block is computed anew in each of 2 (T + 1) visits. With z = -distance / τ, the gradient g of the
soft vectors, and λ_T = Σ_v A g plus the gradient of the last centroids, iteration t adds, from T down to 1:

    μ = λ_t / Σ_v A,    R = μ·(x - c_t), in the last iteration also + c_T·g,    V = A (R - Σ_k A R),
    dL/dx += Σ_k A μ + Σ_k V dz/dx,    λ_(t-1) = Σ_v V dz/dc.

Vectors are in cells (`cells`): those of a group in one, or, where nearly all attention is next to zero, around their
nearest centroids (`near`), with attention to few. Sums over blocks and centroids are float64. Nothing waits for the
device, unless cells are near, and inputs are not modified.
"""

# Shape suffixes: G = groups, V = vectors of a group, K = centroids, D = numbers in a vector; in a block:
# N = vectors, H = D + 1, F = D + 1 or 2 D + 1

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qcompress.quantizers.soft_kmeans.cells import AbstractPartition, Whole
from qcompress.quantizers.soft_kmeans.dense import EMPTY, Metric
from qcompress.quantizers.soft_kmeans.near import Near


def chunked(
    x_GVD: Tensor,
    c_GKD: Tensor,
    tau_G: Tensor,
    iterations: int,
    metric: Metric,
    *,
    dtype: torch.dtype,
    near: bool = False,
) -> tuple[Tensor, Tensor]:
    """Computes what `dense` does, in a few MB.

    Args:
        x_GVD: the vectors, any floating dtype; not modified.
        c_GKD: the first centroids; not modified.
        tau_G: τ of each group, > 0, float64; gets no gradient.
        iterations: how often the centroids move, at least once.
        metric: "squared" or "euclidean".
        dtype: that of the arithmetic, float32 or float64; see `needed_dtype`.
        near: whether to leave out attention that is next to zero; it looks at values, for which a GPU must be waited
            for, and needs metric="squared".

    Returns:
        The soft vectors in the shape and dtype of the vectors, and the last centroids in those of the first.

    >>> x, c = torch.tensor([[[0.0], [1.0], [5.0]]]), torch.tensor([[[0.0], [4.0]]])
    >>> tau = torch.tensor([0.1], dtype=torch.float64)
    >>> soft, centroids = chunked(x, c, tau, 2, "squared", dtype=torch.float32)
    >>> soft.flatten().tolist(), centroids.flatten().tolist()
    ([0.5, 0.5, 5.0], [0.5, 5.0])
    """
    x, c = x_GVD, c_GKD
    if near:  # whose cells are of all groups
        x, c = x_GVD.reshape(1, -1, x_GVD.shape[2]), c_GKD.reshape(1, -1, c_GKD.shape[2])
    with torch.autocast(x_GVD.device.type, enabled=False):
        soft, centroids = _Chunked.apply(x, c, tau_G, iterations, metric, dtype, near)  # type: ignore[no-untyped-call]
    return soft.view(x_GVD.shape), centroids.view(c_GKD.shape)


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
        ctx: Any,
        x_GVD: Tensor,
        c_GKD: Tensor,
        tau_G: Tensor,
        iterations: int,
        metric: Metric,
        dtype: torch.dtype,
        near: bool,
    ) -> tuple[Tensor, Tensor]:
        path_TGKD = c_GKD.double().repeat(iterations + 1, 1, 1, 1)
        inverse_TGK1 = path_TGKD.new_empty(iterations, *c_GKD.shape[:2], 1)
        least, soft = EMPTY * (x_GVD.shape[:2].numel() // len(tau_G)), []
        if near:
            ctx.batches = [(slice(None), Near.of(x_GVD, c_GKD, tau_G, dtype))]
        else:
            ctx.batches = Whole.batches(c_GKD, tau_G, x_GVD.shape[1], metric, dtype)
        for some, partition in ctx.batches:
            soft_GVD = _forward(x_GVD[some], partition, path_TGKD[:, some], inverse_TGK1[:, some], least)
            soft.append(partition.restored(soft_GVD))
        ctx.save_for_backward(x_GVD, path_TGKD, inverse_TGK1)
        ctx.c_dtype = c_GKD.dtype
        return _whole(soft), path_TGKD[-1].to(c_GKD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_GVD: Tensor, gc_GKD: Tensor) -> tuple[Tensor | None, ...]:
        x_GVD, path_TGKD, inverse_TGK1 = ctx.saved_tensors
        pull_GKD, gradients = gc_GKD.to(torch.float64, copy=True), []
        with torch.autocast(x_GVD.device.type, enabled=False):
            for some, partition in ctx.batches:
                constants = g_GVD[some], x_GVD[some], partition, path_TGKD[:, some], inverse_TGK1[:, some]
                gx_GVD = _backward(*constants, pull_GKD[some], ctx.needs_input_grad[1])
                gradients.append(partition.restored(gx_GVD).to(x_GVD.dtype))
        return _whole(gradients), pull_GKD.to(ctx.c_dtype), None, None, None, None, None


def _forward(
    x_GVD: Tensor, partition: AbstractPartition, path_TGKD: Tensor, inverse_TGK1: Tensor, least: float
) -> Tensor:
    """Computes the centroids after each iteration, and 1 / Σ_v A, or 0 where that is below `least`.

    Returns:
        The soft vectors, as the partition arranges them.
    """
    x_GVD, buffers = partition.arranged(x_GVD), partition.buffers()
    for t in range(len(inverse_TGK1)):
        sums_GKH = torch.cat([path_TGKD[t], inverse_TGK1[t]], -1).zero_()
        for cells in partition.facing(path_TGKD[t]):
            moments_GCH = cells.zeros(sums_GKH.shape[-1])
            for _, block in cells.blocks(x_GVD, buffers):
                moments_GCH.add_(torch.bmm(block.e_GKN, (block.x_GHN / block.sum()).mT))
            cells.add_moments(sums_GKH, moments_GCH)
        total_GK1 = sums_GKH[..., -1:]
        is_empty = total_GK1 < least
        inverse_TGK1[t] = total_GK1.reciprocal().masked_fill_(is_empty, 0.0)
        path_TGKD[t + 1] = torch.where(is_empty, path_TGKD[t], sums_GKH[..., :-1] * inverse_TGK1[t])
    soft_GVD = torch.empty_like(x_GVD)
    for cells in partition.facing(path_TGKD[-2]):
        last_GCD = cells.local(path_TGKD[-1])
        last_GHC = torch.cat([last_GCD, torch.ones_like(last_GCD[..., :1])], -1).to(buffers.dtype).mT
        for part, block in cells.blocks(x_GVD, buffers):
            mixed_GHN = torch.bmm(last_GHC, block.e_GKN)
            cells.at(soft_GVD, part).copy_(cells.back(mixed_GHN[:, :-1].div_(mixed_GHN[:, -1:]).mT))
    return soft_GVD


def _backward(
    g_GVD: Tensor,
    x_GVD: Tensor,
    partition: AbstractPartition,
    path_TGKD: Tensor,
    inverse_TGK1: Tensor,
    pull_GKD: Tensor,
    wants_centroids: bool,
) -> Tensor:
    """Turns the gradient of the last centroids into that of the first, in `pull_GKD`.

    Returns:
        The gradient of the vectors, as the partition arranges them; a float32 or float64 one.
    """
    last, dtype = len(inverse_TGK1) - 1, torch.promote_types(x_GVD.dtype, torch.float32)
    # The gradient of the soft vectors, until the last iteration puts that of the vectors in its place.
    gx_GVD = partition.arranged(g_GVD.to(dtype, copy=True))
    x_GVD, buffers = partition.arranged(x_GVD), partition.buffers()
    for cells in partition.facing(path_TGKD[-2]):
        pull_GCD = cells.zeros(pull_GKD.shape[-1])
        for part, block in cells.blocks(x_GVD, buffers):
            weighted_GDN = torch.div(cells.at(gx_GVD, part).mT, block.sum(), out=block.g_GDN)
            pull_GCD.add_(torch.bmm(block.e_GKN, weighted_GDN.mT))
        cells.add(pull_GKD, pull_GCD)
    for t in range(last, -1, -1):
        all_means_GKD = pull_GKD * inverse_TGK1[t]
        pull_GKD.masked_fill_(inverse_TGK1[t] != 0, 0.0)
        for cells in partition.facing(path_TGKD[t]):
            mean_GCD, pull_GCD = cells.pick(all_means_GKD), cells.zeros(pull_GKD.shape[-1])
            offset_GC1 = -(mean_GCD * cells.local(path_TGKD[t + 1])).sum(-1, keepdim=True)
            factors = [cells.local(path_TGKD[-1])] if t == last else []
            factors_GCF = torch.cat([*factors, mean_GCD, offset_GC1], -1).to(buffers.dtype)
            mean_GCD = mean_GCD.to(buffers.dtype)
            for part, block in cells.blocks(x_GVD, buffers):
                gx_GND = cells.at(gx_GVD, part)
                if t == last:
                    block.g_GDN.copy_(gx_GND.mT)
                    gx_GND.zero_()
                torch.bmm(factors_GCF, block.rows_GMN if t == last else block.x_GHN, out=block.r_GKN)
                gx_GDN, gc_GCD = cells.attention.gradients(block, mean_GCD, t > 0 or wants_centroids)
                gx_GND.mT.add_(gx_GDN)
                if gc_GCD is not None:
                    pull_GCD.add_(gc_GCD)
            cells.add(pull_GKD, pull_GCD)
    return gx_GVD


def _whole(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
