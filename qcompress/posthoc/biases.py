"""Biases of int8 layers: int32 in steps of s_x * s_w, the scales of the layer's input and weight.

Kernels take no other. So biases are put on these steps here, where grids are known: artifacts then are what a file
computes with, not what it rounds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from qcompress.artifacts import Artifact, FloatWeight, IntegerWeight, PalettizedWeight, SiteGrid
from qcompress.artifacts.base import Floats
from qcompress.compressed.model import CompressedModel
from qcompress.graph.layers import bias_of, weight_layers
from qcompress.graph.program import FloatProgram, state_nodes
from qcompress.graph.sites import input_sites, mark

_LARGEST: Final = 2.0**30  # in steps: half of what fits
_COARSE: Final = 3  # bits of weights with which the steps of biases are large
_FINEST: Final = 64  # of codes: CPUs without VNNI saturate the sums of products with larger ones


@dataclass(frozen=True, slots=True)
class _Bias:
    """A bias that is one layer's own.

    Args:
        name: qualified name.
        weight: of the layer.
        values: float64 [O].
        grid: of the layer's input.
        scale: of the weight, float32, 0-d or [O], negative where training made a BatchNorm's γ so.
        sums: of the weight's codes over the inputs of each output, [O].
    """

    name: str
    weight: str
    values: npt.NDArray[np.float64]
    grid: SiteGrid
    scale: Floats
    sums: npt.NDArray[np.int64]


def _biases(program: FloatProgram, artifacts: Mapping[str, Artifact], grids: Sequence[SiteGrid]) -> Iterator[_Bias]:
    marked = mark(program, [grid.site for grid in grids])
    state, sites = state_nodes(marked.exported), input_sites(marked)
    for name, layer in weight_layers(marked).items():
        values, bias = artifacts[name].integers(), bias_of(layer.node)
        if name not in sites or values is None or bias not in state or layer.kind == "conv_transpose":
            continue
        assert bias is not None
        codes, scale, _ = values
        sums_O = codes.sum(axis=tuple(i for i in range(codes.ndim) if i != layer.axis), dtype=np.int64)
        values_O = artifacts[state[bias]].dequantize().astype(np.float64)
        if len(bias.users) == 1:
            yield _Bias(state[bias], name, values_O, grids[sites[name]], scale, sums_O)


def fitting(program: FloatProgram, artifacts: Mapping[str, Artifact], grids: Sequence[SiteGrid]) -> dict[str, Artifact]:
    """Weights whose biases fit 32 bits: channels of next to nothing but a bias get a scale that is large enough.

    Args:
        program: BatchNorm folded.
        artifacts: one for each of its tensors.
        grids: of its sites.

    Returns:
        The artifacts, those of such weights with larger scales and the codes that are then nearest.
    """
    found = dict(artifacts)
    for bias in _biases(program, artifacts, grids):
        least_O = (np.abs(bias.values) / (float(bias.grid.scale) * _LARGEST)).astype(np.float32)
        if (least_O > np.abs(bias.scale)).any():
            found[bias.weight] = artifacts[bias.weight].raised(least_O)
    return found


def _in_finer_steps(weight: IntegerWeight, bias: _Bias) -> IntegerWeight | PalettizedWeight:
    """The same weight with larger codes and a scale as much smaller, by a power of 2: its bias loses less.

    Few bits make large steps: with those of 2-bit weights and 2-bit activations, biases lost ResNet-20 0.9 points.

    Args:
        weight: codes on a symmetric grid.
        bias: of its layer.
    """
    assert weight.zero_point is None
    assert weight.block_size is None
    low, high = -(1 << (weight.bits - 1)), (1 << (weight.bits - 1)) - 1
    largest = np.abs(bias.values / (float(bias.grid.scale) * bias.scale)).max(initial=1)
    more = 1 << max(0, min(_FINEST // -low, int(_LARGEST / largest)).bit_length() - 1)
    scale = np.asarray(weight.scale / np.float32(more))
    if more == 1 or np.abs(scale).min() < np.finfo(np.float32).tiny:
        return weight
    return PalettizedWeight(
        codes=(weight.codes.astype(np.int16) - low).astype(np.uint8),
        lut=(np.arange(low, high + 1) * more).astype(np.int8)[None],
        bits=weight.bits,
        axis=weight.axis or 0,
        scale=scale,
    )


def in_steps(model: CompressedModel) -> CompressedModel:
    """The model with the biases of int8 layers at whole steps, a free offset of the input that they take up included.

    A bias beyond 32 bits stays: its layer computes in float.
    """
    artifacts, grids = dict(model.artifacts), list(model.activations.values())
    for bias in _biases(model.program, model.artifacts, grids):
        weight = artifacts[bias.weight]
        if isinstance(weight, IntegerWeight) and weight.bits <= _COARSE:
            artifacts[bias.weight] = _in_finer_steps(weight, bias)
    for bias in _biases(model.program, artifacts, grids):
        step_O = np.asarray(bias.grid.scale * bias.scale).astype(np.float64)
        offset = 0.0 if bias.grid.zero_point is not None else float(bias.grid.offset)
        folded_O = offset * bias.scale.astype(np.float64) * bias.sums
        steps_O = np.rint((bias.values + folded_O) / step_O)
        if np.abs(steps_O).max(initial=0) <= 2 * _LARGEST:
            values = (steps_O * step_O - folded_O).astype(np.float32)
            artifacts[bias.name] = FloatWeight(values=values, reason="not a weight")
    return replace(model, artifacts=artifacts)
