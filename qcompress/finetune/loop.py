"""A plain training loop that yields records and prints nothing."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from qcompress.errors import ConfigError
from qcompress.finetune.config import LoopConfig
from qcompress.finetune.losses import Loss, Objective, cross_entropy, distillation
from qcompress.finetune.prepared import Inputs, Prepared
from qcompress.finetune.trainer import StepRecord, Trainer


class Batches(Protocol):
    """Batches with a length, such as a DataLoader."""

    def __len__(self) -> int:
        """Returns the number of batches."""

    def __iter__(self) -> Iterator[Any]:
        """Yields pairs (inputs, target)."""


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
        teacher: a float model, switched to eval mode; its outputs replace the targets of the batches, or the loss has
            both, see `LoopConfig.kd_weight`.

    Yields:
        A record after each step.

    Raises:
        ConfigError: the teacher shares parameters with the model in training.
        DivergenceError: a loss or a gradient is not finite, or a scale collapsed. The message names step and layer. The
            model is then in its last good state, at most 50 steps back.

    >>> import torch
    >>> from qcompress.finetune.attach import prepare
    >>> from qcompress.plan.plan import Plan
    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(64, 4), torch.arange(64) % 2
    >>> tuned = prepare(nn.Linear(4, 2), Plan.from_flags(bits=2), example_inputs=(x,))
    >>> losses = [record.loss for record in train(tuned, [(x, y)], LoopConfig(epochs=20, rate=0.1))]
    >>> len(losses), losses[-1] < losses[0]
    (20, True)
    """
    if teacher is not None:
        own = {id(parameter) for parameter in prepared.parameters()}
        if any(id(parameter) in own for parameter in teacher.parameters()):
            raise ConfigError(
                "train: the teacher must not share parameters with the model in training; "
                "pass a copy.deepcopy made before prepare()."
            )
        teacher.eval()
    distance = loss or partial(distillation, temperature=config.temperature)
    objective = Objective(loss or cross_entropy, distance, config.kd_weight)
    trainer = Trainer(
        prepared,
        config,
        len(batches),
        objective,
        forward=call,
        teacher=None if teacher is None else lambda inputs: call(teacher, inputs),
    )
    for _ in range(config.epochs):
        for inputs, target in batches:
            yield trainer.take(inputs, target)
    trainer.check()


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Returns a model's outputs for one batch: a tensor, several by position, or by name."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(inputs) if isinstance(inputs, Tensor) else model(*inputs)
