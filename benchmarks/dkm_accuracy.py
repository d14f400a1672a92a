"""Trains ResNet-20 with DKM: against LSQ, at 1 bit per weight, and after R².

    python benchmarks/dkm_accuracy.py --data DIR --json FILE [--rows "DKM W2" …] [--seeds 3] [--epochs 6]

All rows start from the same float net, learn its outputs on 10,000 images without labels, and have the same epochs,
rate, batches and placement: all layers, first and last included. A seed sets the order of the images and their changes.
Accuracy is that of the exported file in onnxruntime on 5,000 test images; `soft` is that of the soft weights just
before, in torch. Rows with "float first" spend a third of the epochs on the float net, with R² (margin, weight 0.01) or
without, and the rest on DKM, so that both sides of that comparison train as long.

Each result is written to FILE as soon as it is there; results that FILE holds already are not measured again.
Differences are paired by seed, with a 95 % interval over seeds (Student).
"""

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _training import FloatRow, Row, Task, logits, named, paired, tensors, tuned
from training import resnet20

from qcompress.finetune.attach import Prepared
from qcompress.regularizers import RangeRegularizer
from qcompress_exporters import build


@dataclass(frozen=True)
class Case:
    """A row and what happens before it.

    Args:
        row: how the net is compressed.
        float_first: whether a third of the epochs trains the float net.
        ranged: whether R² acts in those epochs.
    """

    row: Row
    float_first: bool = False
    ranged: bool = False


def dkm(name: str, bits: int, vector_dim: int = 1) -> Row:
    """Return a row of DKM."""
    return Row(name, bits, None, named("dkm"), vector_dim=vector_dim)


CASES = (
    Case(Row("LSQ W2", 2, None, named())),
    Case(dkm("DKM W2", 2)),
    Case(dkm("DKM W1", 1)),
    Case(dkm("DKM 2/2", 2, 2)),
    Case(dkm("DKM 4/4", 4, 4)),
    Case(dkm("float first, DKM W2", 2), float_first=True),
    Case(dkm("R² first, DKM W2", 2), float_first=True, ranged=True),
    Case(dkm("float first, DKM W1", 1), float_first=True),
    Case(dkm("R² first, DKM W1", 1), float_first=True, ranged=True),
)
PAIRS = (
    ("DKM W2", "LSQ W2"),
    ("R² first, DKM W2", "float first, DKM W2"),
    ("R² first, DKM W1", "float first, DKM W1"),
)


@dataclass(frozen=True)
class Result:
    """The file of one case and seed.

    Args:
        name: name of the case.
        seed: the seed.
        epochs: all epochs, those in float included.
        top1: accuracy of the file.
        soft: accuracy of the net before it was finalized.
        nbytes: size of the file.
        cpu_s: CPU seconds of training.
    """

    name: str
    seed: int
    epochs: int
    top1: float
    soft: float
    nbytes: int
    cpu_s: float


def main() -> None:
    """Measure what is missing, and print the table."""
    names = [case.row.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", choices=names, default=names)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = [Result(**entry) for entry in json.loads(args.json.read_text())] if args.json.exists() else []
    for case, seed in asked(args.rows, args.seeds):
        if any((r.name, r.seed, r.epochs) == (case.row.name, seed, args.epochs) for r in results):
            continue
        results.append(measured(resnet20(args.data, args.epochs), case, seed))
        print(results[-1], flush=True)
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    for epochs in sorted({result.epochs for result in results}):
        show(epochs, [result for result in results if result.epochs == epochs])


def asked(names: list[str], seeds: int) -> Iterator[tuple[Case, int]]:
    """Yield the cases with these names, all with the first seed, then with the next."""
    for seed in range(seeds):
        yield from ((case, seed) for case in CASES if case.row.name in names)


def measured(task: Task, case: Case, seed: int) -> Result:
    """Train a case, and measure its file."""
    epochs, start = task.epochs, 0.0
    if case.float_first:
        first = epochs // 3
        task, start = in_float(replace(task, epochs=first), seed, ranged=case.ranged)
        task = replace(task, epochs=epochs - first)
    model, seconds = tuned(task, case.row, seed)
    soft = soft_top1(model, task)
    file = build(model.finalize()).data
    return Result(case.row.name, seed, epochs, top1(logits(file, task.test), task), soft, len(file), start + seconds)


def in_float(task: Task, seed: int, *, ranged: bool) -> tuple[Task, float]:
    """Return the task with its float net trained, and the CPU seconds; the teacher stays as it is."""
    row = FloatRow("float", 2, None, named(), (RangeRegularizer,) if ranged else ())
    model, seconds = tuned(task, row, seed)
    return replace(task, module=model.unwrap().eval()), seconds


def soft_top1(model: Prepared, task: Task) -> float:
    """Return the accuracy with the weights of the last training step, BatchNorm in eval mode."""
    copied = copy.deepcopy(model).eval()
    for quantizer in copied.quantizers().values():
        quantizer.train()
    x, _ = tensors(task.test)
    with torch.no_grad():
        return top1(torch.cat([copied(part) for part in x.split(500)]).numpy(), task)


def top1(outputs: Any, task: Task) -> float:
    """Return the share of test images whose largest output is their label."""
    return float((outputs.argmax(1) == task.test.labels).mean())


def show(epochs: int, results: list[Result]) -> None:
    """Print a line for each case, averaged over its seeds, and the paired differences."""
    by_name: dict[str, dict[int, Result]] = {}
    for result in results:
        by_name.setdefault(result.name, {})[result.seed] = result
    print(f"\n{epochs} epochs{'':15} seeds     top-1  soft - hard    bytes  CPU s")
    for name, group in by_name.items():
        mean = {f: np.mean([getattr(r, f) for r in group.values()]) for f in ("top1", "nbytes", "cpu_s")}
        drop = np.mean([r.soft - r.top1 for r in group.values()])
        print(
            f"{name:23} {len(group):5}  {mean['top1']:8.2%} {100 * drop:+12.2f} {mean['nbytes']:8,.0f} "
            f"{mean['cpu_s']:6.0f}"
        )
    for name, other in PAIRS:
        if name in by_name and other in by_name:
            top1_of = {side: {seed: r.top1 for seed, r in by_name[side].items()} for side in (name, other)}
            print(paired(name, top1_of[name], other, top1_of[other]))


if __name__ == "__main__":
    main()
