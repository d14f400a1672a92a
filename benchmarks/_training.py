"""What the training benchmarks share: a net with its data, a row of settings, and the file that training makes."""

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from _nets import DIGITS
from torch import Tensor, nn
from torch.nn import functional

from qcompress.data.dataset import Dataset
from qcompress.finetune.attach import Prepared, prepare
from qcompress.finetune.config import LoopConfig
from qcompress.finetune.loop import train
from qcompress.finetune.methods import Methods
from qcompress.graph.sites import Placement
from qcompress.metrics.intervals import of_runs
from qcompress.plan.plan import Plan
from qcompress.plan.settings import Settings
from qcompress_exporters import build
from qcompress_exporters.parity.differences import outputs_of

Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Row:
    """One training configuration.

    Args:
        name: its name in the table.
        bits: bits per weight.
        activation_bits: bits per activation; None if activations stay float.
        methods: the quantizers.
        regularizers: the `regularizers` argument of `prepare`.
        quantizer_rate: see `LoopConfig`.
        wide_ends: whether the first and the last layer have 8 bits.
        vector_dim: weights that share a code.
        placement: which activations are quantized; see `activation_sites`.
    """

    name: str
    bits: int
    activation_bits: int | None
    methods: Methods
    regularizers: tuple[Callable[[nn.Module], nn.Module], ...] = ()
    quantizer_rate: float = 1.0
    wide_ends: bool = False
    vector_dim: int = 1
    placement: Placement = "deploy"

    @property
    def plan(self) -> Plan:
        """Return the plan with the bits of every layer."""
        plan = Plan.from_flags(bits=self.bits, activation_bits=self.activation_bits, vector_dim=self.vector_dim)
        wide = Settings(bits=8, activation_bits=None if self.activation_bits is None else 8)
        return replace(plan, kind={"first": wide, "last": wide}) if self.wide_ends else plan


class FloatRow(Row):
    """A row that leaves all layers in float."""

    @property
    def plan(self) -> Plan:
        """Return a plan that skips every layer."""
        return Plan(default=Settings(skip=True))


def named(weights: str = "lsq", activations: str = "lsq", **options: Any) -> Methods:
    """Return methods by their names."""
    return Methods(weights=weights, activations=activations, **options)


@dataclass(frozen=True)
class Task:
    """A float net with its data and its budget.

    Args:
        module: the float net.
        training: labelled training data.
        test: labelled test data.
        epochs: passes over the training data.
        rate: see `LoopConfig`.
        augment: changes a batch of training inputs at random; None: they stay as they are.
        teacher: the net whose outputs replace the labels; None: training uses the labels.
    """

    module: nn.Module
    training: Dataset
    test: Dataset
    epochs: int
    rate: float
    augment: Augment | None = None
    teacher: nn.Module | None = None


class Shuffled:
    """Batches of a dataset, in a different order each epoch and the same orders for the same seed."""

    def __init__(self, data: Dataset, *, augment: Augment | None = None, seed: int = 0, size: int = 64) -> None:
        self.x, self.y = tensors(data)
        self.size, self.augment = size, augment
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.x) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x), generator=self.generator)
        for i in range(len(self)):
            part = order[i * self.size : (i + 1) * self.size]
            x = self.x[part]
            yield x if self.augment is None else self.augment(x, self.generator), self.y[part]


def tensors(data: Dataset) -> tuple[Tensor, Tensor]:
    """Return all inputs, transformed for the net, and the labels."""
    batches = list(data.batches(500))
    x = np.concatenate([next(iter(batch.inputs.values())) for batch in batches])
    return torch.from_numpy(x), torch.from_numpy(np.concatenate([batch.labels for batch in batches])).long()


def digits(folder: Path) -> Task:
    """Return the sample's net with the images outside its test data for training."""
    from sklearn.datasets import load_digits

    test, module = DIGITS.test_data(folder), DIGITS.module(folder)
    pixels, labels = load_digits(return_X_y=True)
    x = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    tested = {image.tobytes() for image in next(iter(test.inputs.values()))}
    kept = np.array([image.tobytes() not in tested for image in x])
    training = Dataset(inputs={"image": x[kept]}, labels=labels[kept], name="digits")
    return Task(module, training, test, epochs=20, rate=3e-3)


