"""Biases of int8 layers at whole steps of s_x * s_w, the scales of the layer's input and of its weight."""

from dataclasses import replace
from typing import Final

import numpy as np

from qcompress.artifacts import FloatWeight, IntegerWeight, PalettizedWeight
from qcompress.compressed.model import CompressedModel
from qcompress.posthoc.biases import IntegerBias, finer_steps, integer_biases

_LARGEST: Final = 2.0**31  # steps that int32 can count


def stepped(model: CompressedModel) -> CompressedModel:
    """Return a model whose artifacts are what its file computes with: biases of int8 layers at whole steps.

    A free offset of the layer's input, which the bias takes up, is part of the count. Weights on even grids of 2 and 3
    bits become palettes of int8 codes with a smaller scale, so that their biases have finer steps. A bias that 32 bits
    do not hold stays as it is: its layer computes in float.

    Calling this again changes nothing, so that folders of older versions, which hold stepped biases, keep their bytes.

    Args:
        model: for any compute; returned as it is where it has no activation grids.
    """
    if not model.activations:
        return model
    artifacts = dict(model.artifacts)
    for bias in integer_biases(model.program, model.artifacts, list(model.activations.values())):
        weight, scale_O = artifacts[bias.weight], bias.scale
        if isinstance(weight, IntegerWeight) and finer_steps(weight) > 1:
            artifacts[bias.weight] = finer = _finer(weight, bias)
            scale_O = finer.scale if finer.scale is not None else scale_O
        step_O = np.asarray(bias.grid.scale * scale_O).astype(np.float64)
        folded_O = float(bias.grid.free_offset) * bias.scale.astype(np.float64) * bias.sums
        steps_O = np.rint((bias.values + folded_O) / step_O)
        if np.abs(steps_O).max(initial=0) <= _LARGEST:
            values = (steps_O * step_O - folded_O).astype(np.float32)
            artifacts[bias.name] = FloatWeight(values=values, reason="not a weight")
    return replace(model, artifacts=artifacts)


def _finer(weight: IntegerWeight, bias: IntegerBias) -> IntegerWeight | PalettizedWeight:
    """Return the same weight with larger codes and a scale that is as much smaller, by a power of 2.

    Args:
        weight: codes on an even grid.
        bias: the bias of its layer.

    Returns:
        A palette of int8 codes; the weight itself where its codes cannot grow.
    """
    low, high = -(1 << (weight.bits - 1)), (1 << (weight.bits - 1)) - 1
    largest = np.abs(bias.values / (float(bias.grid.scale) * bias.scale)).max(initial=1)
    factor = 1 << max(0, min(finer_steps(weight), int(_LARGEST / 2 / largest)).bit_length() - 1)
    scale = np.asarray(weight.scale / np.float32(factor))
    if factor == 1 or np.abs(scale).min() < np.finfo(np.float32).tiny:
        return weight
    return PalettizedWeight(
        codes=(weight.codes.astype(np.int16) - low).astype(np.uint8),
        lut=(np.arange(low, high + 1) * factor).astype(np.int8)[None],
        bits=weight.bits,
        axis=weight.axis or 0,
        scale=scale,
    )
