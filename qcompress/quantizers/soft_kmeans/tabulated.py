"""Tabulated DKM for scalar palettes: soft weights are a function of one variable, which is looked up in a table.

Given the centroids, a soft weight depends on its weight alone: f(w) = Σ A_k(w)·c'_k. Sums over weights are sums over a
histogram n, and gradients are two more functions of w: dL/dw = g·f'(w) + h(w). So each weight costs a few look-ups,
whatever K and the number of iterations are, and nothing of size N x K exists.

In units of √(τ/2), with E the mean under an attention A_k = softmax(-(w - c_k)² / 2), and c' the centroids after it:

    c'_k = Σ n A_k w / Σ n A_k,    f' = E[c c'] - E[c] E[c'].

Let λ_k = dL/dc'_k and μ_k = λ_k / Σ n A_k. One iteration contributes to h the derivative of Σ_k μ_k A_k (w - c'_k):

    h = E[μ] + w E[cμ] - E[c μc'] - E[c] v,    v = w E[μ] - E[μc'],

and to the gradient of the centroids before it Σ n A_k (w - c_k) (μ_k (w - c'_k) - v).

Source: Cho et al., "DKM", ICLR 2022, section 3.
Code: the tabulation is ours; no code copied.

Shape suffixes: N = weights of all groups, G = groups, K = centroids, M = edges of bins,
E = edges of bins that are not empty.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qcompress.quantizers.soft_kmeans.dense import EMPTY
from qcompress.quantizers.soft_kmeans.table import Table, is_queued

_AT_ONCE: Final = 1 << 17  # elements of an attention that are computed together
_LOWEST_LOGIT: Final = -300.0  # exp of it is far from 0 in float64, and far below EMPTY


def tabulated(w_N: Tensor, c_GK: Tensor, tau_G: Tensor, iterations: int, table: Table) -> tuple[Tensor, Tensor]:
    """Returns soft weights and the last centroids.

    Args:
        w_N: float32, float16 or bfloat16: the weights of all groups, one group after the other.
        c_GK: centroids.
        tau_G: float64.
        iterations: number of iterations, at least 1.
        table: bins that fit the centroids of all iterations.
    """
    soft: tuple[Tensor, Tensor] = _Tabulated.apply(w_N, c_GK, tau_G, iterations, table)  # type: ignore[no-untyped-call]
    return soft


def iterate(w_N: Tensor, c_GK: Tensor, tau_G: Tensor, iterations: int, table: Table) -> list[Tensor]:
    """Returns the centroids before and after each iteration, float64 [G, K], without gradient."""
    with torch.no_grad():
        unit_G1 = _unit(tau_G)
        points = _Points(table.positions(w_N)[1], table.edges / unit_G1)
        found = [c_GK / unit_G1]
        for _ in range(iterations):
            found.append(points.moved(found[-1])[0])
        return [c * unit_G1 for c in found]


def _unit(tau_G: Tensor) -> Tensor:
    return (tau_G / 2).sqrt_()[:, None]


class _Points:
    """Weighted points in place of the weights, in units of √(τ/2), and their attention to centroids.

    They are edges of bins; where nothing has to be waited for, only those of bins that hold weights, which E counts.
    The last attention is kept if it is small: the next one is often to the same centroids.

    Args:
        n_GM: the weights at each edge.
        x_GM: the edges.
    """

    def __init__(self, n_GM: Tensor, x_GM: Tensor) -> None:
        self._edges = x_GM.shape[1]
        self._kept_E = None if is_queued(n_GM.device) else _occupied(n_GM)
        n_GM, x_GM = self.at(n_GM), self.at(x_GM)
        nx_GM = n_GM * x_GM
        self.x, self.moments = x_GM, torch.stack([n_GM, nx_GM, nx_GM * x_GM], 1)
        self._last: tuple[Tensor, Tensor] | None = None
        self.least = n_GM.sum(1, keepdim=True) * EMPTY  # mass that an empty centroid has, so that it stays

    def at(self, values_GM: Tensor) -> Tensor:
        """Returns the values at the points, [G, E], of those at all edges."""
        return values_GM if self._kept_E is None else values_GM.index_select(1, self._kept_E)

    def everywhere(self, values_GE: Tensor) -> Tensor:
        """Returns values at all edges, [G, M]: 0 at edges of empty bins."""
        if self._kept_E is None:
            return values_GE
        return values_GE.new_zeros(len(values_GE), self._edges).index_copy_(1, self._kept_E, values_GE)

    def attention(self, c_GK: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yields slices of M, and the attention [G, K, slice of M] to the centroids there."""
        if self._last is not None and self._last[0] is c_GK:
            yield slice(None), self._last[1]
            return
        length, fitting = self.x.shape[1], max(1, _AT_ONCE // c_GK.numel())
        step, c = length if is_queued(c_GK.device) else fitting, c_GK[..., None]
        for start in range(0, length, step):
            part = slice(start, start + step)
            logits = torch.sub(self.x[:, None, part], c, alpha=0.5).mul_(c)
            attention = logits.softmax(1) if is_queued(c.device) else _softmax(logits)
            if length <= fitting:
                self._last = c_GK, attention
            yield part, attention

    def sums(self, c_GK: Tensor, masses_GJM: Tensor) -> Tensor:
        """Returns the sums over all points of J masses times attention, [G, J, K]."""
        found = [torch.bmm(masses_GJM[..., part], a.mT) for part, a in self.attention(c_GK)]
        return sum(found[1:], found[0])

    def moved(self, c_GK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the centroids after an iteration, [G, K], the mass of each, and the moments behind them, [G, 3, K].

        `least` of the mass is where the centroid was.
        """
        moments = self.sums(c_GK, self.moments)
        mass = moments[:, 0] + self.least
        return torch.addcmul(moments[:, 1], c_GK, self.least).div_(mass), mass, moments

    def soft(self, c_GK: Tensor, after_GK: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the function of the points that gives soft weights, and its derivative, [G, M] each."""
        rows, f, slope = torch.stack([after_GK, c_GK, c_GK * after_GK], 1), [], []
        for _, attention in self.attention(c_GK):
            of_after, of_c, of_both = torch.bmm(rows, attention).unbind(1)
            f.append(of_after)
            slope.append(torch.addcmul(of_both, of_c, of_after, value=-1))
        return _whole(f), _whole(slope)


class _Tabulated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, w_N: Tensor, c_GK: Tensor, tau_G: Tensor, iterations: int, table: Table
    ) -> tuple[Tensor, Tensor]:
        (position_N, n_GM), unit_G1 = table.positions(w_N), _unit(tau_G)
        points = _Points(n_GM, table.edges / unit_G1)
        cs, moves = [c_GK / unit_G1], []
        for _ in range(iterations):
            after, *sums = points.moved(cs[-1])
            cs.append(after)
            moves.append(sums)
        f, slope = points.soft(*cs[-2:])
        ctx.save_for_backward(position_N)
        ctx.table, ctx.points, ctx.cs, ctx.moves, ctx.functions = table, points, cs, moves, (f, slope)
        return table.interpolated(position_N, points.everywhere(f * unit_G1), w_N), (cs[-1] * unit_G1).to(c_GK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_N: Tensor, g_GK: Tensor) -> tuple[Tensor | None, ...]:
        (position_N,), points, cs, (f, slope) = ctx.saved_tensors, ctx.points, ctx.cs, ctx.functions
        g_GM = points.at(ctx.table.masses(position_N, g_N))
        of_after, of_c = _through_output(points, cs[-2:], g_GM, f)
        of_after = of_after + g_GK
        hs: list[Tensor] = []
        for t in range(len(ctx.moves) - 1, -1, -1):
            mass, moments = ctx.moves[t]
            mu = of_after / mass
            wants_before = t > 0 or ctx.needs_input_grad[1]
            h, of_before = _through_move(points, cs[t : t + 2], mu, moments if wants_before else None)
            hs.append(h)
            if of_before is not None:
                of_after = of_before.addcmul_(mu, points.least)
            if of_c is not None:
                of_after, of_c = of_after.add_(of_c), None
        start = of_after.to(g_GK.dtype) if ctx.needs_input_grad[1] else None
        functions = points.everywhere(slope), points.everywhere(sum(hs[1:], hs[0]))
        return ctx.table.gradient(position_N, g_N, *functions), start, None, None, None


def _through_output(points: _Points, cs: Sequence[Tensor], g_GM: Tensor, f: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients of the last centroids and of those before them, through the soft weights."""
    c, after = cs
    g_gx = torch.stack([g_GM, g_GM * points.x], 1)
    sums = points.sums(c, torch.cat([g_gx, g_gx * f[:, None]], 1)).view(len(c), 2, 2, -1)
    of_g, of_gf = torch.addcmul(sums[:, :, 1], sums[:, :, 0], c[:, None], value=-1).unbind(1)
    return sums[:, 0, 0], torch.addcmul(of_gf, of_g, after, value=-1).neg_()


def _through_move(
    points: _Points, cs: Sequence[Tensor], mu: Tensor, moments: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Returns an iteration's part of h, and the gradient of the centroids before it.

    Args:
        points: the histogram.
        cs: the centroids before and after the iteration, [G, K].
        mu: [G, K], as above.
        moments: those of the iteration, [G, 3, K]; None: the gradient is not wanted.
    """
    c, after = cs
    pair = torch.stack([-mu * after, mu], 1)
    rows = torch.cat([pair, pair * c[:, None], c[:, None]], 1)
    total, h = [], []
    for part, attention in points.attention(c):
        means = torch.bmm(rows, attention)
        # v, and the same with c·μ for μ
        v, cv = torch.addcmul(means[:, 0:3:2], means[:, 1:4:2], points.x[:, None, part]).unbind(1)
        h.append(torch.addcmul(cv, means[:, 4], v, value=-1).add_(means[:, 1]))
        if moments is not None:
            total.append(torch.bmm(points.moments[:, :2, part] * v[:, None], attention.mT))
    if moments is None:
        return _whole(h), None
    of_v = sum(total[1:], total[0])
    about_c = torch.addcmul(moments[:, 1:], moments[:, :2], c[:, None], value=-1)  # Σ n A (x - c), Σ n A x (x - c)
    pulled = torch.addcmul(of_v[:, 1], of_v[:, 0], c, value=-1)
    return _whole(h), (pair * about_c).sum(1).sub_(pulled)


def _occupied(n_GM: Tensor) -> Tensor:
    """Returns the edges, [E], of bins that hold weights in any group."""
    near_GM = torch.nn.functional.max_pool1d(n_GM.abs(), 3, stride=1, padding=1)  # rounding may leave 0 at one edge
    return near_GM.amax(0).nonzero().flatten()


def _softmax(logits_GKM: Tensor) -> Tensor:
    """Returns the softmax over K, in place: on a CPU, exp takes several times as long where it underflows."""
    attention = logits_GKM.sub_(logits_GKM.amax(1, keepdim=True)).clamp_min_(_LOWEST_LOGIT).exp_()
    return attention.mul_(attention.sum(1, keepdim=True).reciprocal_())


def _whole(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
