"""Sorts weights into the bins of a table: where each is, masses at the edges of bins, and functions of the weights.

A table has cells of one width. Each is cut into bins, or first into parts whose bins differ in width. A weight's bin
is found by some arithmetic and two look-ups, or three. Functions of a weight are tabulated at the edges of bins and
interpolated linearly. Histograms share a weight between the two edges of its bin, so that counts and means are exact.
Weights beyond the first and last edge are extrapolated.

Shape suffixes: N = weights of all groups, n = weights of one piece, G = groups, C = cells, P = parts of cells,
M = edges.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Final, final

import torch
from torch import Tensor

from qcompress.quantizers.soft_kmeans.neighbours import Neighbours

_BELOW_1: Final = 1 - 2**-13  # share of a cell's width that does not round up to the next cell
_PIECE: Final = 1 << 16  # weights that a CPU processes together, so that they stay in its cache


@final
@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive weights that are processed together: of one group (its index), or of several (an index each, [n])."""

    where: slice
    group: int | Tensor

    def pick(self, values_G: Tensor) -> Tensor:
        """Returns the value of each weight's group, 0-d or [n]."""
        return values_G[self.group] if isinstance(self.group, int) else values_G.index_select(0, self.group)

    def tables(self, tables: Tensor) -> Tensor:
        """Returns the tables of the groups, [G, ...], as one row: that of the only group, or all."""
        return tables[self.group] if isinstance(self.group, int) else tables.view(-1)

    def place(self, within_n: Tensor, width: int) -> Tensor:
        """Returns places in `tables` of that width, from places within the group, int32 [n]."""
        return within_n if isinstance(self.group, int) else torch.add(within_n, self.group, alpha=width)


