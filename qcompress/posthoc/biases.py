"""Biases of int8 layers, and weights whose scales are large enough for them.

Kernels take such a bias as an int32 count of steps of s_x * s_w, the scales of the layer's input and of its weight. The
rounding to whole steps belongs to the export; that the count fits is decided here, since it changes the weight's codes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompress.artifacts import Artifact, SiteGrid
from qcompress.artifacts.base import Floats
from qcompress.graph.layers import bias_of, weight_layers
from qcompress.graph.marks import input_sites, mark
from qcompress.graph.program import FloatProgram, state_nodes


@dataclass(frozen=True, slots=True)
class IntegerBias:
    """The bias of one layer with integer weights and a quantized input, used by no other layer.

    Args:
        name: qualified name of the bias.
        weight: qualified name of the layer's weight.
        values: float64 [O].
        grid: the grid of the layer's input.
        scale: of the weight, float32, 0-d or [O]; negative where training made the γ of a BatchNorm negative.
        sums: int64 [O], the weight's codes summed over the inputs of each output.
    """

    name: str
    weight: str
    values: npt.NDArray[np.float64]
    grid: SiteGrid
    scale: Floats
    sums: npt.NDArray[np.int64]


def integer_biases(
    program: FloatProgram, artifacts: Mapping[str, Artifact], grids: Sequence[SiteGrid]
) -> Iterator[IntegerBias]:
    """Yield the biases of all layers that can compute in integers, at most one for each weight.

    Args:
        program: BatchNorm folded.
        artifacts: one for each tensor of the program.
        grids: the grids of the program's sites.
    """
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
            yield IntegerBias(state[bias], name, values_O, grids[sites[name]], scale, sums_O)


def fit_biases(
    program: FloatProgram, artifacts: Mapping[str, Artifact], grids: Sequence[SiteGrid], largest_bias: int
) -> dict[str, Artifact]:
    """Return the artifacts with weight scales that are large enough for the biases.

    A channel with tiny weights and a bias of ordinary size gets a larger scale and the codes nearest to its old values.

    Args:
        program: BatchNorm folded.
        artifacts: one for each tensor of the program.
        grids: the grids of the program's sites.
        largest_bias: the largest bias, in steps; see `Deployment.largest_bias`.
    """
    found = dict(artifacts)
    for bias in integer_biases(program, artifacts, grids):
        least_O = (np.abs(bias.values) / (float(bias.grid.scale) * float(largest_bias))).astype(np.float32)
        if (least_O > np.abs(bias.scale)).any():
            found[bias.weight] = artifacts[bias.weight].raised(least_O)
    return found
