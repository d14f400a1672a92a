"""Batches for training, which depend on their number alone: whoever starts anywhere gets the same ones bit for bit.

The order of an epoch depends on (seed, epoch), and all that is random in a batch on (seed, epoch, step). No state is
kept, so there is none to save. Several processes share each global batch, which is the same for any number of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qcompress.artifacts.digest import short_digest
from qcompress.data.arrays import Arrays
from qcompress.data.augment import Augment, Inputs, Share
from qcompress.data.randomness import ORDER, SAMPLES, Seeds, seeds_of
from qcompress.data.reader import DataReader
from qcompress.data.stored import Indices
from qcompress.data.transform import Batch
from qcompress.data.workers import ahead
from qcompress.errors import ConfigError, DataError
from qcompress.graph.conversion import to_torch
from qcompress.graph.program import FloatProgram

# Inputs by name; labels as int64 classes or float32, or None.
TrainingBatch = tuple[Inputs, Tensor | None]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """How samples become batches.

    Args:
        size: samples of a global batch, over all processes.
        seed: of the order and of everything random.
        shuffle: whether each epoch has an order of its own; if not, samples come in the order of the data.
        drop_last: whether the samples that are left over when batches are full are left out of the epoch.
        workers: processes that prepare batches ahead; 0: the training process does it itself.
        rank: number of this process, from 0.
        world_size: number of processes that share the global batches.
        device: where tensors go.

    Raises:
        ConfigError: an argument is out of range, or the processes cannot share a batch evenly.
    """

    size: int
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = True
    workers: int = 0
    rank: int = 0
    world_size: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, low in (("size", 1), ("workers", 0), ("world_size", 1), ("rank", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"BatchSettings.{name} must be at least {low}, got {getattr(self, name)}.")
        if self.rank >= self.world_size:
            raise ConfigError(f"BatchSettings.rank must be below world_size = {self.world_size}, got {self.rank}.")
        if self.size % self.world_size:
            raise ConfigError(
                f"The batch size must be a multiple of the number of processes, {self.world_size}, got {self.size}: "
                f"use {self.size - self.size % self.world_size or self.world_size}."
            )


@final
class TrainingBatches:
    """Batches of samples as tensors.

    Args:
        data: the samples.
        settings: how they become batches.
        program: the model, whose names, shapes and dtypes the inputs get; None: inputs stay as the data has them.
        classes: number of classes that labels are numbers of; None: labels are not classes.
        augment: random changes of the inputs; None: they stay as they are.

    Raises:
        ConfigError: there are too few samples for a batch, or for the processes' shares of the last one.

    >>> from qcompress.data.dataset import Dataset
    >>> data = Dataset(inputs={"x": np.arange(10.0)}, labels=np.arange(10) % 2)
    >>> batches = TrainingBatches(data.reader(), BatchSettings(size=4, seed=1))
    >>> [inputs["x"].tolist() for inputs, labels in batches.epoch(0)]
    [[6.0, 3.0, 9.0, 8.0], [1.0, 2.0, 7.0, 4.0]]
    >>> [inputs["x"].tolist() for inputs, labels in batches.epoch(0, first=1)]
    [[1.0, 2.0, 7.0, 4.0]]
    """

    def __init__(
        self,
        data: DataReader,
        settings: BatchSettings,
        *,
        program: FloatProgram | None = None,
        classes: int | None = None,
        augment: Augment | None = None,
    ) -> None:
        self._data, self._settings, self._program = data, settings, program
        self._classes, self._augment = classes, augment
        left = len(data) % settings.size
        if settings.drop_last and len(data) < settings.size:
            raise ConfigError(
                f"A batch needs {settings.size} samples, but {data.source} has {len(data)}: use a batch size of at "
                f"most {len(data)}."
            )
        if not settings.drop_last and 0 < left < settings.world_size:
            raise ConfigError(
                f"The last batch of {data.source} has {left} samples, too few for {settings.world_size} processes: use "
                "another batch size."
            )

    def __len__(self) -> int:
        """Return the number of steps of an epoch."""
        size = self._settings.size
        return len(self._data) // size if self._settings.drop_last else -(-len(self._data) // size)

    @property
    def fingerprint(self) -> str:
        """A digest of all that decides which batches come; of the samples' values it knows the first and the last.

        The number of processes, the workers and the device are not in it: batches do not depend on them.
        """
        settings, augment = self._settings, "" if self._augment is None else self._augment.spec
        first = self._read(np.array([0]), seeds_of(1, SAMPLES, 0, 0, 0))
        kinds = [f"{name} {values.dtype} {values.shape}" for name, values in sorted(first.inputs.items())]
        order = f"{settings.size} {settings.seed} {settings.shuffle} {settings.drop_last}"
        texts = [order, augment, self._data.transform_name, str(len(self._data)), *kinds]
        ends = np.array([0, len(self._data) - 1])
        with self._data.named_errors():
            raw, labels = self._data.samples.take(ends, seeds_of(2, SAMPLES, 0, 0, 0))
        values = [part for name in sorted(raw) for part in raw[name]] + ([] if labels is None else [labels])
        return short_digest(*(text.encode() for text in texts), *(np.asarray(value).tobytes() for value in values))

    def check(self) -> None:
        """Refuse, before training starts, what would fail later or teach nothing.

        It looks at all labels (those of a `module:factory` until it has seen two classes), at all stored floats, and at
        this process's share of the first batch.

        Raises:
            DataError: inputs do not fit the model or the augmentation, samples hold NaN or Inf, labels are no classes
                of the model, or all are the same.
        """
        with self._data.named_errors():
            self._data.samples.check()
        if self._classes is not None:
            self._check_classes()
        inputs, _ = self._host_batch(self._order(0), 0, 0)
        self._augmented(inputs, 0, 0)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[TrainingBatch]:
        """Return the batches of an epoch: this process's shares of them.

        Args:
            epoch: its number, from 0.
            first: the step to start from; steps before it cost nothing.

        Raises:
            ConfigError: a number is out of range.
            DataError: a sample cannot be read, or does not fit the model.
        """
        if epoch < 0 or not 0 <= first <= len(self):
            raise ConfigError(
                f"An epoch must be at least 0 and its first step from 0 to {len(self)}, got epoch {epoch}, step "
                f"{first}."
            )
        return self._batches(epoch, range(first, len(self)))

    def _batches(self, epoch: int, steps: range) -> Iterator[TrainingBatch]:
        order = self._order(epoch)

        def load(step: int) -> TrainingBatch:
            return self._host_batch(order, epoch, step)

        loaded = ahead(load, steps, self._settings.workers)
        for step, (inputs, labels) in zip(steps, loaded, strict=True):
            moved = {name: self._moved(values) for name, values in inputs.items()}
            yield self._augmented(moved, epoch, step), None if labels is None else self._moved(labels)

    def _order(self, epoch: int) -> Indices:
        """The samples in the order of an epoch."""
        if not self._settings.shuffle:
            return np.arange(len(self._data))
        seed = seeds_of(1, ORDER, self._settings.seed, epoch)[0]
        return np.random.default_rng(seed).permutation(len(self._data))

    def _share(self, step: int) -> Share:
        size, rank, processes = self._settings.size, self._settings.rank, self._settings.world_size
        total = min(size, len(self._data) - step * size)
        return Share(total, rank * total // processes, (rank + 1) * total // processes)

    def _host_batch(self, order: Indices, epoch: int, step: int) -> TrainingBatch:
        """This process's share of a batch, in memory, not augmented yet."""
        share = self._share(step)
        indices = order[step * self._settings.size :][share.part]
        seeds = seeds_of(share.total, SAMPLES, self._settings.seed, epoch, step)[share.part]
        batch = self._read(indices, seeds)
        inputs = {name: to_torch(values) for name, values in batch.inputs.items()}
        return inputs, None if batch.labels is None else to_torch(batch.labels)

    def _read(self, indices: Indices, seeds: Seeds) -> Batch:
        batch = self._data.read(indices, seeds)
        with self._data.named_errors():
            inputs = batch.inputs if self._program is None else _bound(self._program, batch.inputs)
            return Batch(inputs, None if batch.labels is None else self._as_labels(batch.labels))

    def _as_labels(self, labels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Labels as int64 classes, each checked, or as float32."""
        if labels.dtype.kind == "f":
            if self._classes is not None and labels.shape[1:] != (self._classes,):
                raise DataError(
                    f"labels must be integers from 0 to {self._classes - 1}, or a probability for each of the "
                    f"{self._classes} classes, got {labels.dtype} of shape {list(labels.shape)}: convert them."
                )
            return labels.astype(np.float32)
        single = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
        if self._classes is not None and (single.min() < 0 or single.max() >= self._classes):
            raise DataError(
                f"labels must be from 0 to {self._classes - 1} for the model's {self._classes} outputs, got labels "
                f"from {single.min()} to {single.max()}."
            )
        return single.astype(np.int64)

    def _check_classes(self) -> None:
        seen: set[int] = set()
        with self._data.named_errors():
            for labels in self._data.samples.labels():
                checked = self._as_labels(labels)
                if checked.dtype.kind == "f":
                    return
                seen |= {int(checked.min()), int(checked.max())}
                if len(seen) > 1:
                    return
            if seen:
                raise DataError(
                    f"labels must hold at least two classes, but all {len(self._data)} are {seen.pop()}: name the key "
                    "of the labels, or pass data of all classes."
                )

    def _augmented(self, inputs: Inputs, epoch: int, step: int) -> Inputs:
        if self._augment is None:
            return inputs
        return self._augment(inputs, self._share(step), (self._settings.seed, epoch, step))

    def _moved(self, values: Tensor) -> Tensor:
        device = torch.device(self._settings.device)
        if device.type == "cuda":
            values = values.pin_memory()  # else the copy would wait for the device
        return values.to(device, non_blocking=True)


def _bound(program: FloatProgram, arrays: Arrays) -> Arrays:
    return dict(zip(program.input_names, program.bind(arrays), strict=True))
