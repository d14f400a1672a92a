"""Makes tables: bins are narrow where the attention changes, and wide elsewhere.

The attention changes around the midpoints of neighbouring centroids, over a distance of about τ / gap. Cells have one
width; where that distance is far below it, cells are cut into parts, so that only those around midpoints get narrow
bins.

Shape suffixes: G = groups, K = centroids, C = cells, P = parts of cells, M = edges of bins.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor, nn

from qcompress.quantizers.soft_kmeans.neighbours import NARROWEST, SATURATED, Neighbours
from qcompress.quantizers.soft_kmeans.table import Table, TableSpec, pieces

_STEP: Final = 0.06  # largest width of a bin, over the distance in which the attention changes
_MOST_BINS: Final = 1 << 16  # a float32 position still tells 1/128 of a bin apart
_CELLS_PER_CENTROID: Final = 128
_CELLS: Final = (512, 1 << 12)  # fewest and most
_PLENTY: Final = 1 << 14  # bins from which it pays to cut cells into parts
_PARTS: Final = 2.0  # parts in the distance over which the attention changes
_MOST_PARTS: Final = 1 << 12, 1 << 15  # of a cell, and of all cells
_FEW: Final = 32.0  # weights where the attention changes: of fewer, those farther off decide, where bins are wide
_TAIL: Final = 4.0  # typical gaps from the last centroid within which most weights are
_GRADE: Final = 8  # largest ratio of neighbours: of the parts of cells, and of how dense bins are


def cells(centroids: int) -> int:
    """Returns the number of cells for some number of centroids."""
    least, most = _CELLS
    return min(most, max(least, _CELLS_PER_CENTROID * centroids))


def table(spec: TableSpec) -> Table | None:
    """Returns the bins that fit some centroids; None: they would be too many. It waits for the device."""
    device, lengths = spec.tau.device, spec.lengths
    sets = [c.cpu() for c in spec.sets]
    low_G, high_G, tau_G = (values.double().cpu() for values in (spec.low, spec.high, spec.tau))
    neighbours = [Neighbours.of(c, tau_G, spec.drift) for c in sets]
    # Beyond these ends the attention is 1 for the first or the last centroid, and there are few weights.
    reach = [(SATURATED * tau_G[:, None] / n.gap).maximum(_TAIL * n.typical) for n in neighbours]
    low_G = low_G.maximum(torch.stack([c[:, 0] - r[:, 0] for c, r in zip(sets, reach, strict=True)]).amin(0))
    high_G = high_G.minimum(torch.stack([c[:, -1] + r[:, -1] for c, r in zip(sets, reach, strict=True)]).amax(0))
    count = cells(sets[0].shape[1])
    width_G = ((high_G - low_G) / count).maximum(_finest(low_G, high_G)).clamp_min(NARROWEST)
    lows_GC = (low_G[:, None] + width_G[:, None] * torch.arange(count, dtype=torch.float64)).float().double()
    # Ends of cells are rounded to float32; slopes that fit them let weights beyond the first cell be extrapolated.
    widths_GC = torch.cat([lows_GC.diff(dim=1), width_G[:, None]], 1)
    if not (widths_GC > 0).all():
        return None
    parts, counts_GC = _Parts(lows_GC, lows_GC, widths_GC), torch.ones_like(lows_GC)
    bins_GP = parts.bins(neighbours)
    if is_cut := bool(bins_GP.sum(1).max() > _PLENTY):
        counts_GC = _counts(parts, neighbours)
        torn_G = torch.tensor(lengths) * neighbours[0].transitions() / (high_G - low_G)
        if counts_GC.sum(1).max() > _MOST_PARTS[1] or (torn_G < _FEW).any():
            return None
        parts = parts.cut(counts_GC)
        bins_GP = parts.bins(neighbours)
    if bins_GP.sum(1).max() > _MOST_BINS or (parts.width / bins_GP < _finest(low_G, high_G)[:, None]).any():
        return None
    slope_GP, first_GP = (bins_GP / parts.width).float(), _before(bins_GP)
    start_GP = (first_GP - (parts.low - parts.cell) * slope_GP).float()
    return Table(
        pieces=tuple(pieces(lengths, device)),
        scale=(1 / width_G).float().to(device),
        offset=(-low_G / width_G).float().to(device),
        low=lows_GC.float().to(device),
        parts=_complex(_before(counts_GC), counts_GC).to(device) if is_cut else None,
        start=_complex(start_GP, slope_GP).to(device),
        edges=_edges(parts.cell, first_GP, start_GP.double(), slope_GP.double(), int(bins_GP.sum(1).max())).to(device),
        neighbours=tuple(neighbours),
        made_from=spec,
    )


@final
@dataclass(frozen=True, slots=True)
class _Parts:
    """Parts of cells, float64 [G, P].

    Args:
        cell: the low end of the cell.
        low: the low end of the part.
        width: that of the part.
    """

    cell: Tensor
    low: Tensor
    width: Tensor

    def cut(self, counts_GC: Tensor) -> "_Parts":
        """Returns some parts of each of these; short rows go on with further ones."""
        first_GC = _before(counts_GC)
        place_GP, cell_GP = _places(first_GC, int(counts_GC.sum(1).max()))
        low_GP, width_GP = self.low.gather(1, cell_GP), (self.width / counts_GC).gather(1, cell_GP)
        return _Parts(low_GP, low_GP + (place_GP - first_GC.gather(1, cell_GP)) * width_GP, width_GP)

    def bins(self, neighbours: Sequence[Neighbours]) -> Tensor:
        """Returns how many bins each part needs."""
        bins_GP = (self.width * self.density(neighbours) / _STEP).clamp_(1, 2.0 * _MOST_BINS).ceil_()
        return (self.width * _graded(bins_GP / self.width)).ceil_()

    def density(self, neighbours: Sequence[Neighbours]) -> Tensor:
        """Returns an upper bound of how fast the attention changes in each part."""
        return torch.stack([between.density(self.low, self.width) for between in neighbours]).amax(0)


def _counts(parts: _Parts, neighbours: Sequence[Neighbours]) -> Tensor:
    """Returns into how many parts to cut each of some parts."""
    return _graded((_PARTS * parts.width * parts.density(neighbours)).clamp_(1, _MOST_PARTS[0])).ceil_()


def _before(counts: Tensor) -> Tensor:
    """Returns the sum of the counts before each."""
    return counts.cumsum(1) - counts


def _places(first_GP: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the numbers from 0 to `count` - 1 in each row, and the part in which each lies, from its first number."""
    place = torch.arange(count, dtype=torch.float64).expand(len(first_GP), -1).contiguous()
    return place, (torch.searchsorted(first_GP, place, right=True) - 1).clamp_(0, first_GP.shape[1] - 1)


