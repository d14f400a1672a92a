"""Trains with every quantizer; measures the accuracy of the exported file and the time of a training step.

    python benchmarks/training.py --data DIR [--nets digits resnet20] [--rows "LSQ W2" …] [--quick] [--json FILE]
    python benchmarks/training.py --data DIR --steps-only [--device cuda] [--rows "LSQ W2" …] [--no-compile]

DIR holds the nets and images of `_nets.py`. All rows start from the same float net and train with the same data, order
and budget; accuracy is measured in onnxruntime on the exported file. Digits trains for 20 epochs on labels, ResNet-20
for at most 6 epochs on 10,000 training images and the float net's outputs for them. All layers, first and last
included, have the row's width, except in "8-bit ends". Steps are timed on one thread, interleaved with steps of the
float net; the control is the float net against itself, and ratios are medians of pairs. `--quick` runs fewer epochs and
rows. `--steps-only` trains nothing: it counts the kernels of a step, eager and compiled, and the host's waits for the
device, as `_kernels.py` defines them, and times it.
"""

import argparse
import copy
import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _steps
import torch
from _common import Bar
from _nets import NETS, trained_digits
from _training import (
    Row,
    Shuffled,
    Task,
    digits,
    interleaved,
    logits,
    named,
    prepared,
    ratios,
    stepper,
    tensors,
    trained,
)
from torch.nn import functional

from qcompress.data.dataset import load_data
from qcompress.regularizers import BinRegularizer, RangeRegularizer

LEAST_ERROR = {"activation_options": {"init": "lsq_plus"}}
ROWS = (
    Row("LSQ W2", 2, None, named()),
    Row("LSQ W2 + BR", 2, None, named(), (BinRegularizer,)),
    Row("LSQ+ W2", 2, None, named("lsq_plus")),
    Row("EWGS W2", 2, None, named("ewgs")),
    Row("TQT W2", 2, None, named("tqt")),
    Row("DoReFa W2", 2, None, named("dorefa")),
    Row("DKM W2", 2, None, named("dkm")),
    Row("ternary W2", 2, None, named("ternary")),
    Row("BMPQ W4", 4, None, named("bmpq")),
    Row("N2UQ W2", 2, None, named("n2uq")),
    Row("LSQ W4A4", 4, 4, named(**LEAST_ERROR)),
    Row("LSQ+ W4A4", 4, 4, named("lsq_plus", "lsq_plus")),
    Row("LSQ W2A2", 2, 2, named(**LEAST_ERROR)),
    Row("LSQ W2A2, 8-bit ends", 2, 2, named(**LEAST_ERROR), wide_ends=True),
    Row("LSQ W2A2, paper sites", 2, 2, named(**LEAST_ERROR), placement="paper"),
    Row("LSQ+ W2A2", 2, 2, named("lsq_plus", "lsq_plus")),
    Row("EWGS W2A2", 2, 2, named("ewgs", "ewgs", **LEAST_ERROR)),
    Row("TQT W2A2", 2, 2, named("tqt", "tqt", **LEAST_ERROR)),
    Row("DoReFa + PACT W2A2", 2, 2, named("dorefa", "pact")),
    Row("N2UQ W2A2", 2, 2, named("n2uq", "n2uq"), quantizer_rate=0.1),
    Row("N2UQ W2A2, 8-bit ends", 2, 2, named("n2uq", "n2uq"), quantizer_rate=0.1, wide_ends=True),
)
QUICK = ("LSQ W2", "LSQ+ W4A4", "LSQ W2A2", "N2UQ W2A2")

# Lowest accuracy that passes: for digits in points below float, for ResNet-20 in percent.
BELOW_FLOAT = {"LSQ+ W2A2": 1.5, "LSQ+ W4A4": 0.5, "LSQ W4A4": 0.5, "LSQ W2": 1.0}
RESNET = {"LSQ W2": 84.5, "LSQ W4A4": 85.0, "LSQ W2A2": 77.0}
STEP = {"LSQ W2": 1.15, "LSQ+ W4A4": 2.0, "R2 margin": 1.05}


