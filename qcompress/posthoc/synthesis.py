"""Inputs for a model that comes without any: what its BatchNorms remember of the data that it was trained on.

Inputs are sought by gradient whose mean and variance at each BatchNorm are those that the BatchNorm has stored. They
begin as noise of several grains, coarse and fine, as natural signals have them.

Source: ZeroQ (Cai et al. 2020). Deviations: the mismatch is the divergence of two normal distributions, which needs no
weights between layers; smooth noise to begin with, which ends nearer than white noise and solves weights better
(ResNet-20 at 2 bits: 84.0 against 82.8 % top-1).
"""

import math
from typing import Any, Final

import torch
from torch.fx import Node
from torch.nn import functional

from qcompress.data.dataset import Dataset
from qcompress.graph.batchnorm import BATCH_NORMS, statistics
from qcompress.graph.differentiable import Differentiable
from qcompress.graph.program import FloatProgram, state_nodes, user_inputs, value_of
from qcompress.graph.tensors import to_numpy
from qcompress.progress import Track, untracked

_SAMPLES: Final = 128
_FEWER: Final = 32  # of large inputs, which have many places each
_LARGE: Final = 1 << 14  # values of one sample
_STEPS: Final = 40
_RATE: Final = 0.1
_GRAINS: Final = (1, 2, 4, 8, 16)


def synthesize(program: FloatProgram, *, device: str = "cpu", track: Track = untracked) -> Dataset | None:
    """Inputs made from the statistics of a program's BatchNorms; the same ones each time.

    Args:
        program: as it came in, BatchNorm not folded; not modified.
        device: where it runs.
        track: passes steps on: a progress bar.

    Returns:
        128 samples, 32 of inputs with more than 16,384 values; None where the program has no BatchNorm that tells of
        its inputs, takes others than floats, or batches of one size alone.

    >>> from torch import nn
    >>> from qcompress.sources.base import ProgramOptions
    >>> from qcompress.tracing import from_module
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    >>> example = torch.zeros(2, 3, 8, 8)
    >>> synthesize(from_module(net, ProgramOptions(inputs={"input": example.numpy()}))).inputs["input"].shape
    (128, 3, 8, 8)
    """
    nodes = user_inputs(program.exported)
    is_known = all(value_of(n).dtype == torch.float32 and value_of(n).ndim > 1 for n in nodes)
    if not nodes or not is_known or program.fixed_batch is not None or not _norms(program):
        return None
    shapes = [[int(size) for size in _shape(n)] for n in nodes]
    count = _SAMPLES if max(math.prod(shape) for shape in shapes) <= _LARGE else _FEWER
    generator = torch.Generator().manual_seed(0)
    inputs = [_noise([count, *shape], generator).to(device).requires_grad_() for shape in shapes]
    optimizer = torch.optim.Adam(inputs, lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    mismatch = _Mismatch(program, device)
    for _ in track(range(_STEPS), "synthesising"):
        optimizer.zero_grad()
        mismatch(inputs).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    arrays = {name: to_numpy(x) for name, x in zip(program.input_names, inputs, strict=True)}
    return Dataset(inputs=arrays, name=f"{count} inputs synthesised from BatchNorm statistics")


def _norms(program: FloatProgram) -> list[Node]:
    """The BatchNorms that have statistics stored."""
    nodes, stored = program.exported.graph.nodes, state_nodes(program.exported)
    found = [n for n in nodes if n.op == "call_function" and n.target in BATCH_NORMS]
    return [n for n in found if all(isinstance(s, Node) and s in stored for s in statistics(n, n.args)[:2])]


def _shape(node: Node) -> list[Any]:
    """Of one sample, as it was traced."""
    return [size if isinstance(size, int) else size.node.hint for size in value_of(node).shape[1:]]


def _noise(shape: list[int], generator: torch.Generator) -> torch.Tensor:
    """Normal noise; along up to three axes behind the channels the sum of grains of several widths."""
    fine, places = torch.randn(shape, generator=generator), shape[2:]
    if not 1 <= len(places) <= 3:
        return fine
    mode = ("linear", "bilinear", "trilinear")[len(places) - 1]
    total = torch.zeros(shape)
    for grain in _GRAINS:
        coarse = torch.randn([*shape[:2], *(max(1, size // grain) for size in places)], generator=generator)
        total += functional.interpolate(coarse, size=places, mode=mode) * math.sqrt(grain)
    return total / 3


class _Mismatch(Differentiable):
    """How far values at the BatchNorms are from what these have stored, for inputs of a program.

    At each BatchNorm, the mean over channels of the divergence KL(N(m, v) || N(mean, var)), m and v those of the batch.
    """

    def __init__(self, program: FloatProgram, device: str) -> None:
        super().__init__(program)
        self._norms = set(_norms(program))
        self._state = {name: value.detach().to(device) for name, value in program.state().items()}
        self._sum = torch.zeros(())

    def __call__(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        self._sum = torch.zeros((), device=inputs[0].device)
        self.outputs(self._state, inputs)
        return self._sum / len(self._norms)

    def run_node(self, n: Node) -> Any:
        if n in self._norms:
            args, _ = self.fetch_args_kwargs_from_env(n)
            x, (mean, variance, epsilon) = args[0], statistics(n, args)
            over = [axis for axis in range(x.ndim) if axis != 1]
            m, v = x.mean(over), x.var(over, unbiased=False)
            ratio = (v + epsilon) / (variance + epsilon)
            self._sum = self._sum + ((ratio - 1 - ratio.log() + (m - mean) ** 2 / (variance + epsilon)) / 2).mean()
        return super().run_node(n)
