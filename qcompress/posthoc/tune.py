"""Codes, levels, scales and biases tuned together, without labels, towards the outputs of the float program.

Gradients see what solving layer after layer cannot: a code that is worse for its layer and better for the whole. The
loss is how far the outputs and the values behind activations are from those of the float program.

Source: block reconstruction (BRECQ, Li et al. 2021) and straight-through estimation (Bengio et al. 2013).
Deviations: all blocks at once. Outputs alone, without the values in between, fit the calibration data four times as
well and new data no better.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch.fx import Node

from qcompress.artifacts import Artifact
from qcompress.graph.conversion import to_torch
from qcompress.graph.differentiable import Differentiable
from qcompress.graph.program import Arrays, FloatProgram
from qcompress.posthoc.latent import latent_of
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
    state = program.state()
    found = {name: latent_of(artifact, state[name], device) for name, artifact in artifacts.items()}
    tuned = {name: latent for name, latent in found.items() if latent is not None}
    if not tuned:
        return dict(artifacts)
    optimizer = torch.optim.Adam(
        [
            {"params": [p for latent in tuned.values() for p in latent.latents()], "lr": _RATE},
            {"params": [p for latent in tuned.values() for p in latent.others()], "lr": _LEVEL_RATE},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator, order = torch.Generator().manual_seed(0), list[int]()
    for _ in track(range(steps), "tuning"):
        order = order or torch.randperm(len(inputs), generator=generator).tolist()
        optimizer.zero_grad()
        now = start | {name: latent.value() for name, latent in tuned.items()}
        net.loss(now, inputs[order.pop()]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return dict(artifacts) | {name: latent.artifact() for name, latent in tuned.items()}


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
