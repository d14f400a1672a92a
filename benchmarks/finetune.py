"""Trains ResNet-20 with `qcompress finetune`, as a user would, and measures the exported files.

    python benchmarks/finetune.py --data DIR --json FILE [--work DIR] [--rows "LSQ W2" …] [--seeds 3] [--epochs 6]

DIR holds the nets and images of `_nets.py`. A row is a command line: defaults, but for what its options set, epochs,
augmentation and seed; `--show` prints all of them and runs nothing. All rows start from the same float net, or
from what `qcompress export` made of it without training ("post-hoc"), and see 10,000 training images. Labels are not
read: the images are given without them. Accuracy is that of the exported file in onnxruntime on 5,000 test images.

Each result is written to FILE as soon as it is there; results that FILE holds already are not measured again, and a run
that was interrupted goes on from its checkpoint. Differences are paired by seed, with a 95 % interval (Student).
"""

import argparse
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from _common import Bar
from _nets import NETS
from _training import logits, paired

QCOMPRESS = Path(sys.executable).parent / "qcompress"
NET = NETS["resnet20"]


@dataclass(frozen=True)
class Row:
    """A command line.

    Args:
        options: those of `finetune` that make the row.
        start: options of the `export` that makes the folder in which training starts; None: the float net.
        least: lower limit of the accuracy; None: none is set.
        no_worse_than: the row that it is compared with, by seed.
    """

    options: str
    start: str | None = None
    least: float | None = None
    no_worse_than: str | None = None


_W2A2 = "--bits 2 --activation-bits 2"
ROWS = {
    "LSQ W2": Row("--bits 2", least=0.85),
    "LSQ+ W4A4": Row("--method lsq_plus --bits 4 --activation-bits 4", least=0.856),
    "LSQ+ W2A2": Row(f"--method lsq_plus {_W2A2}", least=0.78),
    "N2UQ W2A2": Row(f"--method n2uq {_W2A2}", least=0.78),
    "LSQ W2A2, 8-bit ends": Row(f"--method lsq {_W2A2} --ends 8", least=0.842),
    "LSQ+ W2A2, 8-bit ends": Row(f"--method lsq_plus {_W2A2} --ends 8"),
    "N2UQ W2A2, 8-bit ends": Row(f"--method n2uq {_W2A2} --ends 8", no_worse_than="LSQ W2A2, 8-bit ends"),
    "DKM W2": Row("--method dkm --bits 2", no_worse_than="LSQ W2"),
    "DKM W1": Row("--method dkm --bits 1", least=0.82),
    "DKM W1, palettes per channel": Row("--method dkm --bits 1 --rows-per-lut 1 --lut-dtype int8", least=0.82),
    "DKM 2/2": Row("--method dkm --bits 2 --vector-dim 2", least=0.8),
    "DKM 4/4": Row("--method dkm --bits 4 --vector-dim 4"),
    "DKM W1, from post-hoc codes": Row("--method dkm", start="--bits 1 --effort best", no_worse_than="DKM W1"),
    "LSQ W2, from post-hoc codes": Row("--method lsq", start="--bits 2 --scheme uniform", no_worse_than="LSQ W2"),
}


@dataclass(frozen=True)
class Result:
    """The file of one row and seed.

    Args:
        name: name of the row.
        seed: the seed.
        epochs: passes over the training images.
        command: what made it.
        top1: accuracy of the file.
        nbytes: its size.
        cpu_s: CPU seconds of `finetune`, its start included.
        widths: the layers by bits of the activations that they take, as the file's report counts them.
    """

    name: str
    seed: int
    epochs: int
    command: str
    top1: float
    nbytes: int
    cpu_s: float
    widths: str


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="where runs go; default: a temporary folder")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--options", default="", help="further options of finetune, for every row")
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    results = [Result(**entry) for entry in json.loads(args.json.read_text())] if args.json.exists() else []
    with tempfile.TemporaryDirectory() as own:
        for name, seed in asked(args.rows, args.seeds):
            words = command(args.data, ROWS[name], args.epochs, seed) + shlex.split(args.options)
            if args.show:
                print(f"{name}: {shlex.join(words)}")
            elif not any((r.name, r.seed, r.epochs) == (name, seed, args.epochs) for r in results):
                results.append(measured(args, name, seed, words, Path(args.work or own)))
                print(results[-1], flush=True)
                args.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    for epochs in sorted({result.epochs for result in results}):
        show([result for result in results if result.epochs == epochs])


