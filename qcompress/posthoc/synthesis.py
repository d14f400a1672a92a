"""Synthesised inputs, for models that come without calibration data.

BatchNorms store statistics of the training data. Gradient descent finds inputs whose mean and variance at each
BatchNorm match the stored ones. It starts from noise with coarse and fine structure, like that of natural signals.

Source: ZeroQ (Cai et al. 2020). Deviations: the mismatch is the divergence of two normal distributions, which needs no
weights between layers; the start is smooth noise, which ends closer to the statistics than white noise does and solves
weights better (ResNet-20 at 2 bits: 84.0 instead of 82.8 % top-1).
"""

import math
from typing import Any, Final

import torch
from torch.fx import Node
from torch.nn import functional

from qcompress.data.dataset import Dataset
from qcompress.graph.batchnorm import batch_norms, statistics
from qcompress.graph.conversion import to_numpy
from qcompress.graph.differentiable import Differentiable
from qcompress.graph.program import FloatProgram, state_nodes, user_inputs, value_of
from qcompress.progress import ON_CPU, Execution

_SAMPLES: Final = 128
_FEWER: Final = 32  # samples of large inputs, each of which has many positions
_LARGE: Final = 1 << 14  # values of one sample
_STEPS: Final = 40
_RATE: Final = 0.1
_GRAINS: Final = (1, 2, 4, 8, 16)


def synthesize(program: FloatProgram, seed: int = 0, execution: Execution = ON_CPU) -> Dataset | None:
    """Return inputs made from the statistics of a program's BatchNorms; the same for the same seed.

    Args:
        program: as it came in, BatchNorm not folded; not modified.
        seed: of the noise that the search starts from.
        execution: where the program runs; tracks steps.

    Returns:
        128 samples, or 32 if a sample has more than 16,384 values. None if the program has no BatchNorm with stored
        statistics, an input that is not float32, or a fixed batch size.

    >>> from torch import nn
    >>> from qcompress.graph.options import ProgramOptions
    >>> from qcompress.graph.tracing import from_module
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
    generator = torch.Generator().manual_seed(seed)
    inputs = [_noise([count, *shape], generator).to(execution.device).requires_grad_() for shape in shapes]
    optimizer = torch.optim.Adam(inputs, lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    mismatch = _Mismatch(program, execution.device)
    for _ in execution.track(range(_STEPS), "synthesising"):
        optimizer.zero_grad()
        mismatch(inputs).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    arrays = {name: to_numpy(x) for name, x in zip(program.input_names, inputs, strict=True)}
    return Dataset(inputs=arrays, name=f"{count} inputs synthesised from BatchNorm statistics")


def _norms(program: FloatProgram) -> list[Node]:
    """Return the BatchNorms with stored statistics."""
    stored = state_nodes(program.exported)
    return [n for n in batch_norms(program) if all(isinstance(s, Node) and s in stored for s in statistics(n)[:2])]


def _shape(node: Node) -> list[Any]:
    """Return the shape of one sample, as it was traced."""
    return [size if isinstance(size, int) else size.node.hint for size in value_of(node).shape[1:]]


def _noise(shape: list[int], generator: torch.Generator) -> torch.Tensor:
    """Return normal noise; with one to three axes after the channels, a sum of noise of several grain sizes."""
    fine, positions = torch.randn(shape, generator=generator), shape[2:]
    if not 1 <= len(positions) <= 3:
        return fine
    mode = ("linear", "bilinear", "trilinear")[len(positions) - 1]
    total = torch.zeros(shape)
    for grain in _GRAINS:
        coarse = torch.randn([*shape[:2], *(max(1, size // grain) for size in positions)], generator=generator)
        total += functional.interpolate(coarse, size=positions, mode=mode) * math.sqrt(grain)
    return total / 3


class _Mismatch(Differentiable):
    """The distance between the statistics of a batch at the BatchNorms and the stored ones, averaged over BatchNorms.

    At each BatchNorm it is the mean over channels of KL(N(m, v) || N(mean, var)), with m and v of the batch.
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
            given: Any = self.map_nodes_to_values((n.args[0], *statistics(n)), n)
            x, mean, variance, epsilon = given
            over = [axis for axis in range(x.ndim) if axis != 1]
            m, v = x.mean(over), x.var(over, unbiased=False)
            ratio = (v + epsilon) / (variance + epsilon)
            self._sum = self._sum + ((ratio - 1 - ratio.log() + (m - mean) ** 2 / (variance + epsilon)) / 2).mean()
        return super().run_node(n)