def prepared(task: Task, row: Row, seed: int = 0) -> tuple[Prepared, Shuffled]:
    """Return a fresh copy of the net, prepared for training, and its batches."""
    torch.manual_seed(seed)
    batches = Shuffled(task.training, augment=task.augment, seed=seed)
    first = [x for x, _ in itertools.islice(batches, 4)]
    model = prepare(
        copy.deepcopy(task.module), row.plan, example_inputs=(first[0],), calibration=first[1:], methods=row.methods,
        regularizers=row.regularizers, placement=row.placement,
    )  # fmt: skip
    return model, batches


def tuned(task: Task, row: Row, seed: int = 0, **options: Any) -> tuple[Prepared, float]:
    """Train; return the model before it is finalized, and the CPU seconds that preparing and training took.

    Args:
        task: the net and its data.
        row: the quantizers.
        seed: of the order of the data.
        options: further arguments of `LoopConfig`.
    """
    start = time.process_time()
    model, batches = prepared(task, row, seed)
    config = LoopConfig(epochs=task.epochs, rate=task.rate, warm_up=0.05, quantizer_rate=row.quantizer_rate, **options)
    for _ in train(model, batches, config, teacher=task.teacher):
        pass
    return model, time.process_time() - start


def trained(task: Task, row: Row, seed: int = 0) -> tuple[bytes, float]:
    """Train; return the exported file and the CPU seconds that preparing and training took."""
    model, seconds = tuned(task, row, seed)
    return build(model.finalize()).data, seconds


def logits(file: bytes, data: Dataset) -> npt.NDArray[np.float32]:
    """Return the output of a file in onnxruntime for each sample."""
    (found,) = outputs_of(file, [batch.inputs for batch in data.batches(500)], "deployed").values()
    return found


def interval(mine: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float, float]:
    """Return the mean difference of two rows over the seeds that both have, and the ends of its 95 % interval.

    With one seed the ends are NaN.
    """
    found = [mine[seed] - theirs[seed] for seed in sorted(set(mine) & set(theirs))]
    low, high = of_runs(found) or (math.nan, math.nan)
    return statistics.fmean(found), low, high


def paired(name: str, mine: Mapping[int, float], other: str, theirs: Mapping[int, float]) -> str:
    """Return the mean difference of two rows in points over the seeds that both have, with its 95 % interval."""
    mean, low, high = (100 * value for value in interval(mine, theirs))
    line = f"{name} minus {other}: {mean:+.2f} points, {len(set(mine) & set(theirs))} seeds"
    return line if math.isnan(low) else f"{line}, 95 % {low:+.2f} to {high:+.2f}"


def stepper(model: nn.Module, penalized: Any = None) -> Callable[[Tensor, Tensor], None]:
    """Return a function that runs one step of AdamW.

    Args:
        model: the net, in training mode.
        penalized: a module whose `penalty()` is added to the loss; None: none is.
    """
    own = [*model.parameters()]
    own += [p for p in penalized.parameters() if penalized is not model] if penalized is not None else []
    optimizer = torch.optim.AdamW(own, lr=1e-5)

    def step(x: Tensor, y: Tensor) -> None:
        loss = functional.cross_entropy(model(x), y)
        if penalized is not None:
            loss = loss + penalized.penalty()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def interleaved(
    steps: Mapping[str, Callable[[Tensor, Tensor], None]], batches: Sequence[tuple[Tensor, Tensor]], rounds: int
) -> dict[str, list[float]]:
    """Return the CPU seconds of steps that take turns in each round, after two rounds without measurement."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 2):
        for name in steps if i % 2 else reversed(steps):
            start = time.process_time()
            steps[name](*batches[i % len(batches)])
            if i >= 2:
                times[name].append(time.process_time() - start)
    return times


def ratios(times: Mapping[str, list[float]], to: str) -> dict[str, float]:
    """Return the time of the other steps over the step `to`: medians over rounds."""
    return {
        name: statistics.median(a / b for a, b in zip(found, times[to], strict=True))
        for name, found in times.items()
        if name != to
    }
