"""Codes, levels, scales and biases tuned together, without labels, so that the whole net does what the float net does.

What solving layer after layer cannot see, a code that is worse for its layer and better for the net, gradients can. A
weight is its level nearest to a latent value, and passes its gradient straight on to it; the loss is what the outputs
and the values behind activations differ from those of the float net.

Source: block reconstruction (BRECQ, Li et al. 2021) and straight-through estimation (Bengio et al. 2013).
Deviations: all blocks at once. Outputs alone, without the values in between, fit the calibration data four times as
well and new data no better.

Shape suffixes: O = output channels, K = weights of one output channel, T = tables, L = levels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch.fx import Node

from qcompress.artifacts import Artifact, FloatWeight, IntegerWeight, PalettizedWeight, granularity
from qcompress.graph.differentiable import Differentiable
from qcompress.graph.program import Arrays, FloatProgram
from qcompress.graph.tensors import to_numpy, to_torch
from qcompress.palettes.int8_palette import LARGEST
from qcompress.progress import Track, untracked

aten = torch.ops.aten

_STEPS: Final = 400
_RATE: Final = 1e-2  # of latent values, in steps between levels
_LEVEL_RATE: Final = 1e-3  # of levels, scales and biases, in parts of their size
_OUTPUTS: Final = 0.3  # of the loss; the rest is that of the values in between
_ACTIVATIONS: Final = (
    aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.leaky_relu.default,
    aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default, aten.elu.default,
)  # fmt: skip


def tune(
    program: FloatProgram,
    artifacts: Mapping[str, Artifact],
    batches: Sequence[Arrays],
    *,
    steps: int = _STEPS,
    device: str = "cpu",
    track: Track = untracked,
) -> dict[str, Artifact]:
    """Tune a compressed model on calibration inputs.

    Args:
        program: the float program, BatchNorm folded.
        artifacts: one for each tensor of its state; palettes, even grids without zero points and vectors of floats
            are tuned, palettes of vectors and all others stay.
        batches: calibration inputs by name.
        steps: of gradient descent.
        device: where the net runs.
        track: passes steps on: a progress bar.
    """
    inputs, net, start = _inputs(program, batches, device), _Net(program, device), _on(artifacts, device)
    places = {name: _place(artifact, program.state()[name], device) for name, artifact in artifacts.items()}
    trained = {name: place for name, place in places.items() if place is not None}
    if not trained:
        return dict(artifacts)
    optimizer = torch.optim.Adam(
        [
            {"params": [p for place in trained.values() for p in place.latents()], "lr": _RATE},
            {"params": [p for place in trained.values() for p in place.others()], "lr": _LEVEL_RATE},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator, order = torch.Generator().manual_seed(0), list[int]()
    for _ in track(range(steps), "tuning"):
        order = order or torch.randperm(len(inputs), generator=generator).tolist()
        optimizer.zero_grad()
        now = start | {name: place.value() for name, place in trained.items()}
        net.loss(now, inputs[order.pop()]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return dict(artifacts) | {name: place.artifact() for name, place in trained.items()}


def output_error(
    program: FloatProgram, artifacts: Mapping[str, Artifact], batches: Sequence[Arrays], *, device: str = "cpu"
) -> float:
    """Squared error of a compressed model's outputs over the variance of the float program's, mean over batches."""
    net, state = _Net(program, device), _on(artifacts, device)
    return float(np.mean([net.error(state, batch) for batch in _inputs(program, batches, device)]))


def _inputs(program: FloatProgram, batches: Sequence[Arrays], device: str) -> list[list[torch.Tensor]]:
    return [[to_torch(x).to(device) for x in program.bind(batch)] for batch in batches]


def _on(artifacts: Mapping[str, Artifact], device: str) -> dict[str, torch.Tensor]:
    return {name: to_torch(a.dequantize()).to(device) for name, a in artifacts.items()}


class _Net(Differentiable):
    """The float net and the compressed one on the same inputs, with the values behind their activations."""

    def __init__(self, program: FloatProgram, device: str) -> None:
        super().__init__(program)
        self._floats = {name: value.detach().to(device) for name, value in program.state().items()}
        self._seen: list[torch.Tensor] = []

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and n.target in _ACTIVATIONS:
            self._seen.append(value)
        return value

    def loss(self, state: Mapping[str, torch.Tensor], inputs: list[torch.Tensor]) -> torch.Tensor:
        """What gradients descend."""
        at_end, between = self._errors(state, inputs)
        return at_end if between is None else _OUTPUTS * at_end + (1 - _OUTPUTS) * between

    def error(self, state: Mapping[str, torch.Tensor], inputs: list[torch.Tensor]) -> float:
        """At the outputs alone."""
        with torch.no_grad():
            return float(self._errors(state, inputs)[0])

    def _errors(
        self, state: Mapping[str, torch.Tensor], inputs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Over variances: of the outputs, and of the values in between."""
        with torch.no_grad():
            wanted, between = self._run(self._floats, inputs)
        got, seen = self._run(state, inputs)
        at_end = [_over_variance(w, g) for w, g in zip(wanted, got, strict=True) if w.is_floating_point()]
        inside = [_over_variance(w, g) for w, g in zip(between, seen, strict=True)]
        return torch.stack(at_end).mean(), torch.stack(inside).mean() if inside else None

    def _run(
        self, state: Mapping[str, torch.Tensor], inputs: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        self._seen = []
        return self.outputs(state, inputs), self._seen


def _over_variance(wanted: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    return (got - wanted).square().mean() / wanted.var(correction=0).clamp_min(1e-12)


class _Bias:
    """A vector of floats."""

    def __init__(self, artifact: FloatWeight, device: str) -> None:
        self._artifact = artifact
        self._start = to_torch(artifact.values).to(device)
        self._moved = torch.zeros_like(self._start).requires_grad_()
        self._size = self._start.abs().mean().clamp_min(1e-3)

    def latents(self) -> list[torch.Tensor]:
        return []

    def others(self) -> list[torch.Tensor]:
        return [self._moved]

    def value(self) -> torch.Tensor:
        return self._start + self._size * self._moved

    def artifact(self) -> Artifact:
        return replace(self._artifact, values=to_numpy(self.value()))


class _Codes:
    """A weight on levels: a palette's entries, which move, or the integers of an even grid, which stay."""

    def __init__(self, artifact: PalettizedWeight | IntegerWeight, device: str) -> None:
        self._made = artifact
        self._axis, self._low, rows_per_lut = _output_axis(artifact), 0, None
        if isinstance(artifact, PalettizedWeight):
            lut, rows_per_lut = np.array(artifact.lut, np.float32), artifact.rows_per_lut
        else:
            self._low = -(1 << (artifact.bits - 1))
            lut = np.arange(self._low, -self._low, dtype=np.float32)[None]
        tables = granularity.group_of_row(artifact.shape[self._axis], rows_per_lut)
        codes_OK = granularity.rows(artifact.codes, self._axis).astype(np.int64) - self._low
        self._tables_O = to_torch(tables).to(device)
        self._lut_TL = to_torch(lut).to(device)
        self._size = self._lut_TL.abs().mean().clamp_min(1e-12)
        gaps = self._lut_TL.diff(dim=1)
        self._gap = gaps[gaps > 0].mean() if bool((gaps > 0).any()) else self._size
        self._block_size = artifact.block_size if isinstance(artifact, IntegerWeight) else None
        scale: Any = np.ones(1, np.float32) if artifact.scale is None else np.atleast_1d(artifact.scale)
        scale = granularity.rows(scale, self._axis) if self._block_size else scale[:, None]
        self._scale = to_torch(np.asarray(scale, np.float32)).to(device)
        start_OK = self._lut_TL[self._tables_O[:, None], to_torch(codes_OK).to(device)]
        self._latent = (start_OK / self._gap).requires_grad_()
        self._moved = torch.zeros_like(self._lut_TL).requires_grad_(isinstance(artifact, PalettizedWeight))
        self._grown = torch.zeros_like(self._scale).requires_grad_(artifact.scale is not None)

    def latents(self) -> list[torch.Tensor]:
        return [self._latent]

    def others(self) -> list[torch.Tensor]:
        return [p for p in (self._moved, self._grown) if p.requires_grad]

    def _levels(self) -> torch.Tensor:
        lut_TL = (self._lut_TL + self._size * self._moved).sort(dim=1).values
        return lut_TL + (self._stored(lut_TL) - lut_TL).detach()

    def _stored(self, lut_TL: torch.Tensor) -> torch.Tensor:
        """The nearest that the table's type can hold."""
        if not isinstance(self._made, PalettizedWeight) or self._made.lut.dtype == np.float32:
            return lut_TL
        return lut_TL.half().float() if self._made.lut.dtype == np.float16 else lut_TL.round().clamp(-LARGEST, LARGEST)

    def _nearest(self, lut_TL: torch.Tensor) -> torch.Tensor:
        levels_OL = lut_TL.detach()[self._tables_O]
        middles = ((levels_OL[:, 1:] + levels_OL[:, :-1]) / 2).contiguous()
        return torch.searchsorted(middles, (self._latent.detach() * self._gap).contiguous())

    def value(self) -> torch.Tensor:
        lut_TL = self._levels()
        hard_OK = lut_TL[self._tables_O[:, None], self._nearest(lut_TL)]
        soft_OK = self._latent * self._gap
        scale = self._scale * (1 + self._grown)
        if self._block_size:
            count = hard_OK.shape[1]
            scale = scale.repeat_interleave(min(self._block_size, count), dim=1)[:, :count]
        values_OK = (hard_OK + (soft_OK - soft_OK.detach())) * scale
        shape, axis = self._made.shape, self._axis % len(self._made.shape)
        return values_OK.reshape(shape[axis], *shape[:axis], *shape[axis + 1 :]).movedim(0, axis)

    def artifact(self) -> Artifact:
        lut_TL = self._levels().detach()
        codes = to_numpy(self._nearest(lut_TL))
        shaped = np.array(granularity.from_rows(codes, self._made.shape, self._axis), order="C")
        scale = to_numpy(self._scale * (1 + self._grown))
        if isinstance(self._made, PalettizedWeight):
            narrow: Any = to_numpy(self._stored(lut_TL)).astype(self._made.lut.dtype)
            return replace(
                self._made,
                codes=shaped.astype(np.uint8),
                lut=narrow,
                scale=None if self._made.scale is None else scale.reshape(self._made.scale.shape),
            )
        if self._block_size:
            scale = np.array(granularity.from_rows(scale, self._made.scale.shape, self._axis), order="C")
        return replace(
            self._made, codes=(shaped + self._low).astype(np.int8), scale=scale.reshape(self._made.scale.shape)
        )


def _output_axis(artifact: PalettizedWeight | IntegerWeight) -> int:
    """The axis whose indices have levels of their own."""
    if isinstance(artifact, IntegerWeight) and artifact.block_size is not None:
        assert artifact.axis is not None
        return granularity.input_axis(len(artifact.shape), artifact.axis)
    return artifact.axis or 0


def _place(artifact: Artifact, value: torch.Tensor, device: str) -> _Bias | _Codes | None:
    """What is tuned of an artifact; None: nothing."""
    if isinstance(artifact, FloatWeight):
        is_vector = value.ndim == 1 and value.dtype == torch.float32 and isinstance(value, torch.nn.Parameter)
        return _Bias(artifact, device) if is_vector and artifact.values.dtype == np.float32 else None
    if isinstance(artifact, PalettizedWeight):
        is_plain = artifact.vector_dim == 1 and artifact.lut.shape[1] > 1
        return _Codes(artifact, device) if is_plain and artifact.shape else None
    if isinstance(artifact, IntegerWeight):
        is_plain = artifact.zero_point is None and artifact.codes.dtype == np.int8
        is_plain &= artifact.block_size is None or len(artifact.shape) == 2
        return _Codes(artifact, device) if is_plain and artifact.shape else None
    return None
