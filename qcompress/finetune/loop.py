"""A plain training loop: straight code that yields records and prints nothing."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, final, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from qcompress.errors import ConfigError, DivergenceError
from qcompress.finetune.attach import Inputs, Prepared

Loss = Callable[[Any, Any], Tensor]
Stage = Literal["S1", "S2", "S3"]
Optimizer = Literal["adamw", "sgd"]
Schedule = Literal["cosine", "linear"]


class Batches(Protocol):
    """What a DataLoader is."""

    def __len__(self) -> int:
        """How many there are."""

    def __iter__(self) -> Iterator[Any]:
        """(inputs, target), one after another."""


_KEPT_EVERY: Final = 50  # steps between copies of the state that a loop that diverged goes back to


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """How a prepared model is trained.

    Args:
        epochs: passes over the data.
        optimizer: "adamw" or "sgd" (momentum 0.9).
        rate: highest learning rate of the model's own parameters.
        quantizer_rate: of what quantizers learn, in parts of `rate`: N2UQ takes a tenth.
        weight_decay: of tensors with two axes or more.
        schedule: how rates fall to 0, "cosine" or "linear".
        warm_up: share of all steps in which they rise.
        stage: when regularizers act, as "bin regularization" has it: "S1" from the start, "S2" in the last two thirds
            of the epochs, "S3" in every other epoch.
        snap_offsets: share of the steps, the last ones, in which offsets keep to zero points.

    Raises:
        ConfigError: one of them is none.
    """

    epochs: int
    optimizer: Optimizer = "adamw"
    rate: float = 1e-3
    quantizer_rate: float = 1.0
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"
    warm_up: float = 0.0
    stage: Stage = "S1"
    snap_offsets: float = 0.5

    def __post_init__(self) -> None:
        for name, kinds in (("optimizer", Optimizer), ("schedule", Schedule), ("stage", Stage)):
            if getattr(self, name) not in get_args(kinds):
                known = ", ".join(get_args(kinds))
                raise ConfigError(f"LoopConfig.{name} must be one of {known}, got {getattr(self, name)!r}.")
        for name, low, high in (
            ("epochs", 1, math.inf), ("rate", 0, math.inf), ("quantizer_rate", 0, math.inf),
            ("weight_decay", 0, math.inf), ("warm_up", 0, 1), ("snap_offsets", 0, 1),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"LoopConfig.{name} must be in [{low}, {high}], got {getattr(self, name)!r}.")

    def regularizes(self, epoch: int) -> bool:
        """Whether regularizers act in an epoch, counted from 0.

        >>> [[LoopConfig(epochs=6, stage=stage).regularizes(e) for e in range(6)].count(True) for stage in ("S2", "S3")]
        [4, 3]
        """
        return {"S1": True, "S2": epoch >= self.epochs / 3, "S3": epoch % 2 == 1}[self.stage]

    def share_of_rate(self, done: float) -> float:
        """The learning rate in parts of the highest, by the share of all steps that is done.

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
    """One step: counted from 0 over all epochs; the loss with and without the regularizers' terms."""

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
    """Train a prepared model; nothing happens until records are asked for.

    Args:
        prepared: left in training mode.
        batches: of (inputs, target), gone through once an epoch; its length is told, as a DataLoader's is.
        config: how.
        loss: (outputs, target) -> 0-d; None: cross entropy, and with a teacher that of its softened outputs.
        teacher: the float model, switched to eval mode: what it returns is the target, and that of the batches is not
            looked at.

    Raises:
        ConfigError: the teacher is the model in training.
        DivergenceError: a loss or a gradient is not finite, or a scale collapsed; names layer and step. The model then
            is in its last good state, at most 50 steps back.

    >>> from qcompress.finetune.attach import prepare
    >>> from qcompress.plan import Plan
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
            raise ConfigError("train: the teacher must be a model of its own: copy.deepcopy it before prepare.")
        teacher.eval()
    optimizer, total = _optimizer(prepared, config), config.epochs * len(batches)
    prepared.train()
    good, step = copy.deepcopy(prepared.state_dict()), 0
    for epoch in range(config.epochs):
        for inputs, target in batches:
            for group in optimizer.param_groups:
                group["lr"] = group["highest"] * config.share_of_rate((step + 1) / (total + 1))
            if step >= (1 - config.snap_offsets) * total:
                prepared.snap_offsets()
            if teacher is not None:
                with torch.no_grad():
                    target = call(teacher, inputs)
            task_loss = loss(call(prepared, inputs), target)
            whole = task_loss + prepared.penalty() if config.regularizes(epoch) else task_loss
            optimizer.zero_grad(set_to_none=True)
            whole.backward()  # type: ignore[no-untyped-call]
            if wrong := _wrong(prepared, whole, inputs):
                prepared.load_state_dict(good)
                raise DivergenceError(
                    f"Step {step}: {wrong}. The model is back in its last good state: try a lower learning rate, a "
                    "longer warm-up, or more bits there."
                )
            if step % _KEPT_EVERY == 0:
                good = copy.deepcopy(prepared.state_dict())
            optimizer.step()
            yield StepRecord(epoch, step, float(whole.detach()), float(task_loss.detach()))
            step += 1


def distillation(outputs: Tensor, wanted: Tensor) -> Tensor:
    """KL divergence of softmax outputs from those of a teacher, mean over the batch.

    Args:
        outputs: logits [batch, classes].
        wanted: the teacher's.

    >>> distillation(torch.zeros(2, 3), torch.zeros(2, 3)).item()
    0.0
    """
    return functional.kl_div(outputs.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)


def call(model: nn.Module, inputs: Inputs) -> Any:
    """What a model returns for one batch: a tensor, several by position, or by name."""
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
    """What is wrong behind a backward pass, and where; None: nothing."""
    if not torch.isfinite(loss):
        where = prepared.first_not_finite(inputs)
        return f"the loss is {float(loss.detach())}" + (f"; the first NaN or Inf is that of {where}" if where else "")
    found = [(name, p.grad) for name, p in prepared.named_parameters() if p.grad is not None]
    if not torch.stack(torch._foreach_norm([g for _, g in found])).isfinite().all():  # which large ones may overflow
        wrong = next((name for name, g in found if not g.isfinite().all()), None)
        if wrong is not None:
            return f"the gradient of {wrong} is not finite"
    collapsed = next((name for name, quantizer in prepared.quantizers().items() if quantizer.collapsed), None)
    return None if collapsed is None else f"the scale of {collapsed} collapsed to a thousandth of its start"
