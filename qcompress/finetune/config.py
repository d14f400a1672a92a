"""The settings of a training run that its arithmetic depends on."""

import math
from dataclasses import dataclass
from typing import Any, Final, Literal, final, get_args

from qcompress.errors import ConfigError

Stage = Literal["S1", "S2", "S3"]
Optimizer = Literal["adamw", "adam", "sgd"]
Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["float32", "bfloat16", "float16"]

_CHOICES: Final[dict[str, Any]] = {
    "optimizer": Optimizer,
    "schedule": Schedule,
    "stage": Stage,
    "precision": Precision,
}
_RANGES: Final = {
    "epochs": (1, math.inf), "rate": (0, math.inf), "quantizer_rate": (0, math.inf), "weight_decay": (0, math.inf),
    "clip": (0, math.inf), "warm_up": (0, 1), "snap_offsets": (0, 1), "settle": (0, 1),
    "kd_weight": (0, 1), "temperature": (0, math.inf),
}  # fmt: skip


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """The settings of `train`.

    Args:
        epochs: passes over the data.
        optimizer: "adamw", "adam" or "sgd" (momentum 0.9).
        nesterov: whether "sgd" uses Nesterov's momentum.
        rate: highest learning rate of the model's own parameters.
        quantizer_rate: learning rate of the quantizers' parameters as a fraction of `rate`; 0.1 for N2UQ.
        weight_decay: for tensors with two or more axes.
        clip: largest norm of the gradient of all parameters; a larger one is scaled down to it. 0: there is no limit.
        schedule: how learning rates go from the highest one: "cosine" or "linear" to 0, or "constant".
        warm_up: share of all steps in which learning rates rise, in [0, 1].
        stage: when regularizers are active, as in "bin regularization": "S1" always; "S2" after the first third of the
            epochs, rounded down; "S3" in every other epoch, in which the weights' scales do not change.
        snap_offsets: share of the steps, at the end, in which offsets stay at values that zero points can store.
        free_inputs: whether offsets of inputs of few bits never snap; see `Prepared.snap_offsets`.
        settle: share of the steps, at the end, in which the model computes with the biases and offsets that the file
            can hold; see `Prepared.settle`.
        kd_weight: with a teacher and labels, the weight of the teacher's outputs in the loss, in [0, 1]; the labels get
            the rest. 1: labels are not used.
        temperature: divides the logits of the teacher and of the model in `distillation`, > 0.
        precision: what layers compute in while training: "float32", or "bfloat16" or "float16" by autocast.

    Raises:
        ConfigError: an argument is invalid.
    """

    epochs: int
    optimizer: Optimizer = "adamw"
    nesterov: bool = False
    rate: float = 1e-3
    quantizer_rate: float = 1.0
    weight_decay: float = 0.0
    clip: float = 0.0
    schedule: Schedule = "cosine"
    warm_up: float = 0.0
    stage: Stage = "S2"
    snap_offsets: float = 0.5
    free_inputs: bool = True
    settle: float = 0.1
    kd_weight: float = 1.0
    temperature: float = 1.0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        for name, kinds in _CHOICES.items():
            if getattr(self, name) not in get_args(kinds):
                known = ", ".join(get_args(kinds))
                raise ConfigError(f"LoopConfig.{name} must be one of {known}, got {getattr(self, name)!r}.")
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"LoopConfig.{name} must be in [{low}, {high}], got {getattr(self, name)!r}.")
        if self.temperature == 0:
            raise ConfigError("LoopConfig.temperature must be positive, got 0.")
        if self.nesterov and self.optimizer != "sgd":
            raise ConfigError(f"LoopConfig.nesterov needs the optimizer sgd, got {self.optimizer!r}.")

    def regularizes(self, epoch: int, epochs: int | None = None) -> bool:
        """Returns whether regularizers are active in an epoch.

        Args:
            epoch: counted from 0.
            epochs: of the whole run, where its time is limited; None: as configured.

        >>> [[LoopConfig(epochs=6, stage=stage).regularizes(e) for e in range(6)].count(True) for stage in ("S2", "S3")]
        [4, 3]
        """
        return {"S1": True, "S2": epoch >= (epochs or self.epochs) // 3, "S3": epoch % 2 == 1}[self.stage]

    def holds_scales(self, epoch: int) -> bool:
        """Returns whether the scales of weights stay as they are in an epoch, counted from 0."""
        return self.stage == "S3" and self.regularizes(epoch)

    def share_of_rate(self, done: float) -> float:
        """Returns the learning rate as a fraction of the highest one, after a share of all steps.

        >>> [round(LoopConfig(epochs=1, warm_up=0.5).share_of_rate(done), 3) for done in (0.25, 0.5, 0.75)]
        [0.5, 1.0, 0.5]
        """
        if done < self.warm_up:
            return done / self.warm_up
        left = (1 - done) / (1 - self.warm_up) if self.warm_up < 1 else 1.0
        return {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[self.schedule]
