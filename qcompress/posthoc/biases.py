"""Biases of int8 layers: int32 in steps of s_x * s_w, the scales of the layer's input and weight.

Kernels take no other. So biases are put on these steps here, where grids are known: artifacts then are what a file
computes with, not what it rounds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from qcompress.artifacts import ActivationGrid, Artifact, Floats, FloatWeight, integer_values
from qcompress.compressed import CompressedModel
from qcompress.layers import bias_of, weight_layers
from qcompress.program import FloatProgram, state_nodes
from qcompress.sites import input_sites, mark

_LARGEST: Final = 2.0**30  # in steps: half of what fits


@dataclass(frozen=True, slots=True)
class _Bias:
    """A bias that is one layer's own.

    Args:
        name: qualified name.
        weight: of the layer.
        values: float64 [O].
        grid: of the layer's input.
        scale: of the weight, float32, 0-d or [O].
        sums: of the weight's codes over the inputs of each output, [O].
    """

    name: str
    weight: str
    values: npt.NDArray[np.float64]
    grid: ActivationGrid
    scale: Floats
    sums: npt.NDArray[np.int64]


def _biases(
    program: FloatProgram, artifacts: Mapping[str, Artifact], grids: Sequence[ActivationGrid]
) -> Iterator[_Bias]:
    marked = mark(program, [grid.site for grid in grids])
    state, sites = state_nodes(marked.exported), input_sites(marked)
    for name, layer in weight_layers(marked).items():
        values, bias = integer_values(artifacts[name]), bias_of(layer.node)
        if name not in sites or values is None or bias not in state or layer.kind == "conv_transpose":
            continue
        assert bias is not None
        codes, scale, _ = values
        sums_O = codes.sum(axis=tuple(i for i in range(codes.ndim) if i != layer.axis), dtype=np.int64)
        values_O = artifacts[state[bias]].dequantize().astype(np.float64)
        if len(bias.users) == 1:
            yield _Bias(state[bias], name, values_O, grids[sites[name]], scale, sums_O)


def least_scales(
    program: FloatProgram, artifacts: Mapping[str, Artifact], grids: Sequence[ActivationGrid]
) -> dict[str, Floats]:
    """Scales of weights whose bias would not fit 32 bits: channels of next to nothing but a bias.

    Args:
        program: BatchNorm folded.
        artifacts: one for each of its tensors.
        grids: of its sites.

    Returns:
        float32 [O], what the scales of these weights must be at least, by name.
    """
    found = {}
    for bias in _biases(program, artifacts, grids):
        least_O = np.abs(bias.values) / (float(bias.grid.scale) * _LARGEST)
        if (least_O > bias.scale).any():
            found[bias.weight] = least_O.astype(np.float32)
    return found


def in_steps(model: CompressedModel) -> CompressedModel:
    """The model with the biases of int8 layers at whole steps, a free offset of the input that they take up included.

    A bias beyond 32 bits stays: its layer computes in float.
    """
    artifacts = dict(model.artifacts)
    for bias in _biases(model.program, model.artifacts, list(model.activations.values())):
        step_O = np.asarray(bias.grid.scale * bias.scale).astype(np.float64)
        offset = 0.0 if bias.grid.zero_point is not None else float(bias.grid.offset)
        folded_O = offset * bias.scale.astype(np.float64) * bias.sums
        steps_O = np.rint((bias.values + folded_O) / step_O)
        if np.abs(steps_O).max(initial=0) <= 2 * _LARGEST:
            values = (steps_O * step_O - folded_O).astype(np.float32)
            artifacts[bias.name] = FloatWeight(values=values, reason="not a weight")
    return replace(model, artifacts=artifacts)
