"""What the DKM benchmark compares: ours, coremltools' layer, textbook torch, and quantizers that round; one weight."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _common import quiet
from torch import Tensor

from qcompress.artifacts import granularity
from qcompress.quantizers import Dkm, Lsq, choose_form, dkm

PLACES = {"start": 0.0, "middle": 0.5, "end": 1.0}  # of the schedule of τ
ITERATIONS = 3
OURS, AUTO, COREML, TORCH, HARD, LSQ = "qcompress", 'form="auto"', "coremltools", "torch", "hard STE", "LSQ"

Step = Callable[[], Tensor]  # runs forward and backward, returns the soft weights


@dataclass(frozen=True)
class Case:
    """A weight, its palette, and how soft it is.

    Args:
        count: number of weights.
        centroids: K.
        dim: weights in a vector.
        place: key of PLACES.
        outliers: whether one weight in a thousand is eight times as large.
    """

    count: int
    centroids: int
    dim: int = 1
    place: str = "middle"
    outliers: bool = True

    def __str__(self) -> str:
        vectors = f", d={self.dim}" if self.dim > 1 else ""
        kind = "outliers" if self.outliers else "gaussian"
        return f"N={self.count:g}, K={self.centroids}{vectors}, {kind}, {self.place}"

    @property
    def attention(self) -> int:
        """Return the number of pairs of a vector and a centroid."""
        return self.count // self.dim * self.centroids

    def weight(self) -> Tensor:
        """Return weights from N(0, 0.05²), some of them multiplied by 8 if there are outliers, as a matrix."""
        generator = torch.Generator().manual_seed(0)
        weight = 0.05 * torch.randn(self.count, generator=generator)
        if self.outliers:
            weight[torch.randint(self.count, (self.count // 1000,), generator=generator)] *= 8
        return weight.view(-1, 1000)


@dataclass(frozen=True)
class Problem:
    """Input of one step.

    Args:
        weight: requires a gradient.
        gradient: that of the soft weights.
        centroids: k-means', moved to their soft fixed point; [K], or [K, D] for vectors.
        tau: τ.
    """

    weight: Tensor
    gradient: Tensor
    centroids: Tensor
    tau: float

    @classmethod
    def of(cls, case: Case, centroids: Tensor, tau: float) -> "Problem":
        """Return the problem of a case."""
        gradient = torch.randn(case.count // 1000, 1000, generator=torch.Generator().manual_seed(1))
        return cls(case.weight().requires_grad_(), gradient, centroids, tau)

    def step(self, quantize: Callable[[Tensor], Tensor]) -> Step:
        """Return a step of a quantizer."""

        def run() -> Tensor:
            self.weight.grad = None
            soft = quantize(self.weight)
            soft.backward(self.gradient)
            return soft.detach()

        return run


@dataclass(frozen=True)
class Tool:
    """One of the tools, and what a step of it is expected to need.

    Args:
        make: returns a step; its preparation is not measured.
        seconds: CPU seconds per vector and centroid.
        per_pair: bytes per vector and centroid.
        per_number: bytes per weight and centroid, in addition.
        per_weight: bytes per weight, in addition.
    """

    make: Callable[[Problem], Step]
    seconds: float = 0.0
    per_pair: float = 0.0
    per_number: float = 0.0
    per_weight: float = 0.0

    def expected_seconds(self, case: Case) -> float:
        """Return the time of a step."""
        return self.seconds * case.attention

    def expected_bytes(self, case: Case) -> float:
        """Return the memory of a step."""
        return (self.per_pair + self.per_number * case.dim) * case.attention + self.per_weight * case.count


@torch.no_grad()
def settled(case: Case) -> tuple[Tensor, float]:
    """Return centroids at their soft fixed point, and τ, as our quantizer has them at that place of its schedule."""
    weight = case.weight()
    quantizer = Dkm(bits=round(math.log2(case.centroids)), channels=len(weight), vector_dim=case.dim)
    quantizer.initialise(weight)
    quantizer.advance(PLACES[case.place])
    quantizer.train()(weight)
    return quantizer.centroids[0].squeeze(1).clone(), float(quantizer.tau)


def ours(problem: Problem) -> Step:
    """Return our step, with the form chosen before, as training does it."""
    form = choose_form(problem.weight.detach(), problem.centroids, problem.tau, ITERATIONS)
    return problem.step(lambda w: dkm(w, problem.centroids, problem.tau, ITERATIONS, form=form)[0])


def ours_auto(problem: Problem) -> Step:
    """Return our step, with the form chosen in each step."""
    return problem.step(lambda w: dkm(w, problem.centroids, problem.tau, ITERATIONS)[0])


def coreml(problem: Problem) -> Step:
    """Return a step of coremltools' DKMPalettizer, with the same start in place of its k-means, and no early stop."""
    with quiet():
        from coremltools.optimize.torch.palettization.fake_palettize import FakePalettize

        layer: Any = FakePalettize(
            torch.ao.quantization.MovingAverageMinMaxObserver.with_args(dtype=torch.qint8),
            n_bits=round(math.log2(len(problem.centroids))),
            cluster_dim=problem.centroids[0].numel(),
            advanced_options={"palett_tau": problem.tau, "kmeans_max_iter": ITERATIONS, "palett_epsilon": -1.0},
        )
        layer.enable_fake_palett()
        layer.create_partitions(problem.weight.detach())
    start = problem.centroids.view(len(problem.centroids), -1)

    def quantize(w: Tensor) -> Tensor:
        layer.centroids = [start]
        soft: Tensor = layer(w)
        return soft

    return problem.step(quantize)


def textbook(problem: Problem) -> Step:
    """Return a step of DKM as it is written down, with autograd."""
    start = problem.centroids.view(len(problem.centroids), -1)

    def quantize(w: Tensor) -> Tensor:
        vectors, c = granularity.vectors(w, start.shape[1]), start
        for _ in range(ITERATIONS):
            attention = torch.softmax(-(vectors[:, None] - c).pow(2).sum(-1) / problem.tau, 1)
            c = attention.T @ vectors / attention.sum(0)[:, None]
        return granularity.from_vectors(attention @ c, w.shape)

    return problem.step(quantize)


class _Nearest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, lut: Tensor) -> Tensor:
        codes = torch.bucketize(w, (lut[1:] + lut[:-1]) / 2, out_int32=True)
        return lut.index_select(0, codes.view(-1)).view_as(w)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.clone(), None


def hard(problem: Problem) -> Step:
    """Return a step that puts each weight at its nearest centroid, straight-through: the least that DKM can cost."""
    lut = problem.centroids.sort().values
    return problem.step(lambda w: _Nearest.apply(w, lut))


def lsq(problem: Problem) -> Step:
    """Return a step of our LSQ at as many bits."""
    quantizer = Lsq(bits=round(math.log2(len(problem.centroids))), role="weight")
    quantizer.initialise(problem.weight.detach())
    return problem.step(quantizer)


TOOLS = {
    OURS: Tool(ours),
    AUTO: Tool(ours_auto),
    COREML: Tool(coreml, seconds=2.5e-7, per_pair=48, per_weight=60),
    TORCH: Tool(textbook, seconds=1.5e-7, per_pair=20, per_number=20, per_weight=40),
    HARD: Tool(hard),
    LSQ: Tool(lsq),
}
