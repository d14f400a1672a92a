"""Compares compression without training or labels with other tools: bytes, accuracy, KL, time, memory, with limits.

    python benchmarks/posthoc.py --data DIR [--nets digits resnet20 mobilenet] [--bits 4 3 2] [--recipes fast ...]
                                 [--peers "SKM groups" ...] [--json FILE]

DIR holds the nets and images of `_nets.py`; `digits` needs no files. Recipes: `fast` takes the nearest levels,
`no data` solves weights on synthesised inputs, the solvers solve them on calibration images without labels, `best`
tunes all layers together if that helps. Peers are the tools of `_peers.py`; those that are not installed are skipped.
Files are measured in onnxruntime as they were written. Peers that do not write an ONNX file (`*`) run in torch, and
their bytes are those of the smallest possible file. `--json` writes each row as soon as it is measured: it replaces the
same row of an earlier FILE and keeps the other rows.

Each row is measured in a fresh process. CPU seconds run from the traced net to the file; for onnxruntime's tools they
start at the float file, and for peers without a file they end before writing. The peak is the largest resident set of
the process until then, including all imports and the net; the float row shows how much these take.
"""

import argparse
import contextlib
import importlib
import json
import os
import resource
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Bar, in_fresh_process, quiet
from _nets import DIGITS, NETS, trained_digits
from _peers import INSTALL, PEERS, Palettized, Subject, folded_module

from qcompress.data.dataset import Dataset
from qcompress.graph.batchnorm import fold_batchnorm
from qcompress.graph.program import FloatProgram
from qcompress.metrics.metric import compare, load_metric
from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.settings import Effort, PosthocSettings
from qcompress.solvers import SOLVERS
from qcompress_exporters import build
from qcompress_exporters.onnx_format.file import float_file
from qcompress_exporters.onnx_format.trace import trace
from qcompress_exporters.parity.differences import outputs_of

CALIBRATION = {"digits": 256, "resnet20": 512, "mobilenet": 128}
FLOAT, FLOAT_BITS = "float", 32


@dataclass(frozen=True)
class Recipe:
    """Settings of our compression.

    Args:
        effort: effort of `compress_program`.
        solver: solver of `compress_program`.
        has_data: whether it gets the calibration images.
    """

    effort: Effort
    solver: str = "gptq"
    has_data: bool = False


RECIPES = {
    "fast": Recipe("fast"),
    "no data": Recipe("balanced"),
    **{solver: Recipe("balanced", solver, has_data=True) for solver in SOLVERS},
    "best": Recipe("best", has_data=True),
}


@dataclass(frozen=True)
class Task:
    """A row to measure: the net, its folder, the bits of its weights, and FLOAT, a recipe or a peer."""

    net: str
    folder: Path
    bits: int
    recipe: str


@dataclass(frozen=True)
class Made:
    """The result of a task.

    Args:
        nbytes: size of the file.
        has_file: whether a file was written; if not, `nbytes` is the smallest possible size.
        cpu_s: CPU seconds of compressing and of writing the file.
        peak_mb: largest resident set of the process until then, MiB.
        outputs: outputs for the test images.
        labels: labels of the test images.
    """

    nbytes: int
    has_file: bool
    cpu_s: float
    peak_mb: float
    outputs: dict[str, Any]
    labels: Any


@dataclass(frozen=True)
class Row:
    """The figures of one file.

    Args:
        net: name of the net.
        bits: bits per weight.
        recipe: FLOAT, a key of RECIPES or of PEERS.
        nbytes: see Made.
        has_file: see Made.
        top1: top-1 accuracy on the test images, 0 to 1.
        drop: the float file's top-1 minus this one's.
        low: lower end of the paired 95 % interval of the drop.
        high: upper end of the interval.
        agreement: share of images for which the prediction equals the float file's.
        kl: mean Kullback-Leibler divergence of the predictions from the float file's, nats.
        cpu_s: see Made.
        peak_mb: see Made.
        made_with: the tool that compressed and the versions of what ran it.
    """

    net: str
    bits: int
    recipe: str
    nbytes: int
    has_file: bool
    top1: float
    drop: float
    low: float
    high: float
    agreement: float
    kl: float
    cpu_s: float
    peak_mb: float
    made_with: str