def crops(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the images, each mirrored at random and shifted by up to 2 pixels."""
    mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    x = torch.where(mirrored, x.flip(3), x)
    dy, dx = (int(v) for v in torch.randint(-2, 3, (2,), generator=generator))
    padded = functional.pad(x, (2, 2, 2, 2))
    return padded[:, :, 2 + dy : 2 + dy + x.shape[2], 2 + dx : 2 + dx + x.shape[3]]


def main() -> int:
    """Run the benchmark; return 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", choices=["digits", "resnet20"], default=["digits", "resnet20"])
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS])
    parser.add_argument("--epochs", type=int, help="epochs of ResNet-20, 1 to 6", default=6)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-steps", action="store_true", help="do not measure the time of a step")
    parser.add_argument("--steps-only", action="store_true", help="measure steps of ResNet-20 only")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="with --steps-only")
    parser.add_argument("--no-compile", action="store_true", help="with --steps-only: eager steps only")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.steps_only:
        return steps_only(args)
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
            result = found[name][row.name] = measured(task, row)
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


def resnet20(folder: Path, epochs: int) -> Task:
    """Return ResNet-20 with its 10,000 training images."""
    net = NETS["resnet20"]
    transform = f"{folder}/{net.arch.partition(':')[0]}:{net.transform}"
    training = load_data(f"{folder}/cifar10jpeg_small.npz:train_x,train_y", transform=transform)
    module = net.module(folder)
    return Task(module, training, net.test_data(folder), epochs=epochs, rate=2e-3, augment=crops, teacher=module)


def measured(task: Task, row: Row) -> dict[str, float]:
    """Train and return top-1 of the exported file, its bytes, and the CPU time of training."""
    file, seconds = trained(task, row)
    right = logits(file, task.test).argmax(1) == task.test.labels
    return {"top1": float(right.mean()), "bytes": len(file), "cpu_s": seconds}


def top1_of_module(task: Task) -> float:
    """Return top-1 of the float net."""
    x, y = tensors(task.test)
    with torch.no_grad():
        found = torch.cat([task.module(part).argmax(1) for part in x.split(500)])
    return float((found == y).double().mean())


def steps_only(args: argparse.Namespace) -> int:
    """Measure steps of ResNet-20; return 1 if a limit is missed."""
    rows = [row for row in ROWS if row.name in (args.rows or QUICK)]
    pairs = 100 if args.device == "cuda" else 5 if args.quick else 15
    found = _steps.measure(resnet20(args.data, 1), rows, args.device, compiles=not args.no_compile, pairs=pairs)
    bars = _steps.bars(found, args.device)
    print("\n" + "\n".join(map(str, bars)))
    if args.json is not None:
        args.json.write_text(json.dumps({name: asdict(steps) for name, steps in found.items()}, indent=1) + "\n")
    return int(any(bar.verdict == "FAIL" for bar in bars))


def steps(task: Task, rounds: int) -> dict[str, float]:
    """Return the CPU time of a training step over the float net's: medians over interleaved rounds, one thread."""
    torch.set_num_threads(1)
    lsq_plus = Row("LSQ+ W4A4", 4, 4, named("lsq_plus", "lsq_plus"))
    sides = {
        "float": stepper(copy.deepcopy(task.module).train()),
        "control": stepper(copy.deepcopy(task.module).train()),
        "LSQ W2": stepper(*2 * [prepared(task, ROWS[0])[0].train()]),
        "LSQ+ W4A4": stepper(*2 * [prepared(task, lsq_plus)[0].train()]),
    }
    ranged = copy.deepcopy(task.module).train()
    sides["R2 margin"] = stepper(ranged, RangeRegularizer(ranged, kind="margin"))
    batches = list(itertools.islice(Shuffled(task.training), 4))
    return ratios(interleaved(sides, batches, rounds), "float")


if __name__ == "__main__":
    sys.exit(main())
