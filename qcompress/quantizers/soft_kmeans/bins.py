"""Makes tables: bins are narrow where the attention changes, and wide elsewhere.

The attention changes around the midpoints of neighbouring centroids, over a distance of about τ / gap.

Shape suffixes: G = groups, K = centroids, C = cells, M = edges of bins.
"""

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from qcompress.quantizers.soft_kmeans.neighbours import NARROWEST, SATURATED, Neighbours
from qcompress.quantizers.soft_kmeans.table import Table, pieces

_STEP: Final = 0.06  # largest width of a bin, over the distance in which the attention changes
_MOST_BINS: Final = 1 << 16  # a float32 position still tells 1/128 of a bin apart
_CELLS_PER_CENTROID: Final = 128
_CELLS: Final = (512, 1 << 14)  # fewest and most
_TAIL: Final = 4.0  # typical gaps from the last centroid within which most weights are
_GRADE: Final = 8  # most bins of a cell over those of the next one


def cells(centroids: int) -> int:
    """Returns the number of cells for some number of centroids."""
    least, most = _CELLS
    return min(most, max(least, _CELLS_PER_CENTROID * centroids))


def table(
    centroids: Sequence[Tensor],
    tau_G: Tensor,
    ranges: tuple[Tensor, Tensor],
    lengths: Sequence[int],
    drift: float = 0.0,
) -> Table | None:
    """Returns bins that fit some centroids; None: they would be too many. It waits for the device.

    Args:
        centroids: float64 [G, K] each, sorted along K.
        tau_G: float64 [G], > 0.
        ranges: the least and the largest weight of each group, [G] each.
        lengths: weights of each group.
        drift: how far midpoints may move, as a share of their gap or of the median gap, the smaller of which counts.
    """
    device = tau_G.device
    sets = [c.cpu() for c in centroids]
    low_G, high_G, tau_G = (values.double().cpu() for values in (*ranges, tau_G))
    neighbours = [Neighbours.of(c, tau_G, drift) for c in sets]
    # Beyond these ends the attention is 1 for the first or the last centroid, and there are few weights.
    reach = [(SATURATED * tau_G[:, None] / n.gap).maximum(_TAIL * n.typical) for n in neighbours]
    low_G = low_G.maximum(torch.stack([c[:, 0] - r[:, 0] for c, r in zip(sets, reach, strict=True)]).amin(0))
    high_G = high_G.minimum(torch.stack([c[:, -1] + r[:, -1] for c, r in zip(sets, reach, strict=True)]).amax(0))
    count = cells(sets[0].shape[1])
    width_G = ((high_G - low_G) / count).maximum(_finest(low_G, high_G)).clamp_min(NARROWEST)
    lows_GC = (low_G[:, None] + width_G[:, None] * torch.arange(count, dtype=torch.float64)).float()
    density_GC = torch.stack([between.density(lows_GC, width_G) for between in neighbours]).amax(0)
    bins_GC = (width_G[:, None] * density_GC / _STEP).clamp(max=2.0 * _MOST_BINS).ceil().clamp_min(1)
    bins_GC = _graded(bins_GC)
    if bins_GC.sum(1).max() > _MOST_BINS or (width_G / bins_GC.amax(1) < _finest(low_G, high_G)).any():
        return None
    # Ends of cells are rounded to float32; slopes that fit them let weights beyond the first cell be extrapolated.
    widths_GC = torch.cat([lows_GC.double().diff(dim=1), width_G[:, None]], 1)
    if not (widths_GC > 0).all():
        return None
    first_GC = bins_GC.cumsum(1) - bins_GC
    slope_GC = (bins_GC / widths_GC).float()
    return Table(
        pieces=tuple(pieces(lengths, device)),
        scale=(1 / width_G).float().to(device),
        offset=(-low_G / width_G).float().to(device),
        low=lows_GC.to(device),
        start=torch.complex(first_GC.float(), slope_GC).to(device),
        edges=_edges(lows_GC.double(), first_GC, bins_GC, slope_GC.double()).to(device),
        neighbours=tuple(neighbours),
    )


def joined(tables: Sequence[Table], lengths: Sequence[Sequence[int]]) -> Table:
    """Returns one table for the groups of several, all with as many cells.

    Args:
        tables: one for each tensor.
        lengths: weights of each group of each tensor.
    """
    most = max(found.edges.shape[1] for found in tables)
    edges = []
    for found in tables:
        steps = torch.arange(1, most - found.edges.shape[1] + 1, device=found.edges.device)
        last = found.edges[:, -1:]
        edges.append(torch.cat([found.edges, last + steps * (last - found.edges[:, -2:-1])], 1))
    every = [length for some in lengths for length in some]
    return Table(
        pieces=tuple(pieces(every, edges[0].device)),
        scale=torch.cat([found.scale for found in tables]),
        offset=torch.cat([found.offset for found in tables]),
        low=torch.cat([found.low for found in tables]),
        start=torch.cat([found.start for found in tables]),
        edges=torch.cat(edges),
        neighbours=(),
    )


def _finest(low_G: Tensor, high_G: Tensor) -> Tensor:
    """Returns the least width of a bin: rounding may put a weight into the cell beside its own, by some bins."""
    return torch.finfo(torch.float32).eps / 4 * (high_G - low_G)


def _graded(bins_GC: Tensor) -> Tensor:
    """Returns numbers of bins that differ between neighbouring cells by a factor of `_GRADE` at most."""
    for _ in range(math.ceil(math.log(_MOST_BINS, _GRADE))):
        shared_GC = torch.nn.functional.max_pool1d(bins_GC, 3, stride=1, padding=1) / _GRADE
        bins_GC = bins_GC.maximum(shared_GC.ceil())
    return bins_GC


def _edges(low_GC: Tensor, first_GC: Tensor, bins_GC: Tensor, slope_GC: Tensor) -> Tensor:
    """Returns the edges of all bins, [G, M]."""
    most = int(bins_GC.sum(1).max())
    places_M = torch.arange(most + 1, dtype=torch.float64).expand(len(low_GC), -1).contiguous()
    cell_GM = (torch.searchsorted(first_GC, places_M, right=True) - 1).clamp_(0, first_GC.shape[1] - 1)
    return low_GC.gather(1, cell_GM) + (places_M - first_GC.gather(1, cell_GM)) / slope_GC.gather(1, cell_GM)