@final
@dataclass(frozen=True, slots=True)
class TableSpec:
    """What a table is made from.

    Args:
        sets: centroids that the bins fit, sorted along K: float64 [G, K] each.
        tau: float64 [G], > 0.
        low: the least weight of each group, [G].
        high: the largest.
        lengths: weights of each group.
        drift: how far midpoints may move, in units of τ / gap.
    """

    sets: tuple[Tensor, ...]
    tau: Tensor
    low: Tensor
    high: Tensor
    lengths: tuple[int, ...]
    drift: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold."""
        tensors = {"tau": self.tau, "low": self.low, "high": self.high}
        listed = {name: value.double().tolist() for name, value in tensors.items()}
        return {"sets": [c.tolist() for c in self.sets], **listed, "lengths": list(self.lengths), "drift": self.drift}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], device: torch.device) -> "TableSpec":
        """Returns the spec that `as_dict` wrote."""

        def tensor(value: Any) -> Tensor:
            return torch.tensor(value, dtype=torch.float64, device=device)

        sets = tuple(tensor(c) for c in values["sets"])
        ends = tensor(values["tau"]), tensor(values["low"]), tensor(values["high"])
        return cls(sets, *ends, tuple(values["lengths"]), values["drift"])


@final
@dataclass(frozen=True, slots=True)
class Table:
    """Bins for the weights of some groups.

    Args:
        pieces: how the weights are processed.
        scale: float32 [G].
        offset: float32 [G]; a weight's cell is the integer part of w·scale + offset.
        low: float32 [G, C]: the low end of each cell.
        parts: complex64 [G, C]: the first part of each cell, and the number of its parts; None: each is one part.
        start: complex64 [G, P]: the position that each part would give to the low end of its cell, and bins per unit
            of weight.
        edges: float64 [G, M]: edges of bins; short rows go on in steps of their last bin.
        neighbours: those among the centroids that the bins fit, on the CPU.
        made_from: what the table was made from; None for the joined tables of several tensors.
    """

    pieces: tuple[Piece, ...]
    scale: Tensor
    offset: Tensor
    low: Tensor
    parts: Tensor | None
    start: Tensor
    edges: Tensor
    neighbours: tuple[Neighbours, ...]
    made_from: "TableSpec | None" = None

    @property
    def count(self) -> int:
        """The number of weights."""
        count: int = self.pieces[-1].where.stop
        return count

    def fits(self, c_GK: Tensor) -> bool:
        """Returns whether the bins fit some centroids. It waits for the device."""
        c_GK = c_GK.double().cpu().sort(dim=1).values
        return any(between.near(c_GK) for between in self.neighbours)

    def __deepcopy__(self, memo: object) -> "Table":
        """Returns itself: it is immutable."""
        return self

    def positions(self, w_N: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the place of each weight among its group's edges, and the number of weights at the edges.

        Args:
            w_N: the weights.

        Returns:
            float32 [N], where 2.25 is a quarter into bin 2, and float64 [G, M].
        """
        found_N = w_N.new_empty(w_N.shape, dtype=torch.float32)
        sums = self._no_sums()
        for piece in self.pieces:
            self._locate(piece, w_N[piece.where].float(), found_N[piece.where])
            place_n, share_n = self._place(piece, found_N[piece.where])
            _add(sums, piece, place_n, share_n.new_ones(()), share_n)
            del place_n, share_n  # so that the next piece gets their memory
        return found_N, _at_edges(sums)

    def masses(self, position_N: Tensor, mass_N: Tensor) -> Tensor:
        """Returns masses at the edges, float64 [G, M], each weight's shared between the edges of its bin.

        Args:
            position_N: first result of `positions`.
            mass_N: of each weight, any float dtype.
        """
        sums = self._no_sums()
        for piece in self.pieces:
            place_n, share_n = self._place(piece, position_N[piece.where])
            mass_n = mass_N[piece.where].float()
            _add(sums, piece, place_n, mass_n, share_n.mul_(mass_n))
            del place_n, share_n
        return _at_edges(sums)

    def interpolated(self, position_N: Tensor, values_GM: Tensor, like_N: Tensor) -> Tensor:
        """Returns a function of the weights from its values at the edges, in the shape and dtype of `like_N`."""
        found_N = torch.empty_like(like_N, dtype=torch.float32)
        lines = _lines(values_GM)
        for piece in self.pieces:
            place_n, share_n = self._place(piece, position_N[piece.where])
            _along(piece, place_n, share_n, lines, out=found_N[piece.where])
            del place_n, share_n
        return found_N.to(like_N.dtype)

    def gradient(self, position_N: Tensor, g_N: Tensor, slope_GM: Tensor, through_GM: Tensor) -> Tensor:
        """Returns g·slope(w) + through(w) for two functions given at the edges, in the shape and dtype of `g_N`."""
        found_N = torch.empty_like(g_N, dtype=torch.float32)
        slopes, throughs = _lines(torch.stack([slope_GM, through_GM]))
        # One look-up for both functions: a complex128 element holds the four float32 numbers of an edge.
        four = torch.stack([torch.view_as_real(throughs), torch.view_as_real(slopes)], 2).flatten(2)
        lines = torch.view_as_complex(four.view(torch.float64))
        for piece in self.pieces:
            place_n, share_n = self._place(piece, position_N[piece.where])
            picked = torch.view_as_real(piece.tables(lines).index_select(0, place_n)).view(torch.float32)
            found_n = torch.addcmul(picked[:, 0], picked[:, 1], share_n, out=found_N[piece.where])
            found_n.addcmul_(torch.addcmul(picked[:, 2], picked[:, 3], share_n), g_N[piece.where])
            del place_n, share_n, picked
        return found_N.to(g_N.dtype)

    def _locate(self, piece: Piece, w_n: Tensor, position_n: Tensor) -> None:
        """Writes the positions of weights."""
        scale = piece.pick(self.scale)
        place_n = torch.mul(w_n, scale).add_(piece.pick(self.offset)).to(torch.int32)
        place_n = piece.place(place_n.clamp_(0, self.low.shape[1] - 1), self.low.shape[1])
        low_n = piece.tables(self.low).index_select(0, place_n)
        beyond_n = torch.sub(w_n, low_n, out=low_n)
        if self.parts is not None:
            first_n, count_n = _pairs(piece, place_n, self.parts)
            part_n = torch.mul(beyond_n, scale).clamp_(0, _BELOW_1).mul_(count_n).floor_().add_(first_n)
            place_n = piece.place(part_n.to(torch.int32), self.start.shape[1])
        _along(piece, place_n, beyond_n, self.start, out=position_n)

    def _place(self, piece: Piece, position_n: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the place of each weight's bin in tables of edges, int32 [n], and its share of the upper edge."""
        bin_n = position_n.to(torch.int32).clamp_(0, self.edges.shape[1] - 2)
        return piece.place(bin_n, self.edges.shape[1]), position_n - bin_n

    def _no_sums(self) -> Tensor:
        return torch.zeros(self.edges.shape, dtype=torch.complex64, device=self.edges.device)


def _add(sums: Tensor, piece: Piece, place_n: Tensor, mass_n: Tensor, upper_n: Tensor) -> None:
    """Adds masses and the upper edges' shares of them: a complex number holds both, so that one addition does."""
    piece.tables(sums).scatter_add_(0, place_n.long(), torch.complex(mass_n, upper_n))


def _at_edges(sums: Tensor) -> Tensor:
    whole, upper = torch.view_as_real(sums).double().unbind(2)
    at_edges = whole - upper
    at_edges[:, 1:] += upper[:, :-1]
    return at_edges


def _lines(values: Tensor) -> Tensor:
    """Returns the value at each edge and its rise up to the next, complex64, from values at edges, [..., M]."""
    values = values.float()
    return torch.complex(values, values.roll(-1, -1).sub_(values))


def _along(piece: Piece, place_n: Tensor, steps_n: Tensor, lines: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns points on lines (complex: where each begins, and its rise), some steps after their beginning."""
    begin_n, rise_n = _pairs(piece, place_n, lines)
    return torch.addcmul(begin_n, rise_n, steps_n, out=out)


def _pairs(piece: Piece, place_n: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the real and the imaginary parts of complex values at some places."""
    real_n, imaginary_n = torch.view_as_real(piece.tables(values).index_select(0, place_n)).unbind(1)
    return real_n, imaginary_n


def is_queued(device: torch.device) -> bool:
    """Returns whether a device computes later than it is told to, so that reading a value waits for it."""
    return device.type != "cpu"


def pieces(lengths: Sequence[int], device: torch.device) -> Iterator[Piece]:
    """Yields pieces: large groups in several, small ones together; for other devices than a CPU all in one."""
    ends = [0, *accumulate(lengths)]
    for groups in _runs(lengths, len(lengths) if is_queued(device) else None):
        start, stop = ends[groups.start], ends[groups.stop]
        if len(groups) > 1:
            counts = torch.tensor([lengths[g] for g in groups], device=device)
            each = torch.arange(groups.start, groups.stop, dtype=torch.int32, device=device)
            yield Piece(slice(start, stop), each.repeat_interleave(counts))
            continue
        cuts = [start, stop] if is_queued(device) else [*range(start, stop, _PIECE), stop]
        for first, last in pairwise(cuts):
            yield Piece(slice(first, last), groups.start)


def _runs(lengths: Sequence[int], together: int | None) -> Iterable[range]:
    """Yields consecutive groups to process together: `together` of them, or as many as a piece holds."""
    if together is not None:
        yield range(together)
        return
    first, weights = 0, 0
    for group, length in enumerate(lengths):
        if group > first and weights + length > _PIECE:
            yield range(first, group)
            first, weights = group, 0
        weights += length
    yield range(first, len(lengths))
