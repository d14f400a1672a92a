"""Slow and simple references for the package's fast functions: one bit or one element at a time."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt


def pack_bit_by_bit(codes: Sequence[int], bits: int) -> bytes:
    """Pack codes one bit at a time.

    Bit b of code i is bit i * bits + b of the stream; bit s of the stream is bit s % 8 of byte s // 8.
    """
    stream = bytearray(-(-len(codes) * bits // 8))
    for i, code in enumerate(codes):
        for b in range(bits):
            position = i * bits + b
            stream[position // 8] |= (code >> b & 1) << position % 8
    return bytes(stream)


def dequantize_palette(
    codes: npt.NDArray[Any],
    lut: npt.NDArray[Any],
    axis: int,
    rows_per_lut: int | None,
    scale: npt.NDArray[Any] | None,
) -> npt.NDArray[np.float32]:
    """Dequantize each element separately; its output channel selects the table and the scale."""
    values = np.empty(codes.shape, np.float32)
    for index in np.ndindex(*codes.shape):
        channel = index[axis] if index else 0
        group = 0 if rows_per_lut is None else channel // rows_per_lut
        value = lut[group, codes[index]]
        values[index] = value if scale is None else np.float32(value) * np.float32(scale[channel])
    return values


def dequantize_uniform(
    codes: npt.NDArray[Any],
    scale: npt.NDArray[Any],
    zero_point: npt.NDArray[Any] | None,
    axis: int | None,
    block_size: int | None,
) -> npt.NDArray[np.float32]:
    """Dequantize each element separately; its index along the axis selects the scale and the zero point."""
    values = np.empty(codes.shape, np.float32)
    for index in np.ndindex(*codes.shape):
        place: Any = ()
        if axis is not None and block_size is None:
            place = index[axis]
        elif axis is not None and block_size is not None:
            place = (*index[:axis], index[axis] // block_size, *index[axis + 1 :])
        zero = 0 if zero_point is None else int(zero_point[place])
        values[index] = np.float32(int(codes[index]) - zero) * np.float32(scale[place])
    return values


def nearest(value: float, lut: Sequence[float]) -> int:
    """Return the index of the nearest entry, computed in exact fractions; the lower one of two equally near entries."""
    distances = [abs(Fraction(value) - Fraction(entry)) for entry in lut]
    return distances.index(min(distances))


def best_squared_error(values: Sequence[float], k: int) -> float:
    """Return the least total squared distance of sorted values to k means, found by trying every split."""

    def error(run: Sequence[float]) -> float:
        mean = sum(run) / len(run)
        return sum((x - mean) ** 2 for x in run)

    ordered = sorted(values)
    n = len(ordered)
    splits = ((0, *cut, n) for cut in combinations(range(1, n), min(k, n) - 1))
    return min(sum(error(ordered[i:j]) for i, j in pairwise(s)) for s in splits)


def nearest_vector(
    vector: Sequence[float], lut: Sequence[Sequence[float]], masses: Sequence[float] | None = None
) -> int:
    """Return the index of the nearest entry, computed in exact fractions; the first one of equally near entries."""
    weighed = [Fraction(mass) for mass in masses] if masses is not None else [Fraction(1)] * len(vector)
    distances = [
        sum(m * (Fraction(x) - Fraction(c)) ** 2 for m, x, c in zip(weighed, vector, entry, strict=True))
        for entry in lut
    ]
    return distances.index(min(distances))


def lloyd(vectors_VD: npt.NDArray[np.float64], k: int, seed: int, steps: int = 60) -> float:
    """Return the squared error of plain k-means that starts from k random vectors."""
    lut_KD = vectors_VD[np.random.default_rng(seed).choice(len(vectors_VD), k, replace=False)]
    for _ in range(steps):
        squared_VK = ((vectors_VD[:, None] - lut_KD) ** 2).sum(axis=2)
        codes = squared_VK.argmin(axis=1)
        lut_KD = np.array([vectors_VD[codes == i].mean(axis=0) if (codes == i).any() else lut_KD[i] for i in range(k)])
    return float(((vectors_VD[:, None] - lut_KD) ** 2).sum(axis=2).min(axis=1).sum())


# Post-hoc activation grids, computed from the samples in float64.


def affine_error(values: npt.NDArray[Any], scale: float, zero_point: int, levels: int) -> float:
    """Return Σ(x_hat - x)² of an affine grid of unsigned codes."""
    x = np.asarray(values, np.float64)
    codes = np.clip(np.rint(x / scale) + zero_point, 0, levels)
    return float((((codes - zero_point) * scale - x) ** 2).sum())


def best_affine_error(values: npt.NDArray[Any], levels: int, steps: int) -> float:
    """Return the least Σ(x_hat - x)² over all pairs of `steps` shares of the range on each side of 0."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    shares = np.arange(1, steps + 1) / steps
    best = np.inf
    for a in shares * low if low else [0.0]:
        for b in shares * high if high else [0.0]:
            scale = (b - a) / levels
            best = min(best, affine_error(values, scale, round(-a / scale), levels))
    return best


