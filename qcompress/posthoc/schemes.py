"""The kinds of codes that a plan allows for a weight, and the choice between artifacts."""

import math
from collections.abc import Iterable
from typing import Any, Final, Literal, TypeVar

import numpy.typing as npt

from qcompress.artifacts import Artifact
from qcompress.plan.resolve import TensorPlan

# Codes into palettes of floats, of int8 steps or of vectors of floats; codes times a scale.
CodeKind = Literal["palette", "int8 palette", "vectors", "uniform"]

_DB_PER_BIT: Final = 20 * math.log10(2)

_PRUNED: Final = 0.01  # share of exact zeros from which a weight counts as pruned

AnyArtifact = TypeVar("AnyArtifact", bound=Artifact)


def codes_for(plan: TensorPlan, *, integer: bool) -> tuple[CodeKind, ...]:
    """Return the kinds of codes that a weight may have: one, unless the plan leaves the scheme open.

    Args:
        plan: the plan of a compressed tensor.
        integer: whether its layer computes in integers.
    """
    if plan.vector_dim > 1:
        return ("vectors",)
    is_int8 = plan.lut_dtype == "int8" or (integer and plan.lut_dtype is None)
    # A palette that holds every 8-bit integer adds nothing to the codes.
    is_every_integer = is_int8 and plan.bits == 8 and plan.rows_per_lut is None
    palette: CodeKind = "int8 palette" if is_int8 else "palette"
    if plan.scheme == "uniform" or is_every_integer:
        return ("uniform",)
    if plan.scheme == "palette" or plan.bits == 1:
        return (palette,)
    return (palette, "uniform")


def keeping_zeros(artifact: AnyArtifact, values: npt.NDArray[Any], bits: int) -> AnyArtifact:
    """Return an artifact that is exactly 0 where a pruned weight is; at 1 bit, one of two levels is too much for that.

    Args:
        artifact: of the weight; one that is left in float stays as it is.
        values: the weight.
        bits: width of its codes.
    """
    if artifact.reason or bits == 1:
        return artifact
    zeros = values == 0
    return artifact.with_zeros(zeros) if zeros.mean() >= _PRUNED else artifact


def better(found: Iterable[tuple[AnyArtifact, float]]) -> AnyArtifact:
    """Return the artifact with the fewest bytes for the same error.

    Error is converted to bytes at 6.02 dB per bit per weight, then the artifact with the smaller sum wins.

    Args:
        found: artifacts of the same weight, each with its squared error, all in the same unit.
    """

    def worth(candidate: tuple[AnyArtifact, float]) -> tuple[float, int]:
        artifact, error = candidate
        weights = math.prod(artifact.shape)
        bits = 10 * math.log10(error) / _DB_PER_BIT if error > 0 else -math.inf
        return artifact.nbytes + weights * bits / 8 if weights else 0.0, artifact.nbytes

    return min(found, key=worth)[0]
