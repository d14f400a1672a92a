"""A plain training loop that yields records and prints nothing."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, final, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from qcompress.errors import ConfigError, DivergenceError
from qcompress.finetune.prepared import Inputs, Prepared

Loss = Callable[[Any, Any], Tensor]
Stage = Literal["S1", "S2", "S3"]
Optimizer = Literal["adamw", "sgd"]
Schedule = Literal["cosine", "linear"]


class Batches(Protocol):
    """Batches with a length, such as a DataLoader."""

    def __len__(self) -> int:
        """Returns the number of batches."""

    def __iter__(self) -> Iterator[Any]:
        """Yields pairs (inputs, target)."""


_KEPT_EVERY: Final = 50  # steps between copies of the state, to return to after divergence


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """The settings of `train`.

    Args:
        epochs: passes over the data.
        optimizer: "adamw" or "sgd" (momentum 0.9).
        rate: highest learning rate of the model's own parameters.
        quantizer_rate: learning rate of the quantizers' parameters as a fraction of `rate`; 0.1 for N2UQ.
        weight_decay: for tensors with two or more axes.
        schedule: how learning rates fall to 0: "cosine" or "linear".
        warm_up: share of all steps in which learning rates rise, in [0, 1].
        stage: when regularizers are active, as in "bin regularization": "S1" always; "S2" after the first third of the
            epochs, rounded down; "S3" in every other epoch, in which the weights' scales do not change.
        snap_offsets: share of the steps, at the end, in which offsets stay at values that zero points can store.
        settle: share of the steps, at the end, in which the model computes with the biases and offsets that the file
            can hold; see `Prepared.settle`.

    Raises:
        ConfigError: an argument is invalid.
    """

    epochs: int
    optimizer: Optimizer = "adamw"
    rate: float = 1e-3
    quantizer_rate: float = 1.0
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"
    warm_up: float = 0.0
    stage: Stage = "S2"
    snap_offsets: float = 0.5
    settle: float = 0.1

    def __post_init__(self) -> None:
        for name, kinds in (("optimizer", Optimizer), ("schedule", Schedule), ("stage", Stage)):
            if getattr(self, name) not in get_args(kinds):
                known = ", ".join(get_args(kinds))
                raise ConfigError(f"LoopConfig.{name} must be one of {known}, got {getattr(self, name)!r}.")
        for name, low, high in (
            ("epochs", 1, math.inf), ("rate", 0, math.inf), ("quantizer_rate", 0, math.inf),
            ("weight_decay", 0, math.inf), ("warm_up", 0, 1), ("snap_offsets", 0, 1), ("settle", 0, 1),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"LoopConfig.{name} must be in [{low}, {high}], got {getattr(self, name)!r}.")

    def regularizes(self, epoch: int) -> bool:
        """Returns whether regularizers are active in an epoch, counted from 0.

        >>> [[LoopConfig(epochs=6, stage=stage).regularizes(e) for e in range(6)].count(True) for stage in ("S2", "S3")]
        [4, 3]
        """
        return {"S1": True, "S2": epoch >= self.epochs // 3, "S3": epoch % 2 == 1}[self.stage]

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
        return left if self.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2


@final
@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step, counted from 0 over all epochs, and its loss with and without `Prepared.penalty`."""

    epoch: int
    step: int
    loss: float
    task_loss: float


