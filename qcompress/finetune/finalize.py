"""From what was trained to a compressed model: codes kept, BatchNorm folded into scales and biases."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, final

import numpy as np
import numpy.typing as npt
import torch

from qcompress.artifacts import Artifact, FloatWeight, SiteGrid
from qcompress.compressed.model import CompressedModel
from qcompress.deployment import DEFAULT, Deployment
from qcompress.errors import ConfigError
from qcompress.graph.batchnorm import fold_with_factors
from qcompress.graph.layers import weight_layers
from qcompress.graph.program import FloatProgram
from qcompress.graph.sites import Site
from qcompress.plan.resolve import ResolvedPlan
from qcompress.posthoc.biases import fit_biases

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
        deployment: where the model is to run.
    """

    program: FloatProgram
    folded: FloatProgram
    resolved: ResolvedPlan
    sites: tuple[Site, ...]
    batchnorm: BatchNorm
    arguments: tuple[str, ...]
    deployment: Deployment = DEFAULT

    def __deepcopy__(self, memo: object) -> "Parts":
        """Nothing of it changes."""
        return self


def compressed(
    parts: Parts, tensors: Mapping[str, torch.Tensor], weights: Mapping[str, Artifact], grids: Sequence[SiteGrid]
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
            found = found.rescaled(factors[name].numpy(), layers[name].axis)
        values: npt.NDArray[Any] = value.detach().numpy()
        if found is None:
            found = FloatWeight(values=values, reason=reasons.get(name) or _NOT_A_WEIGHT)
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
        notes=parts.folded.notes,
        activations={grid.site: grid for grid in grids},
        compute="int8" if grids else "float",
    )
