"""Solve weights layer after layer on calibration data and correct biases, in one walk over the network.

A layer's target is not its float weight W but T = W + W (C - H) (H + damping)^-1, with H = E[x xᵀ] of its inputs x in
the compressed network and C = E[y xᵀ], y the same inputs in the float network. T is the weight that best reproduces the
float layer's output from the compressed network's inputs, so each layer compensates for errors made by earlier layers.
If the layer has a bias, moments are taken about the means, and the bias corrects the mean of the output.

Source: GPTQ's objective (Frantar et al. 2023) with the target of an asymmetric calibration (Li et al. 2025, GPTAQ).
Deviation: that target is found in closed form once, by damped least squares, not while columns are rounded.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from qcompress.artifacts import Artifact, FloatWeight, PalettizedWeight, SiteGrid, granularity
from qcompress.artifacts.integer_range import IntegerRange
from qcompress.compressed.model import LayerGain
from qcompress.graph.conversion import to_numpy, to_torch
from qcompress.graph.marks import rounding
from qcompress.graph.program import Arrays, FloatProgram
from qcompress.palettes.even_grid import REDUCED_BITS
from qcompress.palettes.int8_palette import LARGEST, LARGEST_REDUCED
from qcompress.palettes.vector import palettize_vectors
from qcompress.plan.resolve import TensorPlan
from qcompress.posthoc.input_moments import PRODUCTS, Moments, has_moments
from qcompress.posthoc.schemes import CodeKind, better, codes_for, keeping_zeros
from qcompress.posthoc.walk import Reached, walk
from qcompress.progress import ON_CPU, Execution
from qcompress.solvers import SOLVERS
from qcompress.solvers.base import Problem
from qcompress.solvers.palette_levels import Int8PaletteLevels, PaletteLevels
from qcompress.solvers.uniform_levels import UniformLevels

_DAMPING: Final = 0.05  # of the mean diagonal of H: 0.01 fits ResNet-20 better, 0.1 MobileNet

AnyLevels = PaletteLevels | Int8PaletteLevels | UniformLevels


@dataclass(frozen=True, slots=True)
class SolveSettings:
    """How weights are solved.

    Args:
        solver: a key of `solvers.SOLVERS`.
        integer_kinds: the kinds of layers that compute in integers.
        reduce_range: as in `PosthocSettings`.
    """

    solver: str
    integer_kinds: Collection[str] = ()
    reduce_range: bool = False


@dataclass(frozen=True, slots=True)
class Solved:
    """One artifact for each tensor, and the gain of each layer that was solved."""

    artifacts: dict[str, Artifact]
    gains: list[LayerGain]


def solve_weights(
    program: FloatProgram,
    tensors: Mapping[str, TensorPlan],
    unsolved: Mapping[str, Artifact],
    batches: Sequence[Arrays],
    settings: SolveSettings,
    *,
    grids: Sequence[SiteGrid] = (),
    execution: Execution = ON_CPU,
) -> Solved:
    """Solve the weights of layers and correct their biases.

    Args:
        program: BatchNorm folded; marked at the sites of the grids, if there are any.
        tensors: the plan of each compressed tensor.
        unsolved: each tensor compressed without data.
        batches: calibration inputs by name.
        settings: how codes are found.
        grids: the grids of the marks, in the order of their indices.
        execution: where the program runs; tracks layers.

    Returns:
        `unsolved` with the solved artifacts in place of theirs.
    """
    artifacts, gains = dict(unsolved), list[LayerGain]()

    def settle(reached: Reached) -> Mapping[str, torch.Tensor]:
        name = reached.layer.weight
        first = unsolved[name]
        if first.reason or name not in tensors:
            return {}
        plain = _tensor(first, reached.weight)
        if not isinstance(reached.outputs[0], torch.Tensor):  # an embedding bag returns a tuple
            return {name: plain}
        outputs = reached.run(plain)
        before, found = _noise_db(reached.outputs, outputs), first
        exact = torch.equal(plain, reached.weight)
        if has_moments(reached.layer) and not exact:
            found = _solved(reached, tensors[name], first, settings)
            outputs = reached.run(_tensor(found, reached.weight))
        settled = {name: _tensor(found, reached.weight)}
        if reached.bias is not None:
            shift_O = _mean_shift(reached, outputs)
            bias_O = unsolved[reached.bias].dequantize() + shift_O
            artifacts[reached.bias] = FloatWeight(values=bias_O.astype(np.float32), reason="not a weight")
            settled[reached.bias] = to_torch(bias_O.astype(np.float32))
            outputs = [o + _along(reached, shift_O, o) for o in outputs]
        artifacts[name] = found
        gains.append(LayerGain(name, before, _noise_db(reached.outputs, outputs)))
        return settled

    quantize = rounding(grids) if grids else None
    walk(program, batches, settle, quantize=quantize, device=execution.device, track=execution.track)
    return Solved(artifacts, gains)


def _solved(reached: Reached, plan: TensorPlan, first: Artifact, settings: SolveSettings) -> Artifact:
    solver = SOLVERS[settings.solver]
    layer, shape = reached.layer, tuple(reached.weight.shape)
    moments = Moments.gather(layer, shape, reached.inputs, reached.float_inputs, centred=reached.bias is not None)
    groups = len(moments.second)
    rows_OK = granularity.rows(to_numpy(reached.weight).astype(np.float64), layer.axis)
    weight = to_torch(rows_OK).reshape(groups, len(rows_OK) // groups, -1)
    problem = Problem(target=_target(weight, moments), hessian=moments.second)
    diagonal = moments.second.diagonal(dim1=1, dim2=2).clamp_min(0)
    diagonal = diagonal if solver.is_weighted else torch.ones_like(diagonal)
    importance_OK = to_numpy(diagonal[:, None].expand_as(weight).reshape(rows_OK.shape))
    target_OK = to_numpy(problem.target.reshape(rows_OK.shape))

    def error(artifact: Artifact) -> float:
        values_OK = granularity.rows(artifact.dequantize().astype(np.float64), layer.axis)
        return problem.error(to_torch(values_OK).reshape(weight.shape))

    solved = list[Artifact]()
    for kind in codes_for(plan, integer=layer.kind in settings.integer_kinds):
        if kind == "vectors":
            solved.append(_vectors(target_OK, importance_OK, plan, shape, layer.axis))
            continue
        levels = _levels(kind, target_OK, importance_OK, plan, reduce_range=settings.reduce_range)
        levels, codes = solver.solve(problem, levels)
        made = levels.artifact(to_numpy(codes.reshape(rows_OK.shape)).astype(np.uint8), shape, layer.axis)
        solved.append(keeping_zeros(made, to_numpy(reached.weight), plan.bits))
    found = solved[0] if len(solved) == 1 else better((a, error(a)) for a in solved)
    return found if error(found) < error(first) and found.nbytes < reached.weight.nbytes else first


def _vectors(
    target_OK: npt.NDArray[np.float64],
    importance_OK: npt.NDArray[np.float64],
    plan: TensorPlan,
    shape: tuple[int, ...],
    axis: int,
) -> PalettizedWeight:
    target, importance = (granularity.from_rows(rows, shape, axis) for rows in (target_OK, importance_OK))
    return palettize_vectors(
        np.array(target, np.float32),
        plan.bits,
        plan.vector_dim,
        axis,
        importance,
        lut_dtype=plan.lut_dtype or "float32",
    )


def _target(weight: torch.Tensor, moments: Moments) -> torch.Tensor:
    """Return the weight that best reproduces the float layer's outputs from the compressed network's inputs."""
    if moments.cross is moments.second:
        return weight
    damped = Problem(target=weight, hessian=moments.second).damped(_DAMPING)
    correction: torch.Tensor = torch.linalg.solve(damped, (weight @ (moments.cross - moments.second)).mT).mT
    return weight + correction


def _levels(
    kind: CodeKind,
    rows_OK: npt.NDArray[np.float64],
    importance_OK: npt.NDArray[np.float64],
    plan: TensorPlan,
    *,
    reduce_range: bool,
) -> AnyLevels:
    bits, rows_per_lut = plan.bits, plan.rows_per_lut
    if kind == "uniform":
        limits = IntegerRange(min(bits, REDUCED_BITS) if reduce_range else bits, signed=True)
        return UniformLevels.fit(rows_OK, importance_OK, bits, limits, plan.block_size)
    if kind == "int8 palette":
        largest = LARGEST_REDUCED if reduce_range else LARGEST
        return Int8PaletteLevels.fit(rows_OK, importance_OK, bits, rows_per_lut, largest=largest)
    halves = plan.lut_dtype == "float16"
    return PaletteLevels.fit(rows_OK, importance_OK, bits, rows_per_lut, scaled=True, halves=halves)


def _tensor(artifact: Artifact, like: torch.Tensor) -> torch.Tensor:
    return to_torch(artifact.dequantize()).to(like)


def _mean_shift(reached: Reached, outputs: list[torch.Tensor]) -> npt.NDArray[np.float64]:
    """Return the mean of float minus compressed outputs for each output channel."""
    axis = -1 if reached.layer.kind in PRODUCTS else 1
    total, count = np.zeros(outputs[0].shape[axis]), 0
    for wanted, got in zip(reached.outputs, outputs, strict=True):
        rest = [i for i in range(got.ndim) if i != axis % got.ndim]
        total = total + to_numpy((wanted.double() - got.double()).sum(rest))
        count += got.numel() // got.shape[axis]
    return np.asarray(total / count, np.float64)


def _along(reached: Reached, shift_O: npt.NDArray[np.float64], output: torch.Tensor) -> torch.Tensor:
    shift = to_torch(shift_O).to(output)
    return shift if reached.layer.kind in PRODUCTS else shift.reshape(-1, *[1] * (output.ndim - 2))


def _noise_db(wanted: list[torch.Tensor], got: list[torch.Tensor]) -> float | None:
    """Return the variance of the float outputs over the mean squared difference, in dB; None without a difference."""
    noise = sum(float((w.double() - g.double()).square().sum()) for w, g in zip(wanted, got, strict=True))
    count = sum(w.numel() for w in wanted)
    mean = sum(float(w.double().sum()) for w in wanted) / count
    signal = sum(float(w.double().square().sum()) for w in wanted) - count * mean**2
    if noise == 0:
        return None
    return float(10 * (np.log10(max(signal, np.finfo(np.float64).tiny)) - np.log10(noise)))
