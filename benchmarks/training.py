"""Trains with every quantizer; measures the accuracy of the exported file and the time of a training step.

    python benchmarks/training.py --data DIR [--nets digits resnet20] [--methods lsq lsq_plus …] [--quick] [--json FILE]

DIR holds the nets and images of `_nets.py`. All rows start from the same float net and train with the same data, order
and budget; accuracy is measured in onnxruntime on the exported file. Digits trains for 20 epochs on labels, ResNet-20
for at most 6 epochs on 10,000 training images and the float net's outputs for them. All layers, first and last
included, have the row's width, except in "8-bit ends". Steps are timed on one thread, interleaved with steps of the
float net; the control is the float net against itself, and ratios are medians of pairs. `--quick` runs fewer epochs and
rows.
"""

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Bar
from _nets import DIGITS, NETS, trained_digits
from torch import nn
from torch.nn import functional

from qcompress.data.dataset import Dataset, load_data
from qcompress.finetune.attach import Prepared, prepare
from qcompress.finetune.loop import LoopConfig, train
from qcompress.finetune.methods import Methods
from qcompress.plan.plan import Plan
from qcompress.plan.settings import Settings
from qcompress.regularizers import BinRegularizer, RangeRegularizer
from qcompress_exporters import build
from qcompress_exporters.parity.sessions import run, session

SEED = 0
_EQUAL_PARTS = 10  # number of parts that the test images are split into


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
    """

    name: str
    bits: int
    activation_bits: int | None
    methods: Methods
    regularizers: tuple[Callable[[nn.Module], nn.Module], ...] = ()
    quantizer_rate: float = 1.0
    wide_ends: bool = False

    @property
    def plan(self) -> Plan:
        """Return the plan with the bits of every layer."""
        plan = Plan.from_flags(bits=self.bits, activation_bits=self.activation_bits)
        wide = Settings(bits=8, activation_bits=None if self.activation_bits is None else 8)
        return replace(plan, kind={"first": wide, "last": wide}) if self.wide_ends else plan


def named(weights: str = "lsq", activations: str = "lsq", **options: Any) -> Methods:
    """Return methods by their names."""
    return Methods(weights=weights, activations=activations, **options)


LEAST_ERROR = {"activation_options": {"init": "lsq_plus"}}
ROWS = (
    Row("LSQ W2", 2, None, named()),
    Row("LSQ W2 + BR", 2, None, named(), (BinRegularizer,)),
    Row("LSQ+ W2", 2, None, named("lsq_plus")),
    Row("EWGS W2", 2, None, named("ewgs")),
    Row("TQT W2", 2, None, named("tqt")),
    Row("DoReFa W2", 2, None, named("dorefa")),
    Row("ternary W2", 2, None, named("ternary")),
    Row("N2UQ W2", 2, None, named("n2uq")),
    Row("LSQ W4A4", 4, 4, named(**LEAST_ERROR)),
    Row("LSQ+ W4A4", 4, 4, named("lsq_plus", "lsq_plus")),
    Row("LSQ W2A2", 2, 2, named(**LEAST_ERROR)),
    Row("LSQ W2A2, 8-bit ends", 2, 2, named(**LEAST_ERROR), wide_ends=True),
    Row("LSQ+ W2A2", 2, 2, named("lsq_plus", "lsq_plus")),
    Row("EWGS W2A2", 2, 2, named("ewgs", "ewgs", **LEAST_ERROR)),
    Row("TQT W2A2", 2, 2, named("tqt", "tqt", **LEAST_ERROR)),
    Row("DoReFa + PACT W2A2", 2, 2, named("dorefa", "pact")),
    Row("N2UQ W2A2", 2, 2, named("n2uq", "n2uq", activation_options={"init": "lsq"}), quantizer_rate=0.1),
)
QUICK = ("LSQ W2", "LSQ+ W4A4", "LSQ W2A2", "N2UQ W2A2")

# Lowest accuracy that passes: for digits in points below float, for ResNet-20 in percent.
BELOW_FLOAT = {"LSQ+ W2A2": 1.5, "LSQ+ W4A4": 0.5, "LSQ W4A4": 0.5, "LSQ W2": 1.0}
RESNET = {"LSQ W2": 84.5, "LSQ W4A4": 85.0, "LSQ W2A2": 77.0}
STEP = {"LSQ W2": 1.15, "LSQ+ W4A4": 2.0, "R2 margin": 1.05}


class Shuffled:
    """Batches of arrays, in a different order each epoch and the same orders each run."""

    def __init__(self, data: Dataset, *, flips: bool, size: int = 64) -> None:
        self.x, self.y = tensors(data)
        self.size, self.flips = size, flips
        self.generator = torch.Generator().manual_seed(SEED)

    def __len__(self) -> int:
        return len(self.x) // self.size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(len(self.x), generator=self.generator)
        for i in range(len(self)):
            part = order[i * self.size : (i + 1) * self.size]
            x = self.x[part]
            if self.flips:
                x = crops(x, self.generator)
            yield x, self.y[part]


def tensors(data: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all inputs, transformed for the net, and the labels."""
    batches = list(data.batches(500))
    x = np.concatenate([next(iter(batch.inputs.values())) for batch in batches])
    return torch.from_numpy(x), torch.from_numpy(np.concatenate([batch.labels for batch in batches])).long()


