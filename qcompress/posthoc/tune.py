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
from qcompress.graph.nodes import row_of
from qcompress.graph.program import Arrays, FloatProgram
from qcompress.posthoc.latent import latent_of
from qcompress.progress import Track, untracked

_STEPS: Final = 400
_RATE: Final = 1e-2  # of latent values, in steps between levels
_LEVEL_RATE: Final = 1e-3  # of levels, scales and biases, in parts of their size
_OUTPUTS: Final = 0.3  # of the loss; the rest is that of the values behind activations


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
        program: the float program, with BatchNorm folded.
        artifacts: one for each tensor of its state. Palettes, even grids without zero points and vectors of floats are
            tuned; palettes of vectors and all others stay.
        batches: calibration inputs by name.
        steps: number of steps of gradient descent.
        device: where the program runs.
        track: a progress bar over the steps.
    """
    inputs, start = _inputs(program, batches, device), _on(artifacts, device)
    comparison = _Comparison(program, device)
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
        comparison.loss(now, inputs[order.pop()]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return dict(artifacts) | {name: latent.artifact() for name, latent in tuned.items()}


def output_error(
    program: FloatProgram, artifacts: Mapping[str, Artifact], batches: Sequence[Arrays], *, device: str = "cpu"
) -> float:
    """Return the squared error of a compressed model's outputs over their variance in the float program.

    It is the mean over outputs and batches.
    """
    comparison, state = _Comparison(program, device), _on(artifacts, device)
    return float(np.mean([comparison.error(state, batch) for batch in _inputs(program, batches, device)]))


def _inputs(program: FloatProgram, batches: Sequence[Arrays], device: str) -> list[list[torch.Tensor]]:
    return [[to_torch(x).to(device) for x in program.bind(batch)] for batch in batches]


def _on(artifacts: Mapping[str, Artifact], device: str) -> dict[str, torch.Tensor]:
    return {name: to_torch(a.dequantize()).to(device) for name, a in artifacts.items()}


class _Comparison(Differentiable):
    """Runs the float and the compressed program on the same inputs, and keeps the values behind activations."""

    def __init__(self, program: FloatProgram, device: str) -> None:
        super().__init__(program)
        self._floats = {name: value.detach().to(device) for name, value in program.state().items()}
        self._inner: list[torch.Tensor] = []

    def run_node(self, n: Node) -> Any:
        """Run a node and keep its value if it is an activation function."""
        value = super().run_node(n)
        if row_of(n).activates:
            self._inner.append(value)
        return value

    def loss(self, state: Mapping[str, torch.Tensor], inputs: list[torch.Tensor]) -> torch.Tensor:
        """Return the weighted errors of the outputs and of the values behind activations."""
        outputs, inner = self._errors(state, inputs)
        return outputs if inner is None else _OUTPUTS * outputs + (1 - _OUTPUTS) * inner

    def error(self, state: Mapping[str, torch.Tensor], inputs: list[torch.Tensor]) -> float:
        """Return the error of the outputs."""
        with torch.no_grad():
            return float(self._errors(state, inputs)[0])

    def _errors(
        self, state: Mapping[str, torch.Tensor], inputs: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the mean errors over variances of the outputs, and of the values behind activations (or None)."""
        with torch.no_grad():
            wanted, wanted_inner = self._run(self._floats, inputs)
        got, inner = self._run(state, inputs)
        errors = [_over_variance(w, g) for w, g in zip(wanted, got, strict=True) if w.is_floating_point()]
        inner_errors = [_over_variance(w, g) for w, g in zip(wanted_inner, inner, strict=True)]
        return torch.stack(errors).mean(), torch.stack(inner_errors).mean() if inner_errors else None

    def _run(
        self, state: Mapping[str, torch.Tensor], inputs: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        self._inner = []
        return self.outputs(state, inputs), self._inner


def _over_variance(wanted: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    return (got - wanted).square().mean() / wanted.var(correction=0).clamp_min(1e-12)
