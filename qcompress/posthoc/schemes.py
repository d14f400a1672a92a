"""What the codes of a weight stand for: which schemes a plan allows, and the better of two."""

import math
from collections.abc import Iterable
from typing import Final, Literal, TypeVar

from qcompress.artifacts import Artifact
from qcompress.plan.resolve import TensorPlan

# Palettes of floats, palettes of int8 steps, palettes of vectors of floats, even grids.
Codes = Literal["palette", "int8 palette", "vectors", "uniform"]

_DB_PER_BIT: Final = 20 * math.log10(2)

AnyArtifact = TypeVar("AnyArtifact", bound=Artifact)


def codes_for(plan: TensorPlan, *, integer: bool) -> tuple[Codes, ...]:
    """What a weight's codes may be; one thing, unless the plan leaves the scheme open.

    Args:
        plan: of a tensor that is compressed.
        integer: whether int8 kernels shall compute with it.
    """
    if plan.vector_dim > 1:
        return ("vectors",)
    is_int8 = plan.lut_dtype == "int8" or (integer and plan.lut_dtype is None)
    # The palette of every 8-bit integer: a table says nothing more than the codes.
    is_every_integer = is_int8 and plan.bits == 8 and plan.rows_per_lut is None
    palette: Codes = "int8 palette" if is_int8 else "palette"
    if plan.scheme == "uniform" or is_every_integer:
        return ("uniform",)
    if plan.scheme == "palette" or plan.bits == 1:
        return (palette,)
    return (palette, "uniform")


def better(found: Iterable[tuple[AnyArtifact, float]]) -> AnyArtifact:
    """The artifact with the fewest bytes for the same error.

    What one has less error is taken off its bytes: a bit more for each weight makes the error 6.02 dB smaller.

    Args:
        found: artifacts of the same weight, each with its squared error, of whatever unit.
    """

    def worth(candidate: tuple[AnyArtifact, float]) -> tuple[float, int]:
        artifact, error = candidate
        weights = math.prod(artifact.shape)
        bits = 10 * math.log10(error) / _DB_PER_BIT if error > 0 else -math.inf
        return artifact.nbytes + weights * bits / 8 if weights else 0.0, artifact.nbytes

    return min(found, key=worth)[0]