def asked(names: list[str], seeds: int) -> Iterator[tuple[str, int]]:
    """Yield the rows, all with the first seed, then with the next."""
    for seed in range(seeds):
        yield from ((name, seed) for name in names)


def command(folder: Path, row: Row, epochs: int, seed: int) -> list[str]:
    """Return the command line of a row, without its output."""
    float_net = [str(folder / NET.weights), "--arch", f"{folder}/{NET.arch}"]
    return [
        "qcompress", "finetune", *(float_net if row.start is None else ["start"]),
        "--data", f"{folder}/cifar10jpeg_small.npz:train_x", "--transform", transform(folder),
        "--augment", "flip,crop:2", *shlex.split(row.options), "--epochs", str(epochs), "--seed", str(seed),
    ]  # fmt: skip


def transform(folder: Path) -> str:
    """Return the function that makes inputs of stored images, as the command line names it."""
    return f"{folder}/{NET.arch.partition(':')[0]}:{NET.transform}"


def measured(args: argparse.Namespace, name: str, seed: int, words: list[str], work: Path) -> Result:
    """Run a command line to its end, export what it left, and measure the file."""
    row, folder = ROWS[name], work / re.sub(r"\W+", "-", f"{name} {seed} {args.epochs}")
    start = work / re.sub(r"\W+", "-", f"start {row.start}")
    if row.start is not None and not start.exists():
        np.save(work / "calibration.npy", next(iter(NET.calibration_data(args.data).inputs.values())))
        run(["qcompress", "export", str(args.data / NET.weights), "--arch", f"{args.data}/{NET.arch}",
             "--calibration", str(work / "calibration.npy"), "--transform", transform(args.data),
             *shlex.split(row.start), "-o", f"{start}.onnx", "--save-compressed", str(start)])  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    words = [str(start) if word == "start" else word for word in words]
    run([*words, "-o", str(folder), *(["--resume"] if (folder / "run.json").exists() else [])])
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    file = folder.with_suffix(".onnx")
    report = json.loads(run(["qcompress", "export", str(folder), "-o", str(file), "--force", "--json"]))
    test = NET.test_data(args.data)
    top1 = float((logits(file.read_bytes(), test).argmax(1) == test.labels).mean())
    bits = [layer["activation_bits"] for layer in report["layers"]]
    widths = ", ".join(f"{bits.count(b)} at {b or 'float'}" for b in sorted(set(bits), key=lambda b: b or 99))
    shutil.rmtree(folder)
    said = shlex.join(words).replace(str(args.data), "DIR").replace(str(start), "start")
    return Result(name, seed, args.epochs, said, top1, file.stat().st_size, seconds, widths)


def run(words: list[str]) -> str:
    """Return what a command of ours prints; run it on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run([QCOMPRESS, *words[1:]], env=environment, stdout=subprocess.PIPE, text=True)
    if found.returncode:
        raise SystemExit(f"{shlex.join(words)} ended with exit code {found.returncode}")
    return found.stdout


def show(results: list[Result]) -> None:
    """Print a line for each row, averaged over its seeds, the paired differences, and the limits."""
    by_name: dict[str, dict[int, Result]] = {}
    for result in results:
        by_name.setdefault(result.name, {})[result.seed] = result
    print(f"\n{results[0].epochs} epochs{'':21} seeds   top-1   worst    bytes  CPU min  layers by activation bits")
    bars = []
    for name, group in by_name.items():
        top1 = [r.top1 for r in group.values()]
        nbytes, minutes = np.mean([r.nbytes for r in group.values()]), np.mean([r.cpu_s / 60 for r in group.values()])
        widths = next(iter(group.values())).widths
        print(f"{name:29} {len(group):5} {np.mean(top1):7.2%} {min(top1):7.2%} {nbytes:8,.0f} {minutes:8.1f}  {widths}")
        least, other = ROWS[name].least, ROWS[name].no_worse_than
        if least is not None:
            bars.append(Bar(f"{name}, mean of {len(group)}", float(np.mean(top1)), least, at_least=True))
        if other in by_name and set(group) & set(by_name[other]):
            print(paired(name, values(group), other, values(by_name[other])))
    print(*bars, sep="\n")


def values(group: dict[int, Result]) -> dict[int, float]:
    """Return the accuracies by seed."""
    return {seed: result.top1 for seed, result in group.items()}


if __name__ == "__main__":
    main()
