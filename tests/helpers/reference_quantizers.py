"""Computes quantizers and penalties as the papers define them, one element at a time in float64.

Every function takes the arguments of its namesake as arrays. Quantizers also take g, the gradient of a loss with
respect to the output; for penalties, the loss is the output. They return the output and the gradients by name.
"""

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Answer = tuple[Array, dict[str, Array]]


def _each(x, scale, *more):
    """Yields the index of each element, its value, and the index of its element in each broadcast array."""
    for index in np.ndindex(*x.shape):
        places = [
            tuple(0 if size == 1 else i for i, size in zip(index[len(index) - a.ndim :], a.shape, strict=True))
            for a in (scale, *more)
        ]
        yield index, x[index], *places


def lsq(x, scale, qmin, qmax, g) -> Answer:
    """Computes (1) to (4) of bin regularization's section 3.1."""
    out, gx, gs = np.empty_like(x), np.zeros_like(x), np.zeros_like(scale)
    for i, value, s in _each(x, scale):
        v = value / scale[s]
        out[i] = round(min(max(v, qmin), qmax)) * scale[s]
        if v <= qmin:
            gs[s] += g[i] * qmin
        elif v >= qmax:
            gs[s] += g[i] * qmax
        else:
            gx[i] = g[i]
            gs[s] += g[i] * (round(v) - v)
    return out, {"x": gx, "scale": gs}


def lsq_plus(x, scale, offset, qmin, qmax, g) -> Answer:
    """Computes (2) to (4) of LSQ+."""
    out, gx, gs, gb = np.empty_like(x), np.zeros_like(x), np.zeros_like(scale), np.zeros_like(offset)
    for i, value, s, b in _each(x, scale, offset):
        v = (value - offset[b]) / scale[s]
        code = round(min(max(v, qmin), qmax))
        out[i] = code * scale[s] + offset[b]
        if qmin < v < qmax:
            gx[i] = g[i]
            gs[s] += g[i] * (code - v)
        else:
            gs[s] += g[i] * code
            gb[b] += g[i]
    return out, {"x": gx, "scale": gs, "offset": gb}


def pact(x, alpha, bits, g) -> Answer:
    """Computes (1) and (2) of BMPQ."""
    levels = 2**bits - 1
    out, gx, ga = np.empty_like(x), np.zeros_like(x), np.zeros_like(alpha)
    for i, value, a in _each(x, alpha):
        clipped = 0.5 * (abs(value) - abs(value - alpha[a]) + alpha[a])
        out[i] = round(clipped * levels / alpha[a]) * alpha[a] / levels
        gx[i] = g[i] if 0 < value < alpha[a] else 0
        ga[a] += g[i] if value >= alpha[a] else 0
    return out, {"x": gx, "alpha": ga}


def dorefa_weight(w, bits, g) -> Answer:
    levels, largest = 2**bits - 1, max(abs(math.tanh(v)) for v in w.ravel()) or 1.0
    out, gw = np.empty_like(w), np.zeros_like(w)
    for i in np.ndindex(*w.shape):
        unit = math.tanh(w[i]) / (2 * largest) + 0.5
        out[i] = 2 * round(unit * levels) / levels - 1
        gw[i] = g[i] * (1 - math.tanh(w[i]) ** 2) / largest
    return out, {"w": gw}


def ewgs(x, scale, qmin, qmax, delta, g) -> Answer:
    out, grads = lsq(x, scale, qmin, qmax, g)
    for i, value, s in _each(x, scale):
        v = value / scale[s]
        grads["x"][i] *= 1 + delta * np.sign(g[i]) * (v - round(v))
    return out, grads


def tqt(x, log2_scale, qmin, qmax, g) -> Answer:
    scale = np.array([2.0 ** math.ceil(v) for v in log2_scale.ravel()]).reshape(log2_scale.shape)
    out, grads = lsq(x, scale, qmin, qmax, g)
    return out, {"x": grads["x"], "log2_scale": grads["scale"] * scale * math.log(2)}