AT_LEAST = {"nbytes": False, "drop": False, "top1": True, "agreement": True}
LIMITS: dict[tuple[str, int, str], dict[str, float]] = {
    ("resnet20", 4, "gptq"): {"nbytes": 160_000, "top1": 0.860},
    ("resnet20", 3, "gptq"): {"nbytes": 125_000, "top1": 0.858},
    ("resnet20", 2, "gptq"): {"nbytes": 95_000, "top1": 0.835},
    ("resnet20", 2, "best"): {"nbytes": 95_000, "top1": 0.842},
    ("resnet20", 1, "best"): {"nbytes": 60_000},
    ("resnet20", 4, "no data"): {"top1": 0.855},
    ("resnet20", 3, "no data"): {"top1": 0.835},
    ("resnet20", 2, "no data"): {"top1": 0.65},
    ("mobilenet", 4, "gptq"): {"nbytes": 1_450_000, "drop": 0.02, "agreement": 0.85},
    ("mobilenet", 3, "gptq"): {"nbytes": 1_100_000, "drop": 0.10},
}


def main() -> None:
    """Measure, print a table and the limits, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", default=list(CALIBRATION), choices=list(CALIBRATION))
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2], choices=range(1, 9))
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # for scikit-learn too, in the processes started below
    peers = [name for name in args.peers if PEERS[name].is_installed]
    absent = [name for name in args.peers if not PEERS[name].is_installed]
    if absent:
        print(f"left out, not installed: {', '.join(absent)}. {INSTALL}")
    print(
        f"{'net':9} bits {'recipe':11} {'bytes':>11} {'top-1':>7} {'drop, 95 %':>16} {'agree':>7} {'KL':>7} "
        f"{'CPU s':>6} peak MB"
    )
    rows = []
    for name in args.nets:
        with trained_digits() if name == "digits" else contextlib.nullcontext(args.data) as folder:
            for row in measure(Task(name, folder, bits, recipe) for bits, recipe in asked(args, peers)):
                rows.append(row)
                show(row)
                if args.json is not None:
                    write(args.json, row)
    for bar in bars_of(rows):
        print(bar)


def write(path: Path, row: Row) -> None:
    """Write a row to a JSON file, replace its earlier figures, and keep the file's other rows."""
    earlier = [Row(**found) for found in json.loads(path.read_text())["rows"]] if path.exists() else []
    rows = list({(r.net, r.bits, r.recipe): r for r in [*earlier, row]}.values())
    rows.sort(key=lambda r: (r.net, -r.bits))
    bars = [{**asdict(bar), "verdict": bar.verdict} for bar in bars_of(rows)]
    path.write_text(json.dumps({"rows": [asdict(r) for r in rows], "bars": bars}, indent=1) + "\n")


def made_with(recipe: str) -> str:
    """Return the packages behind a recipe with their versions, such as `coremltools 9.0, torch 2.13.0`."""
    tool = PEERS[recipe].needs.partition(".")[0] if recipe in PEERS else "qcompress"
    packages = dict.fromkeys(["scikit-learn" if tool == "sklearn" else tool, "torch", "onnxruntime"])
    return ", ".join(f"{package} {metadata.version(package)}" for package in packages)


def asked(args: argparse.Namespace, peers: list[str]) -> Iterator[tuple[int, str]]:
    """Yield bits and recipe of a net's rows: the float file, our files and the peers, and peers with 8 bits only."""
    yield FLOAT_BITS, FLOAT
    for bits in args.bits:
        yield from ((bits, recipe) for recipe in args.recipes)
        yield from ((bits, name) for name in peers if PEERS[name].bits in (None, bits))
    if 8 not in args.bits:
        yield from ((8, name) for name in peers if PEERS[name].bits == 8)


