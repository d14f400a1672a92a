"""The palette that DKM ends with: each vector's nearest centroid, and centroids at the means of their vectors.

Shape suffixes: V = vectors of all groups, G = groups, K = centroids, D = numbers in a vector.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from qcompress.graph.conversion import to_numpy
from qcompress.palettes.vector import stored_entries
from qcompress.plan.fields import LutDtype

_AT_ONCE: Final = 1 << 20  # distances that are computed together


@torch.no_grad()
def assigned(x_VD: Tensor, c_GKD: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns the nearest centroid of each vector, int64 [V], and the centroids at the means of their vectors.

    Centroids without vectors are left out of a single group; of several groups, they keep their place.

    Args:
        x_VD: the vectors of all groups, one group after the other.
        c_GKD: the centroids; its dtype is that of the means.
        lengths: number of vectors of each group.

    >>> codes, lut = assigned(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[[0.0], [4.0], [9.0]]]), [3])
    >>> codes.tolist(), lut.flatten().tolist()
    ([0, 0, 1], [0.5, 5.0])
    """
    codes, means = [], []
    for x, c in zip(torch.split(x_VD, list(lengths)), c_GKD, strict=True):
        code = torch.cat([nearest(part, c.double()) for part in torch.split(x, max(1, _AT_ONCE // len(c)))])
        sums = torch.zeros(c.shape, dtype=torch.float64, device=c.device).index_add_(0, code, x.double())
        count = code.bincount(minlength=len(c))[:, None]
        codes.append(code)
        means.append(torch.where(count > 0, (sums / count).to(c.dtype), c))
        if len(lengths) == 1:
            (used,) = torch.where(count[:, 0] > 0)
            return torch.searchsorted(used, code), means[0][used][None]
    return torch.cat(codes), torch.stack(means)


def nearest(x_VD: Tensor, c_KD: Tensor) -> Tensor:
    """Returns the nearest centroid of each vector, int64 [V]; the arithmetic is in the dtype of the centroids."""
    x = x_VD.to(c_KD.dtype)
    if c_KD.shape[1] == 1:
        sorted_K, order_K = c_KD[:, 0].sort()
        return order_K[torch.bucketize(x[:, 0], (sorted_K[1:] + sorted_K[:-1]) / 2)]
    shift_D = c_KD.mean(0)
    c = c_KD - shift_D
    return torch.addmm(c.square().sum(1), x - shift_D, c.T, beta=1, alpha=-2).min(1).indices


@torch.no_grad()
def stored(lut_GKD: Tensor, lut_dtype: LutDtype) -> tuple[Tensor, Tensor | None]:
    """Returns `palettes.vector.stored_entries` of a tensor, on its device."""
    entries, scale = stored_entries(to_numpy(lut_GKD.float()), lut_dtype)
    found = torch.from_numpy(entries).to(lut_GKD.device)
    return found, None if scale is None else torch.from_numpy(scale).to(lut_GKD.device)
