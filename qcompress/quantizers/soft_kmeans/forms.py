"""The forms of differentiable k-means, and which of them a tensor gets.

A form is chosen outside of training steps: the choice looks at values, for which a GPU must be waited for.

Shape suffixes: V = vectors of all groups, G = groups, K = centroids, D = numbers in a vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

import torch
from torch import Tensor

from qcompress.quantizers.soft_kmeans.bins import cells, table
from qcompress.quantizers.soft_kmeans.chunked import chunked, needed_dtype
from qcompress.quantizers.soft_kmeans.dense import Metric, dense
from qcompress.quantizers.soft_kmeans.groups import runs
from qcompress.quantizers.soft_kmeans.near import is_worthwhile, near_dtype
from qcompress.quantizers.soft_kmeans.table import Table, TableSpec
from qcompress.quantizers.soft_kmeans.tabulated import iterate, tabulated

_SMALL: Final = 1 << 12  # V x K up to which the dense form is fast enough
_CHEAP: Final = 1 << 14  # edges x K up to which a table costs next to nothing


@final
@dataclass(frozen=True, slots=True)
class Exact:
    """Attention from every vector to every centroid that gets any.

    Args:
        kind: "dense" keeps it for autograd, "chunked" computes it again, "near" leaves out what is next to zero.
        dtype: the arithmetic of "chunked" and "near".
    """

    kind: Literal["dense", "chunked", "near"]
    dtype: torch.dtype = torch.float64


Form = Exact | Table


def soft(
    x_VD: Tensor, c_GKD: Tensor, tau_G: Tensor, lengths: Sequence[int], iterations: int, metric: Metric, form: Form
) -> tuple[Tensor, Tensor]:
    """Returns soft vectors [V, D] and the last centroids [G, K, D].

    Args:
        x_VD: the vectors of all groups, one group after the other.
        c_GKD: the first centroids.
        tau_G: τ, float64.
        lengths: number of vectors of each group.
        iterations: how often the centroids move, at least once.
        metric: of the distance.
        form: how it is computed; all forms give the same result.
    """
    if isinstance(form, Table):
        out_N, c_GK = tabulated(x_VD.view(-1), c_GKD.squeeze(2), tau_G, iterations, form)
        return out_N.view(-1, 1), c_GK.unsqueeze(2)
    found = []
    for groups, vectors, length in runs(lengths):
        x_GVD, c, tau = x_VD[vectors].reshape(-1, length, x_VD.shape[1]), c_GKD[groups], tau_G[groups]
        if form.kind == "dense":
            found.append(dense(x_GVD, c, tau, iterations, metric))
        else:
            found.append(chunked(x_GVD, c, tau, iterations, metric, dtype=form.dtype, near=form.kind == "near"))
    outs, centroids = zip(*found, strict=True)
    return torch.cat([out.flatten(0, 1) for out in outs]), torch.cat(centroids)


@torch.no_grad()
def exact_form(x_VD: Tensor, c_GKD: Tensor, tau_G: Tensor, lengths: Sequence[int], metric: Metric) -> Exact:
    """Returns the exact form that costs least. It waits for the device."""
    if len(x_VD) * c_GKD.shape[1] <= _SMALL:
        return Exact("dense")
    is_near = metric == "squared" and is_worthwhile(x_VD, c_GKD, tau_G, lengths)
    dtype, tau = torch.float64, float(tau_G.min())
    if x_VD.dtype != torch.float64:
        variance = float(x_VD.double().var(correction=0))
        dtype = near_dtype(variance, x_VD.shape[1], tau) if is_near else needed_dtype(variance, tau, metric)
    return Exact("near" if is_near else "chunked", dtype)


@torch.no_grad()
def table_for(
    x_VD: Tensor, c_GKD: Tensor, tau_G: Tensor, lengths: Sequence[int], iterations: int, drift: float = 0.0
) -> Table | None:
    """Returns a table that fits the centroids of all iterations; None: no table does. It waits for the device.

    Args:
        x_VD: the vectors.
        c_GKD: the first centroids.
        tau_G: τ.
        lengths: number of vectors of each group.
        iterations: how often the centroids move.
        drift: see `table`.
    """
    if x_VD.shape[1] > 1 or c_GKD.shape[1] == 1 or x_VD.dtype == torch.float64:
        return None
    w_N, c_GK = x_VD.view(-1), c_GKD.squeeze(2).double().sort(dim=1).values
    most_edges = max(len(w_N) // 2, min(4 * len(w_N), _CHEAP // c_GK.shape[1] * len(c_GK)))
    if cells(c_GK.shape[1]) * len(c_GK) > most_edges:
        return None
    ends = [part.aminmax() for part in torch.split(w_N, list(lengths))]
    ranges = torch.stack([end.min for end in ends]), torch.stack([end.max for end in ends])
    sets: tuple[Tensor, ...] = (c_GK,)
    for _ in range(iterations):
        found = table(TableSpec(sets, tau_G.clone(), *ranges, tuple(lengths), drift))
        if found is None or found.edges.numel() > most_edges:
            return None
        others = [c for c in iterate(w_N, c_GK, tau_G, iterations - 1, found)[1:] if not found.fits(c)]
        if not others:
            return found
        sets += tuple(others)
    return None
