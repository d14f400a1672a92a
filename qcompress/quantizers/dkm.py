"""DKM: differentiable k-means. Weights are pulled towards centroids, softly at first, and end as a palette.

Source: Cho et al., "DKM: differentiable k-means clustering layer for neural network compression", ICLR 2022, section 3:
A = softmax(-distance / τ), c = AᵀW / ΣA, repeated; the layer uses A·c. As used by Kundu et al., "R²", at b bits and d
dimensions.
Code: written from the paper; no code copied.
Deviations: the distance is the squared one unless metric="euclidean" (the paper leaves it open). By default τ is a
multiple of the mean squared distance between neighbouring centroids, so that it means the same for every layer and
width, and falls during training. Iterations that bring centroids to their soft fixed point run without gradient, and
not in every step. A centroid with next to no attention keeps its place.

Shape suffixes: V = vectors of all groups, G = groups, K = centroids, D = vector_dim.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, final, get_args

import numpy as np
import torch
from torch import Tensor

from qcompress.artifacts import Artifact, PalettizedWeight, granularity
from qcompress.artifacts.packing import check_bits, packed_nbytes
from qcompress.errors import ConfigError
from qcompress.graph.conversion import to_numpy
from qcompress.palettes.scalar import palettize
from qcompress.palettes.vector import palettize_vectors
from qcompress.plan.fields import LutDtype
from qcompress.quantizers.base import AbstractQuantizer, one_tensor
from qcompress.quantizers.soft_kmeans.bins import joined, table
from qcompress.quantizers.soft_kmeans.dense import Metric
from qcompress.quantizers.soft_kmeans.forms import Exact, Form, exact_form, soft, table_for
from qcompress.quantizers.soft_kmeans.function import DIMS, DRIFT, choose_form, dkm
from qcompress.quantizers.soft_kmeans.groups import Groups
from qcompress.quantizers.soft_kmeans.hard import assigned, stored
from qcompress.quantizers.soft_kmeans.table import Table, TableSpec
from qcompress.quantizers.ste import straight_through

__all__ = ["Dkm", "choose_form", "dkm"]

_FLOOR: Final = 1e-6  # τ is at least that of weights which spread over this share of their size
_TINY: Final = 1e-30
_ROUNDS, _ITERATIONS = 8, 8  # towards the soft fixed point
_FALLEN: Final = 0.9  # τ over that of the last choice of the form, at which it is chosen again
_SETTLED: Final = 1e-4  # ε of the paper, in standard deviations


@final
class Dkm(AbstractQuantizer):
    """Quantizes a weight with DKM: in training softly, in evaluation with the palette that is stored.

    τ falls geometrically from `tau[0]` to `tau[1]` as training goes on; `advance` tells how far it is.

    Args:
        bits: width of a code, 1 to 8: each palette has K = 2**bits entries.
        axis: the weight's axis that counts output channels.
        channels: the number of output channels.
        rows_per_lut: output channels that share a palette; None: all of them.
        vector_dim: D, weights per code: 1, 2, 4 or 8.
        lut_dtype: type of palette entries; int8 ones are multiplied by a scale.
        tau: first and last τ, in units of the weight's variance · D · K^(-2 / D), which is about the squared distance
            between neighbouring centroids (its root, with metric="euclidean").
        absolute: whether `tau` is τ itself, as in publications.
        hold: share of training, at its end, in which τ stays: with palettes of two entries, weights halfway between
            them serve as a third, and so training makes up for its loss. It leaves less time to train softly.
        iterations: differentiated iterations in each step.
        metric: "squared" or "euclidean".
        every: steps after which τ and the form are chosen again; they are, too, when τ has fallen by a tenth.

    Raises:
        ConfigError: an argument is invalid.

    >>> quantizer = Dkm(bits=1)
    >>> quantizer.initialise(torch.tensor([[0.0, 0.1, 0.9, 1.0]]))
    >>> quantizer.eval()(torch.tensor([[0.0, 0.1, 0.9, 1.0]])).round(decimals=2).tolist()
    [[0.05000000074505806, 0.05000000074505806, 0.949999988079071, 0.949999988079071]]
    """

    centroids: Tensor
    tau: Tensor

    def __init__(
        self,
        *,
        bits: int,
        axis: int = 0,
        channels: int = 1,
        rows_per_lut: int | None = None,
        vector_dim: int = 1,
        lut_dtype: LutDtype = "float32",
        tau: tuple[float, float] = (1.0, 0.05),
        absolute: bool = False,
        hold: float = 0.0,
        iterations: int = 3,
        metric: Metric = "squared",
        every: int = 16,
    ) -> None:
        super().__init__()
        check_bits(bits)
        if vector_dim not in DIMS:
            raise ConfigError(f"Dkm.vector_dim must be 1, 2, 4 or 8, got {vector_dim!r}.")
        if vector_dim > 1 and rows_per_lut is not None:
            raise ConfigError("Dkm: vectors have one palette for the whole weight; remove rows_per_lut or vector_dim.")
        if lut_dtype not in get_args(LutDtype):
            raise ConfigError(f"Dkm.lut_dtype must be one of {', '.join(get_args(LutDtype))}, got {lut_dtype!r}.")
        if metric not in get_args(Metric):
            raise ConfigError(f"Dkm.metric must be one of {', '.join(get_args(Metric))}, got {metric!r}.")
        if not isinstance(tau, Sequence) or len(tau) != 2 or not all(0 < value < math.inf for value in tau):
            raise ConfigError(f"Dkm.tau must be two positive numbers, the first and the last value, got {tau!r}.")
        if not 0 <= hold < 1:
            raise ConfigError(f"Dkm.hold must be a share of training below 1, got {hold!r}.")
        if iterations < 1 or every < 1:
            raise ConfigError(f"Dkm.iterations and Dkm.every must be at least 1, got {iterations!r} and {every!r}.")
        self.bits, self.axis, self.rows_per_lut, self.vector_dim = bits, axis, rows_per_lut, vector_dim
        self.lut_dtype, self.schedule, self.absolute, self.metric = lut_dtype, tau, absolute, metric
        self.iterations, self.every = iterations, every
        self.hold = hold
        groups = granularity.lut_groups(channels, rows_per_lut)
        self.register_buffer("centroids", torch.zeros(groups, 1 << bits, vector_dim))
        self.register_buffer("tau", torch.ones(groups, dtype=torch.float64))
        self._form: Form | None = None
        self._is_settled = False
        self._steps, self._done, self._chosen_at = 0, 0.0, 0.0
        self._joint: tuple[list[Table], Table] | None = None  # the tables of several quantizers, and theirs in one

    def forward(self, x: Tensor) -> Tensor:
        """Returns the soft weight, and moves the centroids; in evaluation the stored weight, straight through."""
        groups = self._groups(x)
        if not self.training:
            return straight_through(x, groups.join(self._stored_vectors(x)).to(x.dtype))
        x_VD = groups.split(x)
        form = self._chosen(x_VD, groups)
        out_VD, moved_GKD = soft(x_VD, self.centroids, self.tau, groups.lengths, self.iterations, self.metric, form)
        with torch.no_grad():
            self.centroids.copy_(moved_GKD)
        return groups.join(out_VD)

    @classmethod
    def together(cls, quantizers: Sequence["Dkm"], weights: Sequence[Tensor]) -> list[Tensor]:
        """Returns the quantized weights; those in tabulated form with as many centroids are computed in one go."""
        found: dict[int, Tensor] = {}
        batches: dict[tuple[int, int, torch.dtype], list[int]] = {}
        for i, (quantizer, weight) in enumerate(zip(quantizers, weights, strict=True)):
            if quantizer.training and quantizer._is_tabulated(weight):
                batches.setdefault((quantizer.bits, quantizer.iterations, weight.dtype), []).append(i)
            else:
                found[i] = quantizer(weight)
        for members in batches.values():
            outs = _soft_together([quantizers[i] for i in members], [weights[i] for i in members])
            found.update(zip(members, outs, strict=True))
        return [found[i] for i in range(len(found))]

    @torch.no_grad()
    def initialise(self, values: Tensor | Sequence[Tensor]) -> None:
        """Sets the centroids to those of k-means, and τ to its first value."""
        weight = one_tensor(values)
        array = to_numpy(weight.float())
        if self.vector_dim > 1:
            lut = palettize_vectors(array, self.bits, self.vector_dim, self.axis).lut
        else:
            lut = palettize(array, self.bits, self.rows_per_lut, self.axis).lut[..., None]
        missing = self.centroids.shape[1] - lut.shape[1]
        filled = np.pad(lut.astype(np.float32), ((0, 0), (0, missing), (0, 0)), mode="edge")
        self.centroids.copy_(torch.from_numpy(filled))
        self._form, self._is_settled = None, False
        self._steps, self._done, self._chosen_at = 0, 0.0, 0.0
        self._set_tau(self._groups(weight).split(weight))

    def advance(self, done: float) -> None:
        """Lets τ fall; after some steps, makes the next one choose the form again."""
        self._done = done
        if self._steps >= self.every or self._scheduled(done) < _FALLEN * self._scheduled(self._chosen_at):
            self._form = None
        self._steps += 1

    def get_extra_state(self) -> dict[str, Any]:
        """Returns how far the schedule is and the form, for the state dict; JSON can hold it."""
        form = self._form
        kind: Any = form.made_from.as_dict() if isinstance(form, Table) and form.made_from is not None else None
        if isinstance(form, Exact):
            kind = [form.kind, str(form.dtype).removeprefix("torch.")]
        return {
            "form": kind,
            "is_settled": self._is_settled,
            "steps": self._steps,
            "done": self._done,
            "chosen_at": self._chosen_at,
        }

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `get_extra_state` returned."""
        kind, self._joint = state["form"], None
        if isinstance(kind, Mapping):
            self._form = table(TableSpec.from_dict(kind, self.centroids.device))
        else:
            self._form = None if kind is None else Exact(kind[0], getattr(torch, kind[1]))
        self._is_settled, self._steps = state["is_settled"], state["steps"]
        self._done, self._chosen_at = state["done"], state["chosen_at"]

    @torch.no_grad()
    def drop(self, weight: Tensor) -> float:
        """Returns the distance of the soft weight from the one that is stored, over the size of the soft weight."""
        groups = self._groups(weight)
        x_VD = groups.split(weight)
        form = exact_form(x_VD, self.centroids, self.tau, groups.lengths, self.metric)
        soft_VD, _ = soft(x_VD, self.centroids, self.tau, groups.lengths, 1, self.metric, form)
        return float((soft_VD - self._stored_vectors(weight)).norm() / soft_VD.norm().clamp_min(_TINY))

    def remark(self, artifact: Artifact) -> str | None:
        """Returns that the palettes take more bytes than the codes, if they do."""
        codes_nbytes = packed_nbytes(-(-math.prod(artifact.shape) // self.vector_dim), self.bits)
        lut_nbytes = artifact.nbytes - codes_nbytes
        if lut_nbytes <= codes_nbytes:
            return None
        return (
            f"its palette takes {lut_nbytes:,} bytes and its codes {codes_nbytes:,}; fewer bits, a smaller vector_dim "
            'or lut_dtype = "float16" make it smaller'
        )

    def weight_artifact(self, weight: Tensor) -> Artifact:
        """Returns each weight's nearest entry, and palettes whose entries are the means of their weights."""
        groups, codes_V, lut_GKD, scale = self._parts(weight.float())
        is_scalar = self.vector_dim == 1
        codes = codes_V.to(torch.uint8)
        return PalettizedWeight(
            codes=to_numpy(groups.join(codes[:, None]).contiguous() if is_scalar else codes),
            lut=to_numpy(lut_GKD.squeeze(2) if is_scalar else lut_GKD).copy(),
            bits=self.bits,
            axis=self.axis % max(1, weight.ndim),
            rows_per_lut=self.rows_per_lut,
            scale=None if scale is None else to_numpy(scale).copy(),
            weight_shape=None if is_scalar else tuple(weight.shape),
        )

    def _groups(self, weight: Tensor) -> Groups:
        return Groups.of(weight.shape, self.rows_per_lut, self.vector_dim, self.axis)

    def _parts(self, weight: Tensor) -> tuple[Groups, Tensor, Tensor, Tensor | None]:
        """Returns the groups of a weight, and what is stored: codes [V], palettes [G, K, D] and their scale."""
        groups = self._groups(weight)
        codes_V, lut_GKD = assigned(groups.split(weight.detach()), self.centroids, groups.lengths)
        return groups, codes_V, *stored(lut_GKD, self.lut_dtype)

    def _stored_vectors(self, weight: Tensor) -> Tensor:
        """Returns the vectors [V, D] that the stored weight decodes to."""
        groups, codes_V, lut_GKD, scale = self._parts(weight)
        parts = zip(torch.split(codes_V, list(groups.lengths)), lut_GKD.float(), strict=True)
        found_VD = torch.cat([lut_KD[codes] for codes, lut_KD in parts])
        return found_VD if scale is None else found_VD * scale

    def _is_tabulated(self, weight: Tensor) -> bool:
        groups = self._groups(weight)
        return isinstance(self._chosen(groups.split(weight), groups), Table)

    @torch.no_grad()
    def _chosen(self, x_VD: Tensor, groups: Groups) -> Form:
        """Returns the form; if it has to be chosen again, sets τ first."""
        form = self._form
        if form is None or (isinstance(form, Table) and form.edges.device != x_VD.device):
            x_VD = x_VD.detach()
            self._set_tau(x_VD)
            if not self._is_settled:
                self._settle(x_VD, groups)
            form = self._form = self._form_for(x_VD, groups)
            self._steps, self._chosen_at = 0, self._done
        return form

    def _settle(self, x_VD: Tensor, groups: Groups) -> None:
        """Moves the centroids to their soft fixed point; afterwards, the iterations of each step keep them there."""
        enough = _SETTLED * float(x_VD.double().std(correction=0))
        for _ in range(_ROUNDS):
            form, before = self._form_for(x_VD, groups), self.centroids.double()
            moved = self._moved(x_VD, groups, form, _ITERATIONS if isinstance(form, Table) else self.iterations)
            if isinstance(form, Table) and not form.fits(moved.squeeze(2)):
                moved = self._moved(x_VD, groups, form, 1)
            self.centroids.copy_(moved)
            if (moved - before).abs().max() <= enough:
                break
        self._is_settled = True

    def _form_for(self, x_VD: Tensor, groups: Groups) -> Form:
        found = None
        if self.vector_dim == 1 and self.metric == "squared":
            found = table_for(x_VD, self.centroids, self.tau, groups.lengths, self.iterations, DRIFT)
        return found or exact_form(x_VD, self.centroids, self.tau, groups.lengths, self.metric)

    def _moved(self, x_VD: Tensor, groups: Groups, form: Form, iterations: int) -> Tensor:
        return soft(x_VD, self.centroids, self.tau, groups.lengths, iterations, self.metric, form)[1]

    def _scheduled(self, done: float) -> float:
        first, last = self.schedule
        return float(first * (last / first) ** min(1.0, done / (1 - self.hold)))

    def _set_tau(self, x_VD: Tensor) -> None:
        value: float | Tensor = self._scheduled(self._done)
        if not self.absolute:
            x = x_VD.double()
            least = (_FLOOR * x.square().mean().sqrt()).clamp_min(_TINY)
            spread = x.var(correction=0).clamp_min(least.square()) * self.vector_dim
            value = value * spread * self.centroids.shape[1] ** (-2 / self.vector_dim)
            value = value**0.5 if self.metric == "euclidean" else value
        self.tau.copy_(torch.as_tensor(value))


def _soft_together(quantizers: Sequence[Dkm], weights: Sequence[Tensor]) -> list[Tensor]:
    """Returns the soft weights of quantizers in tabulated form with the same K and T, and moves their centroids."""
    if len(quantizers) == 1:
        return [quantizers[0](weights[0])]
    groups = [quantizer._groups(weight) for quantizer, weight in zip(quantizers, weights, strict=True)]
    first, tables = quantizers[0], [quantizer._form for quantizer in quantizers if isinstance(quantizer._form, Table)]
    if first._joint is None or [*map(id, first._joint[0])] != [*map(id, tables)]:
        first._joint = tables, joined(tables, [group.lengths for group in groups])
    x_VD = torch.cat([group.split(weight) for group, weight in zip(groups, weights, strict=True)])
    c_GKD = torch.cat([quantizer.centroids for quantizer in quantizers])
    tau_G = torch.cat([quantizer.tau for quantizer in quantizers])
    lengths = [length for group in groups for length in group.lengths]
    out_VD, moved_GKD = soft(x_VD, c_GKD, tau_G, lengths, first.iterations, first.metric, first._joint[1])
    with torch.no_grad():
        torch._foreach_copy_(
            [quantizer.centroids for quantizer in quantizers],
            list(torch.split(moved_GKD, [len(quantizer.centroids) for quantizer in quantizers])),
        )
    outs = torch.split(out_VD, [sum(group.lengths) for group in groups])
    return [group.join(out) for group, out in zip(groups, outs, strict=True)]
