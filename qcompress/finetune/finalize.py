"""From what was trained to a compressed model: codes kept, BatchNorm folded into scales and biases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, final

import numpy as np
import numpy.typing as npt
import torch

from qcompress.artifacts import AnyGrid, Artifact, FloatWeight, IntegerWeight, PalettizedWeight
from qcompress.batchnorm import fold_with_factors
from qcompress.compressed import CompressedModel
from qcompress.errors import ConfigError
from qcompress.layers import weight_layers
from qcompress.plan import ResolvedPlan
from qcompress.posthoc.biases import fitting, in_steps
from qcompress.program import FloatProgram
from qcompress.sites import Site

BatchNorm = Literal["train", "freeze", "fold"]

_NOT_A_WEIGHT: Final = "not a weight"


@final
@dataclass(frozen=True, slots=True)
class Parts:
    """What stays the same while a model trains.

    Args:
        program: what runs; BatchNorm folded where it trains so.
        folded: the float model as it was, BatchNorm folded.
        resolved: the plan.
        sites: where activations are quantized, as `folded` has them.
        batchnorm: how it trains.
        arguments: names of what forward takes.
    """

    program: FloatProgram
    folded: FloatProgram
    resolved: ResolvedPlan
    sites: tuple[Site, ...]
    batchnorm: BatchNorm
    arguments: tuple[str, ...]

    def __deepcopy__(self, memo: object) -> "Parts":
        """Nothing of it changes."""
        return self


def compressed(
    parts: Parts, tensors: Mapping[str, torch.Tensor], weights: Mapping[str, Artifact], grids: Sequence[AnyGrid]
) -> CompressedModel:
    """The compressed model.

    Args:
        parts: what stayed the same.
        tensors: trained tensors of the program by qualified name, weights as they are quantized.
        weights: what is stored of those that are quantized.
        grids: of the sites.

    Raises:
        ConfigError: a trained tensor is not finite.
    """
    arrays = {name: value.detach().cpu().numpy() for name, value in tensors.items()}
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ConfigError(f"{name} must be finite, and training made it NaN or Inf: take the last good state.")
    trained, factors = fold_with_factors(parts.program.with_state(arrays))
    layers = weight_layers(parts.folded)
    reasons = {t.name: t.reason for t in parts.resolved.tensors}
    artifacts: dict[str, Artifact] = {}
    for name, value in trained.state().items():
        found = weights.get(name)
        if found is not None and name in factors:
            found = rescaled(found, factors[name].numpy(), layers[name].axis)
        values: npt.NDArray[Any] = value.detach().numpy()
        if found is None:
            found = FloatWeight(values=values, reason=reasons.get(name) or _NOT_A_WEIGHT)
        elif found.nbytes >= values.nbytes:
            reason = f"too small: {found.nbytes} bytes quantized, {values.nbytes} in float"
            found = FloatWeight(values=found.dequantize(), reason=reason)
        artifacts[name] = found
    small = CompressedModel(
        program=parts.folded,
        artifacts=artifacts,
        plan=parts.resolved.as_plan(),
        plan_digest=parts.resolved.digest,
        source_digest="",
        notes=parts.folded.notes,
        activations={grid.site: grid for grid in grids},
        compute="int8" if grids else "float",
    )
    if not grids:
        return small
    return in_steps(replace(small, artifacts=fitting(parts.folded, artifacts, list(small.activations.values()))))


def rescaled(weight: Artifact, factor_O: npt.NDArray[np.float64], axis: int) -> Artifact:
    """A weight times a factor for each output channel, its codes kept.

    Args:
        weight: with codes.
        factor_O: any sign; where it is 0 the channel becomes 0.
        axis: the weight's axis that counts output channels.

    >>> w = IntegerWeight(codes=np.array([[1], [-2]], np.int8), scale=np.array(0.5, np.float32), bits=2)
    >>> rescaled(w, np.array([-2.0, 3.0]), 0).dequantize().tolist()
    [[-1.0], [-3.0]]
    """
    if isinstance(weight, IntegerWeight):
        scale_O = (weight.scale * factor_O).astype(np.float32)
        codes = weight.codes.copy()
        np.moveaxis(codes, axis, 0)[scale_O == 0] = 0
        return replace(weight, codes=codes, scale=np.where(scale_O == 0, np.float32(1), scale_O), axis=axis)
    assert isinstance(weight, PalettizedWeight)
    scale = np.ones((), np.float32) if weight.scale is None else weight.scale
    return replace(weight, scale=(scale * factor_O).astype(np.float32), axis=axis)