def ternary(w, g) -> Answer:
    sizes = [abs(v) for v in w.ravel()]
    above = [v for v in sizes if v > 0.7 * sum(sizes) / len(sizes)]
    alpha = sum(above) / len(above) if above else 0.0
    out = np.array([np.sign(v) * alpha if abs(v) > 0.7 * sum(sizes) / len(sizes) else 0.0 for v in w.ravel()])
    return out.reshape(w.shape), {"w": g.copy()}


def bmpq(w, bits, g) -> Answer:
    """Computes (3) and (4) of BMPQ."""
    scale = max(abs(v) for v in w.ravel()) / (2 ** (bits - 1) - 1) or 1.0
    return np.array([round(v / scale) * scale for v in w.ravel()]).reshape(w.shape), {"w": g.copy()}


def n2uq_activation(x, start, intervals, input_scale, output_scale, g) -> Answer:
    """Computes (11) to (13) of N2UQ."""
    count, s, b1, b2 = len(intervals), float(start), float(input_scale), float(output_scale)
    edges = [s]
    for a in intervals:
        edges.append(edges[-1] + float(a))
    level = b2 * 2 / count
    out, gx, ga = np.empty_like(x), np.zeros_like(x), np.zeros_like(intervals)
    gs = g1 = g2 = 0.0
    for i in np.ndindex(*x.shape):
        z = b1 * x[i]
        code = sum(z >= edges[j] + float(intervals[j]) / 2 for j in range(count))
        out[i] = level * code
        g2 += g[i] * 2 / count * code
        for j in range(count):
            if edges[j] <= z < edges[j + 1]:
                a = float(intervals[j])
                gx[i] = g[i] * level * b1 / a
                g1 += g[i] * level * x[i] / a
                gs -= g[i] * level / a
                ga[j] -= g[i] * level * (z - edges[j]) / a**2
                for earlier in range(j):
                    ga[earlier] -= g[i] * level / a
    grads = {"x": gx, "start": gs, "intervals": ga, "input_scale": g1, "output_scale": g2}
    return out, {name: np.asarray(value) for name, value in grads.items()}


def n2uq_weight(w, bits, mask, g) -> Answer:
    levels, gamma = 2**bits - 1, (2**bits - 1) / 2 ** (bits - 1)
    out, gw = np.empty_like(w), np.zeros_like(w)
    for o in range(len(w)):
        scale = gamma * sum(abs(v) for v in w[o].ravel()) / w[o].size
        for r in np.ndindex(*w[o].shape):
            unit = w[o][r] / scale if scale else 0.0
            code = round((min(max(unit, -1), 1) + 1) * levels / 2)
            out[o][r] = (code * 2 / levels - 1) * scale
            gw[o][r] = (g[o][r] if abs(unit) < 1 else 0) if mask else g[o][r] / (scale or 1)
    return out, {"w": gw}


# Penalties.


def _dimensions(w, dim) -> list[list[tuple[int, float]]]:
    """Returns (index in the flat weight, value) of the elements of each dimension; the last element pads."""
    flat = [*enumerate(float(v) for v in w.ravel())]
    while len(flat) % dim:
        flat.append(flat[w.size - 1])
    return [flat[d::dim] for d in range(dim)]


def linf(w, dim) -> Answer:
    total, gw = 0.0, np.zeros(w.size)
    for elements in _dimensions(w, dim):
        largest = max(abs(v) for _, v in elements)
        total += largest
        reached = [(k, v) for k, v in elements if abs(v) == largest]
        for k, v in reached:
            gw[k] += np.sign(v) / len(reached)
    return np.asarray(total), {"w": gw.reshape(w.shape)}