def measure(tasks: Iterable[Task]) -> Iterator[Row]:
    """Yield the rows of one net, the float file first."""
    metric, wanted = load_metric("top1"), None
    for task in tasks:
        made: Made = in_fresh_process(make, task)
        wanted = wanted or made.outputs
        found = compare(metric, wanted, made.outputs, made.labels)
        low, high = found.interval or (float("nan"), float("nan"))
        yield Row(
            task.net,
            task.bits,
            task.recipe,
            made.nbytes,
            made.has_file,
            found.compressed,
            found.drop,
            low,
            high,
            *closeness(wanted, made.outputs),
            made.cpu_s,
            made.peak_mb,
            made_with(task.recipe),
        )


def make(task: Task) -> Made:
    """Compress and test; runs in a separate process, which loads the test images last."""
    torch.set_num_threads(1)
    net = DIGITS if task.net == "digits" else NETS[task.net]
    program = net.program(task.folder)
    calibration = net.calibration_data(task.folder).head(CALIBRATION[task.net])
    if task.recipe in PEERS:
        folded = fold_batchnorm(program)
        subject = Subject(float_of(program), folded_module(net.module(task.folder), folded), calibration)
        with quiet():
            importlib.import_module(PEERS[task.recipe].needs)
            start = time.process_time()
            small = PEERS[task.recipe].make(subject, task.bits)
    else:
        start = time.process_time()
        small = float_of(program) if task.recipe == FLOAT else ours(program, calibration, task)
    cpu_s, peak_mb = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    data = net.test_data(task.folder)
    batches = [dict(batch.inputs) for batch in data.batches(50)]
    if isinstance(small, bytes):
        return Made(len(small), True, cpu_s, peak_mb, outputs_of(small, batches, "deployed"), data.labels)
    outputs = torch_outputs(small, batches, program.output_names)
    return Made(small.nbytes, False, cpu_s, peak_mb, outputs, data.labels)


def float_of(program: FloatProgram) -> bytes:
    """Return the float file, with BatchNorm folded."""
    folded = fold_batchnorm(program)
    return float_file(trace(folded), folded.state())


def ours(program: FloatProgram, calibration: Dataset, task: Task) -> bytes:
    """Compress a program and return our file."""
    recipe = RECIPES[task.recipe]
    given = calibration if recipe.has_data else None
    plan = Plan.from_flags(bits=task.bits)
    settings = PosthocSettings(effort=recipe.effort, solver=recipe.solver)
    return build(compress_program(program, plan, settings, calibration=given)).data


def torch_outputs(small: Palettized, batches: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, Any]:
    """Run a module with one input and one output."""
    (name,) = names
    with torch.no_grad():
        found = [small.module(torch.from_numpy(value)).numpy() for batch in batches for value in batch.values()]
    return {name: np.concatenate(found)}


def closeness(wanted: dict[str, Any], got: dict[str, Any]) -> tuple[float, float]:
    """Return the agreement and the mean KL divergence in nats."""
    ((_, original),) = wanted.items()
    ((_, compressed),) = got.items()
    logs = [np.asarray(torch.from_numpy(v).double().log_softmax(1)) for v in (original, compressed)]
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(1).mean()
    return float((original.argmax(1) == compressed.argmax(1)).mean()), float(kl)


def show(row: Row) -> None:
    """Print a line of the table."""
    nbytes, drop = f"{row.nbytes:,}{' ' if row.has_file else '*'}", f"{row.low:+.2%} {row.high:+.2%}"
    print(
        f"{row.net:9} {row.bits:4} {row.recipe:11} {nbytes:>11} {row.top1:7.2%} {drop:>16} {row.agreement:7.2%} "
        f"{row.kl:7.4f} {row.cpu_s:6.1f} {row.peak_mb:7.0f}",
        flush=True,
    )


def bars_of(rows: list[Row]) -> Iterator[Bar]:
    """Yield the figures of these rows that have limits."""
    for row in rows:
        for figure, limit in LIMITS.get((row.net, row.bits, row.recipe), {}).items():
            what = f"{row.net} {row.bits} bits {row.recipe}, {figure}"
            yield Bar(what, getattr(row, figure), limit, AT_LEAST[figure])


if __name__ == "__main__":
    main()