def train(
    prepared: Prepared,
    batches: Batches,
    config: LoopConfig,
    *,
    loss: Loss | None = None,
    teacher: nn.Module | None = None,
) -> Iterator[StepRecord]:
    """Trains a prepared model while the caller iterates over the records.

    Args:
        prepared: the model, left in training mode.
        batches: pairs (inputs, target), iterated once per epoch; needs a length, as a DataLoader has.
        config: the settings.
        loss: (outputs, target) -> 0-d; None: cross entropy, or `distillation` with a teacher.
        teacher: a float model, switched to eval mode; its outputs replace the targets of the batches.

    Yields:
        A record after each step.

    Raises:
        ConfigError: the teacher shares parameters with the model in training.
        DivergenceError: a loss or a gradient is not finite, or a scale collapsed. The message names step and layer. The
            model is then in its last good state, at most 50 steps back.

    >>> from qcompress.finetune.attach import prepare
    >>> from qcompress.plan.plan import Plan
    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(64, 4), torch.arange(64) % 2
    >>> tuned = prepare(nn.Linear(4, 2), Plan.from_flags(bits=2), example_inputs=(x,))
    >>> losses = [record.loss for record in train(tuned, [(x, y)], LoopConfig(epochs=20, rate=0.1))]
    >>> len(losses), losses[-1] < losses[0]
    (20, True)
    """
    loss = loss or (functional.cross_entropy if teacher is None else distillation)
    if teacher is not None:
        own = {id(parameter) for parameter in prepared.parameters()}
        if any(id(parameter) in own for parameter in teacher.parameters()):
            raise ConfigError(
                "train: the teacher must not share parameters with the model in training; "
                "pass a copy.deepcopy made before prepare()."
            )
        teacher.eval()
    optimizer, total = _optimizer(prepared, config), config.epochs * len(batches)
    prepared.train()
    good, step = copy.deepcopy(prepared.state_dict()), 0
    for epoch in range(config.epochs):
        for inputs, target in batches:
            for group in optimizer.param_groups:
                group["lr"] = group["highest"] * config.share_of_rate((step + 1) / (total + 1))
            prepared.step(step / total)
            if step >= (1 - config.snap_offsets) * total:
                prepared.snap_offsets()
            if step >= (1 - config.settle) * total:
                prepared.settle()
            if teacher is not None:
                with torch.no_grad():
                    target = call(teacher, inputs)
            task_loss = loss(call(prepared, inputs), target)
            whole = task_loss + prepared.penalty(regularizers=config.regularizes(epoch))
            optimizer.zero_grad(set_to_none=True)
            whole.backward()  # type: ignore[no-untyped-call]
            if wrong := _wrong(prepared, whole, inputs):
                prepared.load_state_dict(good)
                raise DivergenceError(
                    f"Step {step}: {wrong}. The model is back in its last good state; try a lower learning rate, a "
                    "longer warm-up, or more bits for that layer."
                )
            if step % _KEPT_EVERY == 0:
                good = copy.deepcopy(prepared.state_dict())
            if config.holds_scales(epoch):
                prepared.hold_scales()
            optimizer.step()
            yield StepRecord(epoch, step, float(whole.detach()), float(task_loss.detach()))
            step += 1


def distillation(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Returns the KL divergence of softmax outputs from a teacher's, averaged over the batch.

    Args:
        outputs: logits [batch, classes].
        wanted: the teacher's logits [batch, classes].

    >>> distillation(torch.zeros(2, 3), torch.zeros(2, 3)).item()
    0.0
    """
    return functional.kl_div(outputs.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Returns a model's outputs for one batch: a tensor, several by position, or by name."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(inputs) if isinstance(inputs, Tensor) else model(*inputs)


def _optimizer(prepared: Prepared, config: LoopConfig) -> torch.optim.Optimizer:
    learned = {id(p) for p in prepared.quantizer_parameters()}
    own = [p for p in prepared.parameters() if id(p) not in learned and p.requires_grad]
    groups = [
        {"params": [p for p in own if p.ndim > 1], "highest": config.rate, "weight_decay": config.weight_decay},
        {"params": [p for p in own if p.ndim <= 1], "highest": config.rate, "weight_decay": 0.0},
        {
            "params": prepared.quantizer_parameters(),
            "highest": config.rate * config.quantizer_rate,
            "weight_decay": 0.0,
        },
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=config.rate)


def _wrong(prepared: Prepared, loss: Tensor, inputs: Inputs) -> str | None:
    """Returns what is wrong after a backward pass, and where; None: all is well."""
    if not torch.isfinite(loss):
        where = prepared.first_not_finite(inputs)
        return f"the loss is {float(loss.detach())}" + (f"; the first NaN or Inf appears at {where}" if where else "")
    found = [(name, p.grad) for name, p in prepared.named_parameters() if p.grad is not None]
    if (
        not torch.stack(torch._foreach_norm([g for _, g in found])).isfinite().all()
    ):  # norms of large gradients may overflow
        wrong = next((name for name, g in found if not g.isfinite().all()), None)
        if wrong is not None:
            return f"the gradient of {wrong} is not finite"
    collapsed = next((name for name, quantizer in prepared.quantizers().items() if quantizer.collapsed), None)
    return None if collapsed is None else f"the scale of {collapsed} collapsed to a thousandth of its start"
