"""The settings of post-hoc compression; their defaults are written here and nowhere else."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, final, get_args

from qcompress.deployment import Compute
from qcompress.errors import ConfigError, did_you_mean
from qcompress.posthoc.calibration import check_method

if TYPE_CHECKING:
    from qcompress.graph.sites import Placement

Effort = Literal["fast", "balanced", "best"]

_SEEDS: Final = 1 << 63  # what torch's generators take


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PosthocSettings:
    """How a model is compressed without training, beside what the plan says of each weight.

    Args:
        compute: what layers compute in; None: `int8` if the plan sets activation_bits, else `float`.
        calibration_method: how activation ranges are chosen, a key of `posthoc.calibration.METHODS`.
        percentile: the upper percentile, above 50 and at most 100; used by the method `percentile`.
        placement: which activations are quantized; see `graph.sites.activation_sites`.
        reduce_range: whether 8-bit weights keep to 7 bits, for CPUs whose sums of products saturate (no VNNI).
        effort: `fast` takes the nearest levels; `balanced` solves weights and biases on the calibration data; `best`
            then tunes all layers together, and needs compute `float`. None: `balanced` if there is calibration data, or
            if inputs can be synthesised.
        synthetic: whether inputs are synthesised if there is no calibration data; see `posthoc.synthesis`.
        solver: how `balanced` and `best` find codes, a key of `solvers.SOLVERS`.
        seed: of the synthesised inputs, at least 0.

    Raises:
        ConfigError: an unknown effort or method, or a percentile or seed out of range.
    """

    compute: Compute | None = None
    calibration_method: str = "mse"
    percentile: float = 99.99
    placement: "Placement" = "deploy"
    reduce_range: bool = False
    effort: Effort | None = None
    synthetic: bool = True
    solver: str = "gptq"
    seed: int = 0

    def __post_init__(self) -> None:
        check_method(self.calibration_method, self.percentile)
        efforts = get_args(Effort)
        if self.effort is not None and self.effort not in efforts:
            raise ConfigError(
                f"effort must be one of {', '.join(efforts)}, got {self.effort!r}.{did_you_mean(self.effort, efforts)}"
            )
        if not 0 <= self.seed < _SEEDS:
            raise ConfigError(f"seed must be at least 0 and below 2**63, got {self.seed!r}.")


DEFAULTS: Final = PosthocSettings()


def check_effort(effort: Effort | None, compute: Compute) -> None:
    """Refuse an effort that cannot be had with the compute.

    Raises:
        ConfigError: effort `best` with another compute than `float`.
    """
    if effort == "best" and compute != "float":
        raise ConfigError(f'effort "best" works with compute "float" only, got compute "{compute}"; use "balanced".')
