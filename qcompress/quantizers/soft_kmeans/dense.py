"""Differentiable k-means as it is written down: plain torch, every attention kept for autograd.

The reference for the other forms. It needs `iterations` tensors of [G, V, K], so it serves small tensors only.
"""

# Shape suffixes: G = groups, V = vectors of a group, K = centroids, D = numbers in a vector

from typing import Final, Literal

import torch
from torch import Tensor

Metric = Literal["squared", "euclidean"]

EMPTY: Final = 1e-20  # a centroid with less attention than this per vector keeps its place


def dense(x_GVD: Tensor, c_GKD: Tensor, tau_G: Tensor, iterations: int, metric: Metric) -> tuple[Tensor, Tensor]:
    """Moves centroids towards vectors, and vectors towards centroids, both softly.

    Every iteration attends from each vector to the centroids by softmax(-distance / τ) and moves each centroid to
    the mean of the vectors, weighted by their attention. The last attention mixes the last centroids into the soft
    vectors. A centroid with next to no attention stays where it is. Gradients reach the vectors and the first
    centroids, from both results.

    Args:
        x_GVD: the vectors, any floating dtype; not modified.
        c_GKD: the first centroids; not modified.
        tau_G: τ of each group, > 0, float64; gets no gradient.
        iterations: how often the centroids move, at least once.
        metric: whether the distance is the squared or the plain Euclidean one, whose gradient is 0 at distance 0.

    Returns:
        The soft vectors in the shape and dtype of the vectors, and the last centroids in those of the first. The
        arithmetic is float64.

    >>> x, c = torch.tensor([[[0.0], [1.0], [5.0]]]), torch.tensor([[[0.0], [4.0]]])
    >>> soft, centroids = dense(x, c, torch.tensor([0.1], dtype=torch.float64), 2, "squared")
    >>> soft.flatten().tolist(), centroids.flatten().tolist()
    ([0.5, 0.5, 5.0], [0.5, 5.0])
    """
    x, centroids, tau = x_GVD.double(), c_GKD.double(), tau_G[:, None, None]
    for _ in range(iterations):
        attention_GVK = torch.softmax(-_distance(x, centroids, metric) / tau, dim=-1)
        total_GK1 = attention_GVK.sum(1).unsqueeze(-1)
        is_empty = total_GK1 < EMPTY * x.shape[1]
        mean_GKD = attention_GVK.mT @ x / total_GK1.masked_fill(is_empty, 1.0)
        centroids = torch.where(is_empty, centroids, mean_GKD)
    return (attention_GVK @ centroids).to(x_GVD.dtype), centroids.to(c_GKD.dtype)


def _distance(x_GVD: Tensor, c_GKD: Tensor, metric: Metric) -> Tensor:
    """Returns the distance of every vector from every centroid, [G, V, K]."""
    squared = (x_GVD[:, :, None] - c_GKD[:, None]).square().sum(-1)
    if metric == "squared":
        return squared
    is_zero = squared == 0
    return squared.masked_fill(is_zero, 1.0).sqrt().masked_fill(is_zero, 0.0)
