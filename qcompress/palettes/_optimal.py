"""Optimal one-dimensional k-means by dynamic programming.

Source: the optimum splits sorted points into K runs, and the best split of the first j points into k runs is a best
split of the first i < j into k - 1 runs plus the run i..j-1. The best i does not fall as j grows (the squared error is
a Monge cost), so a whole layer k is solved by halving: the middle j first, its best i bounds both halves.
Code: written from that recurrence; every depth of the halving is one set of vectorised operations.

Shape suffixes: U = points, K = runs, J = targets solved together, P = candidate pairs (i, j).
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

# Up to this many points, all pairs (i, j) are evaluated at once: fewer and larger vectorised operations.
_DENSE: Final = 320


def optimal_runs(points_U: F64, mass_U: F64, k: int) -> I64:
    """Return the K runs of sorted points with the least total squared distance to their means.

    Args:
        points_U: sorted, distinct, finite.
        mass_U: weight of each point, > 0.
        k: number of runs, 1 to U.

    Returns:
        [K + 1]: run r holds the points edges[r] .. edges[r + 1] - 1.

    >>> optimal_runs(np.array([0.0, 1.0, 10.0, 11.0]), np.ones(4), 2).tolist()
    [0, 2, 4]
    """
    centre = float(np.average(points_U, weights=mass_U))
    moment = mass_U * (points_U - centre)
    # Prefix sums. The squares are the same for every split and drop out, so a run's gain (sum^2 / mass) is maximised
    # instead of minimising its squared error.
    n = np.concatenate([[0.0], np.cumsum(mass_U)])
    s = np.concatenate([[0.0], np.cumsum(moment)])
    solve = _dense_layers if len(points_U) <= _DENSE else _halving_layers
    return _backtrack(solve(n, s, k), len(points_U))


def _dense_layers(n: F64, s: F64, k: int) -> list[npt.NDArray[Any]]:
    mass_IJ = n[None, :] - n[:, None]
    gain_IJ = np.full_like(mass_IJ, -np.inf)
    np.divide((s[None, :] - s[:, None]) ** 2, mass_IJ, out=gain_IJ, where=np.triu(np.ones(mass_IJ.shape, bool), 1))
    best = gain_IJ[0]
    layers = []
    for _ in range(1, k):
        total_IJ = best[:, None] + gain_IJ
        choice = np.argmax(total_IJ, axis=0)
        best = total_IJ[choice, np.arange(len(n))]
        layers.append(choice)
    return layers


def _halving_layers(n: F64, s: F64, k: int) -> list[npt.NDArray[Any]]:
    count = len(n) - 1
    best = np.full(count + 1, -np.inf)
    best[1:] = s[1:] ** 2 / n[1:]
    depths = list(_halvings(count))
    layers = []
    for runs in range(2, k + 1):
        # choice[j]: where the last run of the best split of the first j points starts; both ends hold the bounds.
        choice = np.zeros(count + 2, np.int64)
        choice[0], choice[count + 1] = runs - 1, count - 1
        value = np.full(count + 1, -np.inf)
        for below, targets_J, above in depths:
            low_J = np.maximum(choice[below], runs - 1)
            high_J = np.minimum(choice[above], targets_J - 1)
            width_J = np.maximum(high_J - low_J, 0) + 1
            low_J = np.minimum(low_J, high_J)  # j < runs: one candidate, of value -inf
            start_J = np.cumsum(width_J) - width_J
            i_P = np.arange(width_J.sum()) + np.repeat(low_J - start_J, width_J)
            # In 1-D, sums of the run i..j: three gathers, two repeats.
            sum_P = np.repeat(s[targets_J], width_J) - s[i_P]
            mass_P = np.repeat(n[targets_J], width_J) - n[i_P]
            total_P = best[i_P] + sum_P * sum_P / mass_P
            top_J = np.maximum.reduceat(total_P, start_J)
            hits = np.flatnonzero(total_P == np.repeat(top_J, width_J))
            value[targets_J] = top_J
            choice[targets_J] = i_P[hits[np.searchsorted(hits, start_J)]]
        layers.append(choice[: count + 1].astype(np.min_scalar_type(count)))
        best = value
    return layers


def _halvings(count: int) -> list[tuple[I64, I64, I64]]:
    """Yield (solved neighbour below, targets, solved neighbour above) for each depth, for the targets 1..count."""
    low, high = np.array([1]), np.array([count])
    depths = []
    while len(low):
        middle = (low + high) // 2
        depths.append((low - 1, middle, high + 1))
        low, high = np.stack([low, middle + 1], 1).ravel(), np.stack([middle - 1, high], 1).ravel()
        keep = low <= high
        low, high = low[keep], high[keep]
    return depths


def _backtrack(layers: list[npt.NDArray[Any]], count: int) -> I64:
    edges = [count]
    for choice in reversed(layers):
        edges.append(int(choice[edges[-1]]))
    return np.array([0, *edges[::-1]])