def crops(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the images, each mirrored at random and shifted by up to 2 pixels."""
    mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    x = torch.where(mirrored, x.flip(3), x)
    dy, dx = (int(v) for v in torch.randint(-2, 3, (2,), generator=generator))
    padded = functional.pad(x, (2, 2, 2, 2))
    return padded[:, :, 2 + dy : 2 + dy + x.shape[2], 2 + dx : 2 + dx + x.shape[3]]


@dataclass(frozen=True)
class Task:
    """A float net with its training and test data."""

    module: nn.Module
    training: Dataset
    test: Dataset
    epochs: int
    rate: float
    flips: bool
    teacher: nn.Module | None = None


def main() -> int:
    """Run the benchmark; return 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", choices=["digits", "resnet20"], default=["digits", "resnet20"])
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS])
    parser.add_argument("--epochs", type=int, help="epochs of ResNet-20, 1 to 6", default=6)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-steps", action="store_true", help="do not measure the time of a step")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [r for r in ROWS if r.name in (args.rows or (QUICK if args.quick else [r.name for r in ROWS]))]
    found: dict[str, Any] = {}
    bars: list[Bar] = []
    for name in args.nets:
        if name == "digits":
            with trained_digits() as folder:
                task = digits(folder)
        else:
            task = resnet20(args.data, 1 if args.quick else args.epochs)
        original = top1_of_module(task)
        print(f"\n{name}: float {original:.2%} of {task.test.samples} samples", flush=True)
        found[name] = {"float": original}
        for row in rows:
            result = found[name][row.name] = trained(task, row)
            print("{:20} {:8.2%}  {:>9,} B  {:6.1f} s CPU".format(row.name, *result.values()), flush=True)
            least = 100 * original - BELOW_FLOAT.get(row.name, 100) if name == "digits" else RESNET.get(row.name, 0)
            if least > 0 and not (args.quick and name == "resnet20"):
                bars.append(Bar(f"{name} {row.name}, %", 100 * result["top1"], round(least, 2), at_least=True))
    if "resnet20" in args.nets and not args.no_steps:
        task = resnet20(args.data, 1)
        ratios = found["steps"] = steps(task, rounds=15 if args.quick else 40)
        bars += [Bar(f"resnet20 step, {name} over float", ratios[name], most) for name, most in STEP.items()]
        print("\nstep over float: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()))
    print("\n" + "\n".join(map(str, bars)))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(bar.verdict == "FAIL" for bar in bars))


def digits(folder: Path) -> Task:
    """Return the sample's net with the images outside its test data for training."""
    from sklearn.datasets import load_digits

    test, module = DIGITS.test_data(folder), DIGITS.module(folder)
    pixels, labels = load_digits(return_X_y=True)
    x = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    tested = {image.tobytes() for image in next(iter(test.inputs.values()))}
    kept = np.array([image.tobytes() not in tested for image in x])
    training = Dataset(inputs={"image": x[kept]}, labels=labels[kept], name="digits")
    return Task(module, training, test, epochs=20, rate=3e-3, flips=False)


