"""Turns a trained model into a compressed model: codes stay, BatchNorm is folded into scales and biases."""

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
    """The data of a prepared model that training does not change.

    Args:
        program: the program that runs in training; BatchNorm is folded if `batchnorm` is "fold".
        folded: the program of the float model before training, BatchNorm folded.
        resolved: the plan.
        sites: the activations that are quantized, by their names in `folded`.
        batchnorm: how BatchNorm trains.
        arguments: names of forward's parameters.
    """

    program: FloatProgram
    folded: FloatProgram
    resolved: ResolvedPlan
    sites: tuple[Site, ...]
    batchnorm: BatchNorm
    arguments: tuple[str, ...]

    def __deepcopy__(self, memo: object) -> "Parts":
        """Returns itself: it is immutable."""
        return self


def compressed(
    parts: Parts,
    tensors: Mapping[str, torch.Tensor],
    weights: Mapping[str, Artifact],
    grids: Sequence[AnyGrid],
    notes: tuple[str, ...] = (),
) -> CompressedModel:
    """Returns the compressed model.

    Args:
        parts: the data that training did not change.
        tensors: trained tensors of the program by qualified name; quantized weights as the forward uses them.
        weights: artifacts of the quantized weights, by qualified name.
        grids: one for each site.
        notes: what the user should know about the quantizers.

    Raises:
        ConfigError: a trained tensor is not finite.
    """
    arrays = {name: value.detach().cpu().numpy() for name, value in tensors.items()}
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ConfigError(
                f"{name} must be finite, but training made it NaN or Inf; go back to the last good state."
            )
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
        notes=(*parts.folded.notes, *notes),
        activations={grid.site: grid for grid in grids},
        compute="int8" if grids else "float",
    )
    if not grids:
        return small
    return in_steps(replace(small, artifacts=fitting(parts.folded, artifacts, list(small.activations.values()))))


def rescaled(weight: Artifact, factor_O: npt.NDArray[np.float64], axis: int) -> Artifact:
    """Multiplies a weight by a factor for each output channel; its codes stay.

    Args:
        weight: an artifact with codes.
        factor_O: of any sign; a channel with factor 0 becomes 0.
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
