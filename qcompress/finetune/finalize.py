"""Turns a trained model into a compressed model: codes stay, BatchNorm is folded into scales and biases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

import numpy as np
import torch

from qcompress.artifacts import Artifact, FloatWeight, SiteGrid
from qcompress.compressed.model import CompressedModel
from qcompress.deployment import DEFAULT, Deployment
from qcompress.errors import ConfigError
from qcompress.graph.batchnorm import fold_with_factors
from qcompress.graph.conversion import to_numpy
from qcompress.graph.layers import weight_layers
from qcompress.graph.program import FloatProgram
from qcompress.graph.sites import Site
from qcompress.plan.resolve import ResolvedPlan
from qcompress.posthoc.biases import fit_biases
from qcompress.posthoc.without_data import left_in_float

BatchNorm = Literal["train", "freeze", "fold"]

_NAMED: Final = 3  # weights that a note names


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
        deployment: the place where the model is to run.
    """

    program: FloatProgram
    folded: FloatProgram
    resolved: ResolvedPlan
    sites: tuple[Site, ...]
    batchnorm: BatchNorm
    arguments: tuple[str, ...]
    deployment: Deployment = DEFAULT

    def __deepcopy__(self, memo: object) -> "Parts":
        """Returns itself: it is immutable."""
        return self


def compressed(
    parts: Parts,
    tensors: Mapping[str, torch.Tensor],
    weights: Mapping[str, Artifact],
    grids: Sequence[SiteGrid],
    biases: Mapping[str, torch.Tensor],
    notes: tuple[str, ...] = (),
) -> CompressedModel:
    """Returns the compressed model.

    Args:
        parts: the data that training did not change.
        tensors: trained tensors of the program by qualified name; quantized weights as the forward uses them.
        weights: artifacts of the quantized weights, by qualified name.
        grids: one for each site.
        biases: those that training rounded as the export would, with BatchNorm folded in, by qualified name.
        notes: what the user should know about the quantizers.

    Raises:
        ConfigError: a trained tensor is not finite.
    """
    arrays = {name: to_numpy(value) for name, value in tensors.items()}
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ConfigError(
                f"{name} must be finite, but training made it NaN or Inf; go back to the last good state."
            )
    trained, factors = fold_with_factors(parts.program.with_state(arrays))
    layers = weight_layers(parts.folded)
    plans = {t.name: t for t in parts.resolved.tensors}
    artifacts: dict[str, Artifact] = {}
    for name, value in trained.state().items():
        found = weights.get(name)
        if found is not None and name in factors:
            found = found.rescaled(to_numpy(factors[name]), layers[name].axis)
        values = to_numpy(biases.get(name, value))
        if found is None:
            found = left_in_float(values, plans.get(name))
        elif found.nbytes >= values.nbytes:
            reason = f"too small: {found.nbytes} bytes quantized, {values.nbytes} in float"
            found = FloatWeight(values=found.dequantize(), reason=reason)
        artifacts[name] = found
    if grids:
        artifacts = fit_biases(parts.folded, artifacts, grids, parts.deployment.largest_bias)
    return CompressedModel(
        program=parts.folded,
        artifacts=artifacts,
        plan=parts.resolved.as_plan(),
        plan_digest=parts.resolved.digest,
        source_digest="",
        notes=(*parts.folded.notes, *notes),
        activations={grid.site: grid for grid in grids},
        compute="int8" if grids else "float",
    )


def drop_notes(drops: Mapping[str, float]) -> list[str]:
    """Returns a note on weights that are stored with other values than training used last; the largest drops first.

    >>> drop_notes({"a": 0.0, "b": 0.002, "c": 0.034})
    ['Stored weights differ from those of the last training step: c by 3.4 %, b by 0.2 % of its size.']
    """
    worst = sorted((name for name in drops if drops[name] > 0), key=lambda name: -drops[name])
    if not worst:
        return []
    listed = ", ".join(f"{name} by {drops[name]:.1%}".replace("%", " %") for name in worst[:_NAMED])
    others = f"; {len(worst) - _NAMED} others by less" if len(worst) > _NAMED else ""
    return [f"Stored weights differ from those of the last training step: {listed} of its size{others}."]


def left_out_notes(biases: Sequence[str]) -> list[str]:
    """Returns a note on biases that training could not keep at whole steps.

    >>> left_out_notes(["conv.bias"])
    ['The export rounds conv.bias: its BatchNorm has no β, or is followed by another.']
    """
    return [f"The export rounds {name}: its BatchNorm has no β, or is followed by another." for name in biases]