def resnet20(folder: Path, epochs: int) -> Task:
    """Return ResNet-20 with its 10,000 training images."""
    net = NETS["resnet20"]
    transform = f"{folder}/{net.arch.partition(':')[0]}:{net.transform}"
    training = load_data(f"{folder}/cifar10jpeg_small.npz:train_x,train_y", transform=transform)
    module = net.module(folder)
    return Task(module, training, net.test_data(folder), epochs=epochs, rate=2e-3, flips=True, teacher=module)


def prepared(task: Task, row: Row) -> tuple[Prepared, Shuffled]:
    """Return a fresh copy of the net, prepared for training, and its batches."""
    torch.manual_seed(SEED)
    module = copy.deepcopy(task.module)
    batches = Shuffled(task.training, flips=task.flips)
    first = [x for x, _ in itertools.islice(batches, 4)]
    tuned = prepare(
        module, row.plan, example_inputs=(first[0],), calibration=first[1:], methods=row.methods,
        regularizers=row.regularizers,
    )  # fmt: skip
    return tuned, batches


def trained(task: Task, row: Row) -> dict[str, float]:
    """Train and return top-1 of the exported file, its bytes, and the CPU time of training."""
    start = time.process_time()
    tuned, batches = prepared(task, row)
    config = LoopConfig(epochs=task.epochs, rate=task.rate, warm_up=0.05, quantizer_rate=row.quantizer_rate)
    for _ in train(tuned, batches, config, teacher=task.teacher):
        pass
    seconds = time.process_time() - start
    built = build(tuned.finalize())
    active = session(built.data, "deployed")
    right = [
        (next(iter(run(active, batch.inputs).values())).argmax(1) == batch.labels).mean()
        for batch in task.test.batches(task.test.samples // _EQUAL_PARTS)
    ]
    return {"top1": float(np.mean(right)), "bytes": len(built.data), "cpu_s": seconds}


def top1_of_module(task: Task) -> float:
    """Return top-1 of the float net."""
    x, y = tensors(task.test)
    with torch.no_grad():
        found = torch.cat([task.module(part).argmax(1) for part in x.split(500)])
    return float((found == y).double().mean())


def steps(task: Task, rounds: int) -> dict[str, float]:
    """Return the CPU time of a training step over the float net's: medians over interleaved rounds, one thread."""
    torch.set_num_threads(1)
    lsq_plus = Row("LSQ+ W4A4", 4, 4, named("lsq_plus", "lsq_plus"))
    sides = {
        "float": stepper(copy.deepcopy(task.module).train(), None),
        "control": stepper(copy.deepcopy(task.module).train(), None),
        "LSQ W2": stepper(*2 * [prepared(task, ROWS[0])[0].train()]),
        "LSQ+ W4A4": stepper(*2 * [prepared(task, lsq_plus)[0].train()]),
    }
    ranged = copy.deepcopy(task.module).train()
    sides["R2 margin"] = stepper(ranged, RangeRegularizer(ranged, kind="margin"))
    batches = list(itertools.islice(Shuffled(task.training, flips=False), 4))
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 2):
        for name in sides if i % 2 else reversed(sides):
            start = time.process_time()
            sides[name](*batches[i % 4])
            if i >= 2:  # the first two are warm-up
                times[name].append(time.process_time() - start)
    return {
        name: statistics.median(a / b for a, b in zip(found, times["float"], strict=True))
        for name, found in times.items()
        if name != "float"
    }


def stepper(model: nn.Module, penalized: Any) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Return a function that runs one step of AdamW."""
    own = [*model.parameters()]
    own += [p for p in penalized.parameters() if penalized is not model] if penalized is not None else []
    optimizer = torch.optim.AdamW(own, lr=1e-5)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        loss = functional.cross_entropy(model(x), y)
        if penalized is not None:
            loss = loss + penalized.penalty()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    sys.exit(main())
