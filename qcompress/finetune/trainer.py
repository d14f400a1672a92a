"""Trains a prepared model one step at a time; between two steps its whole state can be saved and restored."""

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

from qcompress.errors import ConfigError, DivergenceError
from qcompress.finetune.config import LoopConfig
from qcompress.finetune.losses import Objective
from qcompress.finetune.prepared import Prepared
from qcompress.quantizers.base import AbstractQuantizer

_KEPT_EVERY: Final = 50  # steps between copies of the state, to return to after divergence
_DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@final
@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step, counted from 0 over all epochs. Reading a loss waits for the device.

    Args:
        epoch: counted from 0.
        step: counted from 0 over all epochs.
        whole: the loss with `Prepared.penalty`, 0-d.
        task: the loss without it, 0-d.
    """

    epoch: int
    step: int
    whole: Tensor
    task: Tensor

    @property
    def loss(self) -> float:
        """The loss with `Prepared.penalty`."""
        return float(self.whole)

    @property
    def task_loss(self) -> float:
        """The loss without it."""
        return float(self.task)


@final
@dataclass(frozen=True, slots=True)
class TrainingState:
    """All that a training run needs to go on.

    Args:
        tensors: by name.
        values: what JSON can hold.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]


@final
class Trainer:
    """Takes the steps of a training run.

    Args:
        prepared: the model; it is put in training mode.
        config: the settings.
        steps_per_epoch: batches of an epoch, at least 1.
        objective: the loss.
        forward: (model, inputs) -> outputs.
        teacher: inputs -> its outputs; None: there is no teacher.
        average: called with the list of gradients after each backward pass, for training in several processes; it
            changes them in place. None: there is one process.

    Attributes:
        step: steps that are done.
        total: steps of the whole run; schedules end there. It may be lowered while training.
    """

    def __init__(
        self,
        prepared: Prepared,
        config: LoopConfig,
        steps_per_epoch: int,
        objective: Objective,
        *,
        forward: Callable[[Prepared, Any], Any],
        teacher: Callable[[Any], Any] | None = None,
        average: Callable[[list[Tensor]], None] | None = None,
    ) -> None:
        if steps_per_epoch < 1:
            raise ConfigError("Training needs at least one batch, got none.")
        self.prepared, self.config, self.steps_per_epoch = prepared, config, steps_per_epoch
        self.step, self.total = 0, config.epochs * steps_per_epoch
        self._objective, self._forward, self._teacher, self._average = objective, forward, teacher, average
        self._optimizer = _optimizer(prepared, config)
        device = next(prepared.parameters()).device
        self._scaler = torch.amp.GradScaler(device.type) if config.precision == "float16" else None
        self._device = device
        self._check_every = _KEPT_EVERY if device.type != "cpu" else 1  # a check waits for the device
        self._loss = torch.zeros((), device=device)
        prepared.train()
        self._good = copy.deepcopy(prepared.state_dict())

    @property
    def epoch(self) -> int:
        """The epoch of the next step."""
        return self.step // self.steps_per_epoch

    @property
    def epochs(self) -> int:
        """Epochs of the whole run, the last one perhaps cut short."""
        return -(-self.total // self.steps_per_epoch)

    def take(self, inputs: Any, target: Any) -> StepRecord:
        """Takes a step.

        Args:
            inputs: what `forward` takes.
            target: what the loss takes.

        Raises:
            DivergenceError: a loss or a gradient is not finite, or a scale collapsed. The model is then in its last
                good state.
        """
        config, epoch = self.config, self.epoch
        for group in self._optimizer.param_groups:
            group["lr"] = group["highest"] * config.share_of_rate((self.step + 1) / (self.total + 1))
        self.prepared.step(self.step / self.total)
        if self.step >= (1 - config.snap_offsets) * self.total:
            self.prepared.snap_offsets(inputs=not config.free_inputs)
        if self.step >= (1 - config.settle) * self.total:
            self.prepared.settle(inputs=not config.free_inputs)
        with self._autocast():
            taught = None
            if self._teacher is not None:
                with torch.no_grad():
                    taught = self._teacher(inputs)
            outputs = self._forward(self.prepared, inputs)
            task = self._objective(outputs, target, taught)
        whole = task + self.prepared.penalty(regularizers=config.regularizes(epoch, self.epochs))
        self._optimizer.zero_grad(set_to_none=True)
        self._backward(whole)
        self._loss = whole.detach()
        if self.step % self._check_every == 0:
            self.check(inputs)
        if config.holds_scales(epoch):
            self.prepared.hold_scales()
        if config.clip:
            torch.nn.utils.clip_grad_norm_(self.prepared.parameters(), config.clip)
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        self.step += 1
        return StepRecord(epoch, self.step - 1, whole.detach(), task.detach())

    def check(self, inputs: Any = None) -> None:
        """Checks that all is well after the last step: what is not finite stays so. It waits for the device.

        Args:
            inputs: of the last step, with which the layer at fault is searched.

        Raises:
            DivergenceError: see `take`.
        """
        # A scaler skips steps whose gradients overflow.
        is_good = self.prepared.is_good(self._loss) if self._scaler is None else self._loss.isfinite()
        if bool(is_good):
            if self.step % _KEPT_EVERY == 0:
                self._good = copy.deepcopy(self.prepared.state_dict())
            return
        wrong = self._what_is_wrong(inputs)
        self.prepared.load_state_dict(self._good)
        raise DivergenceError(
            f"Step {self.step}: {wrong}. The model is back in its last good state; try a lower learning rate, a longer "
            "warm-up, or more bits for that layer."
        )

    def state(self) -> TrainingState:
        """Returns the state as copies on the CPU."""
        tensors, extras = {}, {}
        quantizers = {name for name, part in self.prepared.named_modules() if isinstance(part, AbstractQuantizer)}
        for key, value in self.prepared.state_dict().items():
            if isinstance(value, Tensor):
                tensors[f"model.{key}"] = value
            elif key.rpartition(".")[0] in quantizers:  # the extra state of the model's own modules stays as it is
                extras[key] = value
        for i, slots in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in slots.items() if isinstance(value, Tensor)}
        tensors["random.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        copies = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
        values = {"step": self.step, "total": self.total, "extras": extras}
        if self._scaler is not None:
            values["scaler"] = self._scaler.state_dict()
        return TrainingState(copies, values)

    def restore(self, state: TrainingState) -> None:
        """Goes on from a state that `state` returned for the same model and settings.

        Raises:
            ConfigError: it belongs to another model, or to other settings.
        """
        own, values, device = self.prepared.state_dict(), state.values, self._device
        loaded = _under("model.", state.tensors)
        wanted = {key: value for key, value in own.items() if isinstance(value, Tensor)}
        if {k: v.shape for k, v in loaded.items()} != {k: v.shape for k, v in wanted.items()}:
            raise ConfigError("The checkpoint belongs to another model or plan; resume with the command that made it.")
        self.prepared.load_state_dict({**own, **loaded, **values["extras"]})
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in _under("optimizer.", state.tensors).items():
            i, _, name = key.partition(".")
            slots.setdefault(int(i), {})[name] = value if name == "step" else value.to(device)
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.step, self.total = values["step"], values["total"]
        torch.set_rng_state(state.tensors["random.cpu"])
        if device.type == "cuda" and "random.cuda" in state.tensors:
            torch.cuda.set_rng_state(state.tensors["random.cuda"])
        if self._scaler is not None:
            self._scaler.load_state_dict(values["scaler"])
        self._good = copy.deepcopy(self.prepared.state_dict())

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = _DTYPES.get(self.config.precision)
        return contextlib.nullcontext() if dtype is None else torch.autocast(self._device.type, dtype)

    def _backward(self, whole: Tensor) -> None:
        """Computes the gradients, averaged over processes."""
        if self._scaler is None:
            whole.backward()  # type: ignore[no-untyped-call]
        else:
            self._scaler.scale(whole).backward()  # type: ignore[no-untyped-call]
            self._scaler.unscale_(self._optimizer)
        if self._average is not None:
            self._average([p.grad for p in self.prepared.parameters() if p.grad is not None])

    def _what_is_wrong(self, inputs: Any) -> str:
        prepared = self.prepared
        gradients = {name: p.grad for name, p in prepared.named_parameters() if p.grad is not None}
        wrong = next((name for name, gradient in gradients.items() if not gradient.isfinite().all()), None)
        if not self._loss.isfinite():
            where = None if inputs is None else prepared.first_not_finite(inputs)
            return f"the loss is {float(self._loss)}" + (f"; the first NaN or Inf appears at {where}" if where else "")
        if wrong is not None:
            return f"the gradient of {wrong} is not finite"
        collapsed = next((name for name, quantizer in prepared.quantizers().items() if quantizer.collapsed), None)
        if collapsed is not None:
            return f"the scale of {collapsed} collapsed to a thousandth of its start"
        return "the gradients are too large to be added"


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


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
        return torch.optim.SGD(groups, lr=config.rate, momentum=0.9, nesterov=config.nesterov)
    return (torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam)(groups, lr=config.rate)