def margin(w, m, dim) -> Answer:
    total, gw, gm = 0.0, np.zeros(w.size), 0.0
    for elements in _dimensions(w, dim):
        total += abs(float(m))
        gm += np.sign(m)
        for k, v in elements:
            if abs(v) > abs(float(m)):
                total += abs(v) - abs(float(m))
                gw[k] += np.sign(v)
                gm -= np.sign(m)
    return np.asarray(total), {"w": gw.reshape(w.shape), "m": np.asarray(gm)}


def soft_min_max(w, alpha, dim, relative) -> Answer:
    mean = sum(float(v) for v in w.ravel()) / w.size
    sigma = math.sqrt(sum((float(v) - mean) ** 2 for v in w.ravel()) / w.size) if relative else 1.0
    sigma = sigma or 1.0
    a, total, gw, ga = float(alpha) / sigma, 0.0, np.zeros(w.size), 0.0
    for elements in _dimensions(w, dim):
        values = [v for _, v in elements]
        for sign, extreme in ((1, max(values)), (-1, min(values))):
            powers = [math.exp(sign * a * (v - extreme)) for v in values]
            mean = sum(p * v for p, v in zip(powers, values, strict=True)) / sum(powers)
            square = sum(p * v * v for p, v in zip(powers, values, strict=True)) / sum(powers)
            total += sign * mean
            ga += (square - mean**2) / sigma  # sign²
            for (k, v), p in zip(elements, powers, strict=True):
                gw[k] += sign * p / sum(powers) * (1 + sign * a * (v - mean))
        total += math.exp(-float(alpha))
        ga -= math.exp(-float(alpha))
    return np.asarray(total), {"w": gw.reshape(w.shape), "alpha": np.asarray(ga)}


def bin_regularization(w, scale, bits, detach_targets) -> Answer:
    """Computes (5) and (6) of bin regularization, one bin of one scale after the other; the mean over scales."""
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    total, gw, gs = 0.0, np.zeros_like(w), np.zeros_like(scale)
    bins: dict[Any, list[Any]] = {}
    for i, value, s in _each(w, scale):
        bins.setdefault((s, round(min(max(value / scale[s], qmin), qmax))), []).append((i, value))
    for (s, code), elements in bins.items():
        values, target = [v for _, v in elements], code * scale[s]
        mean = sum(values) / len(values)
        total += (mean - target) ** 2
        if len(values) > 1:
            total += sum((v - mean) ** 2 for v in values) / len(values)
        for i, v in elements:
            gw[i] += 2 * (mean - target) / len(values)
            gw[i] += 2 * (v - mean) / len(values) if len(values) > 1 else 0
        if not detach_targets:
            gs[s] -= 2 * (mean - target) * code
    return np.asarray(total / scale.size), {"w": gw / scale.size, "scale": gs / scale.size}


def kurtosis(w, target) -> Answer:
    values = [float(v) for v in w.ravel()]
    n, mean = len(values), sum(values) / len(values)
    m2, m3, m4 = (sum((v - mean) ** k for v in values) / n for k in (2, 3, 4))
    k = m4 / m2**2
    by_value = [(4 * ((v - mean) ** 3 - m3) / m2**2 - 4 * (v - mean) * m4 / m2**3) / n for v in values]
    return np.asarray((k - target) ** 2), {"w": 2 * (k - target) * np.array(by_value).reshape(w.shape)}


def l2(w, w_hat) -> Answer:
    total, gw = 0.0, np.zeros_like(w)
    for i in np.ndindex(*w.shape):
        total += (w[i] - w_hat[i]) ** 2 / w.size
        gw[i] = 2 * (w[i] - w_hat[i]) / w.size
    return np.asarray(total), {"w": gw}


def kl(w, w_hat) -> Answer:
    p = [math.exp(v - w.max()) for v in w.ravel()]
    q = [math.exp(v - w_hat.max()) for v in w_hat.ravel()]
    p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
    total = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return np.asarray(total), {
        "w": np.array([a * (math.log(a / b) - total) for a, b in zip(p, q, strict=True)]).reshape(w.shape)
    }
