"""A training run that can be left alone: epochs, validation, checkpoints, a history, and the compressed folder."""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Final, final

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from qcompress.compressed.folder import WEIGHTS
from qcompress.data.training import TrainingBatches
from qcompress.files import write_whole
from qcompress.finetune.checkpoints import Checkpoints
from qcompress.finetune.history import QUANTIZER_COLUMNS, EpochRow, QuantizerRow, csv_text, quantizer_values
from qcompress.finetune.prepared import Prepared
from qcompress.finetune.processes import Processes
from qcompress.finetune.run_folder import FLOAT, HISTORY, QUANTIZERS, TRAINING, write_compressed, write_float
from qcompress.finetune.scoring import hardened, in_training
from qcompress.finetune.trainer import StepRecord, Trainer, TrainingState
from qcompress.metrics.result import MetricResult

_AGREED_EVERY: Final = 10  # steps after which several processes tell each other whether to stop
_TIMED: Final = 20  # steps whose time tells how many fit into the limit


class Interruption(Exception):  # noqa: N818 - not an error
    """Training was asked to stop; a checkpoint was written."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """When checkpoints are written, and when training ends.

    Args:
        steps: steps between checkpoints; None: no number of steps.
        seconds: between checkpoints; None: no time.
        keep: how many of the last checkpoints stay.
        most_seconds: of training; None: no limit. The first steps tell how many fit, and schedules end with these.
    """

    steps: int | None = None
    seconds: float | None = 600.0
    keep: int = 2
    most_seconds: float | None = None


# Compares the model, which is in eval mode, with the original.
Validation = Callable[[Prepared], MetricResult]


@final
@dataclass(slots=True)
class _Progress:
    """What a run remembers beside the trainer."""

    rows: list[EpochRow] = field(default_factory=list)
    quantizers: list[QuantizerRow] = field(default_factory=list)
    best: MetricResult | None = None
    best_epoch: int | None = None


@final
class Run:
    """Trains in a folder.

    Args:
        trainer: takes the steps; its `steps_per_epoch` is the length of the batches.
        batches: seeded batches.
        folder: becomes a compressed folder, with the training's files beside.
        pace: checkpoints and limits.
        validation: how epochs are compared; None: the last one counts.
        reestimate: batches over which BatchNorm's statistics are computed anew for models that are scored or written.
        stop: asked after each step whether to stop.
        saves_float: whether the float model is saved in place of a compressed one.
        processes: those that train together; the first one writes files.

    Attributes:
        rows: the history.
        best_epoch: counted from 1; None without validation data.
        best: how the model of that epoch compares with the original.
    """

    def __init__(
        self,
        trainer: Trainer,
        batches: TrainingBatches,
        folder: Path,
        pace: Pace,
        *,
        validation: Validation | None = None,
        reestimate: int = 0,
        stop: Callable[[], bool] = lambda: False,
        saves_float: bool = False,
        processes: Processes | None = None,
    ) -> None:
        self._trainer, self._batches, self._folder, self._pace = trainer, batches, folder, pace
        self._validation, self._reestimate, self._stop = validation, reestimate, stop
        self._save, self._weights = (write_float, FLOAT) if saves_float else (write_compressed, WEIGHTS)
        device = next(trainer.prepared.parameters()).device
        self._processes = processes or Processes(str(device))
        self._writes = self._processes.is_first
        self._checkpoints = Checkpoints(folder / TRAINING, pace.keep)
        self._progress = _Progress()
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._last_checkpoint, self._spent, self._started = time.monotonic(), 0.0, time.monotonic()

    @property
    def rows(self) -> list[EpochRow]:
        return self._progress.rows

    @property
    def best_epoch(self) -> int | None:
        return self._progress.best_epoch

    @property
    def best(self) -> MetricResult | None:
        return self._progress.best

    @property
    def errors(self) -> dict[str, float]:
        """The relative distance of each weight as stored from its float value, at the end of the kept epoch."""
        kept = self.best_epoch or len(self.rows)
        return {
            name: value for epoch, name, what, value in self._progress.quantizers if (epoch, what) == (kept, "error")
        }

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self._trainer.step

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self._trainer.total

    @property
    def epochs(self) -> int:
        """Epochs of the whole run, the last one perhaps cut short."""
        return self._trainer.epochs

    def resume(self) -> bool:
        """Goes on from the last checkpoint; returns whether there is one.

        Raises:
            ConfigError: the checkpoint belongs to another model or plan.
            SourceError: no checkpoint can be read.
        """
        state = self._checkpoints.latest()
        if state is None:
            return False
        self._sums = state.tensors.pop("run.sums").to(self._sums.device)
        self._trainer.restore(state)
        kept = state.values["run"]
        rows = [EpochRow(**row) for row in kept["rows"]]
        quantizers = [(epoch, tensor, what, value) for epoch, tensor, what, value in kept["quantizers"]]
        best = kept["best"]
        best = None if best is None else MetricResult.from_dict(best)
        self._progress = _Progress(rows, quantizers, best, kept["best_epoch"])
        self._spent = kept["seconds"]
        self._write_history()
        return True

    def steps(self) -> Iterator[StepRecord]:
        """Trains to the end while the caller iterates over the steps.

        Raises:
            DivergenceError: a loss or a gradient is not finite, or a scale collapsed. The last checkpoint is good.
            Interruption: `stop` asked for it.
            OutputError: a file cannot be written. The last checkpoint is good.
        """
        trainer = self._trainer
        self._started = self._last_checkpoint = time.monotonic()
        while trainer.step < trainer.total:
            first = trainer.step % trainer.steps_per_epoch
            for inputs, labels in self._batches.epoch(trainer.epoch, first):
                record = trainer.take(inputs, labels)
                self._sums += torch.stack([record.whole, record.task]).double()
                self._limit()
                ended = trainer.step % trainer.steps_per_epoch == 0 or trainer.step >= trainer.total
                if ended:
                    self._end_epoch(record.epoch)
                if ended or self._is_due():
                    self.checkpoint()
                yield record
                if self._is_told_to_stop():
                    self.checkpoint()
                    raise Interruption
                if trainer.step >= trainer.total:
                    break

    def checkpoint(self) -> None:
        """Writes a checkpoint.

        Raises:
            DivergenceError: the state is not good.
            OutputError: it cannot be written.
        """
        self._trainer.check()
        self._last_checkpoint = time.monotonic()
        if not self._writes:
            return
        state = self._trainer.state()
        kept = self._progress
        values = {
            "rows": [asdict(row) for row in kept.rows],
            "quantizers": kept.quantizers,
            "best": None if kept.best is None else asdict(kept.best),
            "best_epoch": kept.best_epoch,
            "seconds": self.seconds,
        }
        sums = {"run.sums": self._sums.detach().cpu().clone()}
        self._checkpoints.write(TrainingState(state.tensors | sums, {**state.values, "run": values}))
        if not (self._folder / self._weights).exists():
            with self._as_stored():
                self._write_model()

    @property
    def seconds(self) -> float:
        """Time of training, earlier runs included."""
        return self._spent + time.monotonic() - self._started

    def _is_due(self) -> bool:
        pace = self._pace
        by_steps = pace.steps is not None and self._trainer.step % pace.steps == 0
        by_time = pace.seconds is not None and time.monotonic() - self._last_checkpoint >= pace.seconds
        return by_steps or by_time

    def _is_told_to_stop(self) -> bool:
        """Returns whether any process was told to stop; several agree on the step, every few steps."""
        if self._processes.size > 1 and self._trainer.step % _AGREED_EVERY:
            return False
        return self._processes.any(self._stop())

    def _limit(self) -> None:
        """Finds, once, how many steps fit into the time."""
        if self._pace.most_seconds is None or self._trainer.step != _TIMED:
            return
        fitting = int(self._pace.most_seconds / self.seconds * _TIMED)
        self._trainer.total = self._processes.first_of(max(_TIMED, min(self._trainer.total, fitting)))

    def _end_epoch(self, epoch: int) -> None:
        trainer, kept = self._trainer, self._progress
        trainer.check()
        steps = trainer.step - epoch * trainer.steps_per_epoch
        self._processes.average([self._sums])
        loss, task_loss = (self._sums / steps).tolist()
        self._sums.zero_()
        with self._as_stored():
            score, trained_score = self._scores()
            if score is None:
                self._write_model()
            elif self._competes() and (kept.best is None or score.drop <= kept.best.drop):
                kept.best, kept.best_epoch = score, epoch + 1
                self._write_model()
        listed = quantizer_values(trainer.prepared)
        kept.quantizers += [(epoch + 1, *values) for values in listed]
        errors = [value for _, what, value in listed if what == "error"]
        rate = trainer.config.share_of_rate(trainer.step / (trainer.total + 1))
        error = sum(errors) / len(errors) if errors else 0.0
        kept.rows.append(
            EpochRow(epoch + 1, trainer.step, loss, task_loss, rate, score and score.compressed, trained_score, error)
        )
        self._write_history()

    def _scores(self) -> tuple[MetricResult | None, float | None]:
        """Returns the comparison of the model as stored, and the metric of the model as trained where they differ."""
        prepared = self._trainer.prepared
        if self._validation is None:
            return None, None
        score, soft = self._validation(prepared), hardened(prepared)
        if not soft:
            return score, None
        with in_training(soft):
            return score, self._validation(prepared).compressed

    def _competes(self) -> bool:
        """Returns whether the model can be the best one: its offsets are those that zero points can store, if any will.

        Layers that pad their input compute in float with other offsets, and the file would be slower.
        """
        share = self._trainer.config.snap_offsets if self._trainer.prepared.parts.sites else 0.0
        return share == 0 or self._trainer.step > (1 - share) * self._trainer.total

    @contextlib.contextmanager
    def _as_stored(self) -> Iterator[None]:
        """Puts the model for a while into the state in which it is scored and written."""
        prepared = self._trainer.prepared
        prepared.eval()
        norms = [m for m in prepared.model.modules() if isinstance(m, _BatchNorm)] if self._reestimate else []
        trained = [copy.deepcopy(norm.state_dict()) for norm in norms]
        try:
            with torch.no_grad():
                if norms:
                    batches = zip(range(self._reestimate), self._batches.epoch(0), strict=False)
                    prepared.reestimate_batchnorm(inputs for _, (inputs, _) in batches)
                yield
        finally:
            for norm, state in zip(norms, trained, strict=True):
                norm.load_state_dict(state)
            prepared.train()

    def _write_model(self) -> None:
        if self._writes:
            self._save(self._trainer.prepared, self._folder)

    def _write_history(self) -> None:
        if self._writes:
            history = csv_text([f.name for f in fields(EpochRow)], [row.numbers for row in self._progress.rows])
            write_whole(self._folder / HISTORY, history.encode())
            quantizers = csv_text(QUANTIZER_COLUMNS, self._progress.quantizers)
            write_whole(self._folder / QUANTIZERS, quantizers.encode())
