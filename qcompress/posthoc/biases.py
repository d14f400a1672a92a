"""Biases of int8 layers, and weights whose scales are large enough for them.

Kernels take such a bias as an int32 count of steps of s_x * s_w, the scales of the layer's input and of its weight. The
rounding to whole steps belongs to the export, or to training before it; that the count fits is decided here, since it
changes the weight's codes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from qcompress.artifacts import Artifact, IntegerWeight, SiteGrid
from qcompress.artifacts.base import Floats
from qcompress.graph.layers import bias_of, pads, weight_layers
from qcompress.graph.marks import input_sites, mark
from qcompress.graph.program import FloatProgram, state_nodes

_SMALLEST: Final = np.float32(1e-30)  # smaller scales count as 0
_COARSE: Final = 4  # bits of weights with which the steps of biases are large
_FINEST: Final = 64  # of codes: CPUs without VNNI saturate the sums of products with larger ones


@dataclass(frozen=True, slots=True)
class BiasedLayer:
    """A layer with a quantized input and a bias that no other layer uses.

    Args:
        weight: qualified name of its weight.
        bias: qualified name of its bias.
        site: index of the site of its input.
        axis: the weight's axis that counts output channels.
        pads: whether it pads its input, so that it computes in float if the offset of its input is free.
    """

    weight: str
    bias: str
    site: int
    axis: int
    pads: bool


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


def biased_layers(program: FloatProgram, sites: Iterable[tuple[str, int]]) -> Iterator[BiasedLayer]:
    """Yield the layers that can take their biases in steps, at most one for each weight.

    Args:
        program: BatchNorm folded.
        sites: keys of the program's sites.
    """
    marked = mark(program, sites)
    state, inputs = state_nodes(marked.exported), input_sites(marked)
    for name, layer in weight_layers(marked).items():
        bias = bias_of(layer.node)
        if name in inputs and bias in state and layer.kind != "conv_transpose":
            assert bias is not None
            if len(bias.users) == 1:
                yield BiasedLayer(name, state[bias], inputs[name], layer.axis, pads(layer.node))


def integer_biases(
    program: FloatProgram, artifacts: Mapping[str, Artifact], grids: Sequence[SiteGrid]
) -> Iterator[IntegerBias]:
    """Yield the biases of all layers that can compute in integers, at most one for each weight.

    Args:
        program: BatchNorm folded.
        artifacts: one for each tensor of the program.
        grids: the grids of the program's sites.
    """
    for layer in biased_layers(program, [grid.site for grid in grids]):
        values, grid = artifacts[layer.weight].integers(), grids[layer.site]
        if values is None or (layer.pads and grid.free_offset):
            continue
        codes, scale, _ = values
        sums_O = codes.sum(axis=tuple(i for i in range(codes.ndim) if i != layer.axis), dtype=np.int64)
        values_O = artifacts[layer.bias].dequantize().astype(np.float64)
        yield IntegerBias(layer.bias, layer.weight, values_O, grid, scale, sums_O)


def finer_steps(weight: Artifact) -> int:
    """Return how many steps of its layer's bias make one step of a weight's codes: a power of 2, 1 for most weights.

    Few bits make large steps: with those of 2-bit weights and 2-bit activations, biases lost ResNet-20 0.9 points.

    >>> finer_steps(IntegerWeight(codes=np.array([[-2, 1]], np.int8), scale=np.array(0.5, np.float32), bits=2))
    32
    """
    coarse = isinstance(weight, IntegerWeight) and weight.signed and weight.zero_point is None
    return _FINEST >> (weight.bits - 1) if coarse and weight.bits <= _COARSE else 1


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
        finer = finer_steps(artifacts[bias.weight])
        largest = float(largest_bias) / (2 * finer if finer > 1 else 1)  # one channel shall not make all steps coarse
        least_O = (np.abs(bias.values) / (float(bias.grid.scale) * largest)).astype(np.float32)
        least_O = np.maximum(least_O, _SMALLEST)  # γ = 0 makes a scale 0, of which no bias is a multiple
        if (least_O > np.abs(bias.scale)).any():
            found[bias.weight] = artifacts[bias.weight].raised(least_O)
    return found
