"""Computes differentiable k-means one number at a time in float64, and its gradients by central differences."""

import math

import numpy as np


def dkm(x_GVD, c_GKD, tau_G, iterations, metric):
    """Returns the soft vectors and the last centroids."""
    groups = [_one_group(*group, iterations, metric) for group in zip(x_GVD, c_GKD, tau_G, strict=True)]
    return np.array([soft for soft, _ in groups]), np.array([centroids for _, centroids in groups])


def gradients(x_GVD, c_GKD, tau_G, iterations, metric, g_GVD, gc_GKD, step=1e-6):
    """Returns the gradients of Σ soft · g + Σ centroids · gc by the vectors and by the first centroids."""

    def loss(x, c):
        soft, centroids = dkm(x, c, tau_G, iterations, metric)
        return (soft * g_GVD).sum() + (centroids * gc_GKD).sum()

    def by(values, loss_of):
        out = np.zeros_like(values)
        for index in np.ndindex(*values.shape):
            up, down = values.copy(), values.copy()
            up[index] += step
            down[index] -= step
            out[index] = (loss_of(up) - loss_of(down)) / (2 * step)
        return out

    return by(x_GVD, lambda x: loss(x, c_GKD)), by(c_GKD, lambda c: loss(x_GVD, c))


def _one_group(vectors, centroids, tau, iterations, metric):
    size = len(centroids[0])
    centroids = [list(c) for c in centroids]
    for _ in range(iterations):
        attention = [_softmax([-_distance(x, c, metric) / tau for c in centroids]) for x in vectors]
        for k in range(len(centroids)):
            total = sum(a[k] for a in attention)
            if total >= 1e-20 * len(vectors):
                sums = [sum(a[k] * x[d] for a, x in zip(attention, vectors, strict=True)) for d in range(size)]
                centroids[k] = [value / total for value in sums]
    soft = [[sum(a[k] * c[d] for k, c in enumerate(centroids)) for d in range(size)] for a in attention]
    return np.array(soft), np.array(centroids)


def _softmax(logits):
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


def _distance(x, c, metric):
    squared = sum((a - b) ** 2 for a, b in zip(x, c, strict=True))
    return squared if metric == "squared" else math.sqrt(squared)