def entropy_divergences(values: npt.NDArray[Any], groups: int, bins: int) -> dict[int, float]:
    """Return KL(P‖Q) by the threshold in bins, as in Migacz 2017, one threshold and one group at a time."""
    x = np.asarray(values, np.float64)
    width = np.abs(x).max() / bins
    edges = np.arange(bins + 1) * width
    below, above = np.histogram(-x[x < 0], edges)[0], np.histogram(x[x > 0], edges)[0]
    used_below, used_above = (int(np.flatnonzero(side).max(initial=-1)) + 1 for side in (below, above))
    divergences = {}
    for i in range(1, bins + 1):
        n_below, n_above = min(i, used_below), min(i, used_above)
        inside = [*below[:n_below][::-1].tolist(), *above[:n_above].tolist()]
        n = len(inside)
        if n < groups:
            continue
        p = [float(count) for count in inside]
        p[0] += below[n_below:].sum()
        p[-1] += above[n_above:].sum()
        group_of = [j * groups // n for j in range(n)]
        total, used = [0] * groups, [0] * groups
        for j, group in enumerate(group_of):
            total[group] += inside[j]
            used[group] += p[j] > 0
        kept = [j for j in range(n) if p[j] > 0]
        if any(total[group_of[j]] == 0 for j in kept):
            divergences[i] = np.inf
        else:
            p_kept = np.array([p[j] for j in kept])
            q_kept = np.array([total[group_of[j]] / used[group_of[j]] for j in kept])
            p_kept, q_kept = p_kept / p_kept.sum(), q_kept / q_kept.sum()
            divergences[i] = float((p_kept * np.log(p_kept / q_kept)).sum())
    return divergences


# Weights on integer grids, computed element by element in float64 and in exact fractions.


def round_uniform(
    weight: npt.NDArray[Any], largest: int, axis: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return codes and scales (0-d without an axis); the largest magnitude gets the largest code, ties go to even."""
    magnitude = np.zeros(() if axis is None else weight.shape[axis], np.float32)
    for index in np.ndindex(*weight.shape):
        channel: Any = () if axis is None else index[axis]
        magnitude[channel] = max(magnitude[channel], abs(weight[index]))
    scale = np.where(magnitude > 0, magnitude / np.float32(largest), np.float32(1)).astype(np.float32)
    codes = np.empty(weight.shape, np.int64)
    for index in np.ndindex(*weight.shape):
        channel = () if axis is None else index[axis]
        codes[index] = round(float(weight[index]) / float(scale[channel]))
    return codes, scale


def best_integer_error(values: Sequence[float], masses: Sequence[float], k: int, largest: int) -> float:
    """Return the least total squared distance of values to k integers in [-largest, largest], by trying all choices."""

    def error(chosen: Sequence[int]) -> float:
        return sum(m * min((v - c) ** 2 for c in chosen) for v, m in zip(values, masses, strict=True))

    return min(error(chosen) for chosen in combinations(range(-largest, largest + 1), k))


def gptq(weights_K, hessian_KK, levels_KL, damping):
    """Run GPTQ with activation order: after each rounding, the weights that are still free move to their optimum."""
    hessian = hessian_KK + damping * np.mean(np.diag(hessian_KK)) * np.eye(len(weights_K))
    now, free, codes = weights_K.astype(np.float64).copy(), list(range(len(weights_K))), np.zeros(len(weights_K), int)
    for j in sorted(free, key=lambda k: -hessian[k, k]):
        codes[j] = np.argmin(np.abs(levels_KL[j] - now[j]))
        error = now[j] - levels_KL[j, codes[j]]
        free.remove(j)
        if free:  # minimise over the free weights: H_ff d = H_fj error
            now[free] += np.linalg.solve(hessian[np.ix_(free, free)], hessian[free, j] * error)
    return codes