def _complex(real: Tensor, imaginary: Tensor) -> Tensor:
    return torch.complex(real.float(), imaginary.float())


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
    is_cut = any(found.parts is not None for found in tables)
    most_parts = max(found.start.shape[1] for found in tables)
    starts = [nn.functional.pad(found.start, (0, most_parts - found.start.shape[1])) for found in tables]
    every = [length for some in lengths for length in some]
    return Table(
        pieces=tuple(pieces(every, edges[0].device)),
        scale=torch.cat([found.scale for found in tables]),
        offset=torch.cat([found.offset for found in tables]),
        low=torch.cat([found.low for found in tables]),
        parts=torch.cat([_parts(found) for found in tables]) if is_cut else None,
        start=torch.cat(starts),
        edges=torch.cat(edges),
        neighbours=(),
    )


def _parts(found: Table) -> Tensor:
    """Returns the parts of a table's cells: if they are not cut, one for each."""
    if found.parts is not None:
        return found.parts
    one = torch.ones_like(found.low)
    return _complex(_before(one), one)


def _finest(low_G: Tensor, high_G: Tensor) -> Tensor:
    """Returns the least width of a bin: rounding may put a weight into the cell beside its own, by some bins."""
    return torch.finfo(torch.float32).eps / 4 * (high_G - low_G)


def _graded(density: Tensor) -> Tensor:
    """Returns densities, [G, P], that differ between neighbours by a factor of `_GRADE` at most."""
    for _ in range(math.ceil(math.log(_MOST_BINS, _GRADE))):
        density = density.maximum(nn.functional.max_pool1d(density, 3, stride=1, padding=1) / _GRADE)
    return density


def _edges(cell_GP: Tensor, first_GP: Tensor, start_GP: Tensor, slope_GP: Tensor, bins: int) -> Tensor:
    """Returns the edges of all bins, [G, M]; see `Table.start`."""
    place_GM, part_GM = _places(first_GP, bins + 1)
    return cell_GP.gather(1, part_GM) + (place_GM - start_GP.gather(1, part_GM)) / slope_GP.gather(1, part_GM)
