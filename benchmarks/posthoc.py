"""Compression without training or labels: accuracy, KL and bytes of real files, by bits and recipe.

    python benchmarks/posthoc.py --data DIR [--nets resnet20 ...] [--bits 4 3 2] [--recipes fast ...] [--json FILE]

DIR holds the nets and images of `_nets.py`. Everything is measured through onnxruntime on the files that were written.
"""

import argparse
import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _nets import NETS

from qcompress.batchnorm import fold_batchnorm
from qcompress.metrics import compare, load_metric
from qcompress.plan import Plan
from qcompress.posthoc.compress import compress_program
from qcompress_exporters import build
from qcompress_exporters.checks import outputs_of
from qcompress_exporters.onnx_file import float_file
from qcompress_exporters.trace import trace

CALIBRATION = {"resnet20": 512, "mobilenet": 128}
RECIPES = {  # name -> effort, and whether it gets the calibration images
    "fast": ("fast", False),
    "no data": ("balanced", False),
    "balanced": ("balanced", True),
}


@dataclass(frozen=True)
class Row:
    """One file.

    Args:
        net: its name.
        bits: of every weight.
        recipe: a key of RECIPES.
        nbytes: of the file.
        top1: on the test images.
        low: lower end of the paired 95 % interval of the drop in top-1 against the float file.
        high: its upper end.
        agreement: share of images with the float file's answer.
        kl: mean Kullback-Leibler divergence of the answers from the float file's, nats.
        cpu_s: CPU seconds of compression alone.
        peak_mb: largest resident set of the process so far.
    """

    net: str
    bits: int
    recipe: str
    nbytes: int
    top1: float
    low: float
    high: float
    agreement: float
    kl: float
    cpu_s: float
    peak_mb: float


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", default=list(CALIBRATION), choices=list(CALIBRATION))
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'net':10} bits {'recipe':9} {'bytes':>10} {'top-1':>7} {'drop, 95 %':>16} {'agree':>7} {'KL':>7} CPU s")
    rows = []
    for name in args.nets:
        for row in measure(name, args.data, args.bits, args.recipes):
            rows.append(row)
            drop = f"{row.low:+.2%} {row.high:+.2%}"
            print(
                f"{row.net:10} {row.bits:4} {row.recipe:9} {row.nbytes:10,} {row.top1:7.2%} {drop:>16} "
                f"{row.agreement:7.2%} {row.kl:7.4f} {row.cpu_s:5.1f}",
                flush=True,
            )
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def measure(name: str, folder: Path, widths: list[int], recipes: list[str]) -> "list[Row]":
    """The files of one net."""
    net = NETS[name]
    program, data = net.program(folder), net.test_data(folder)
    calibration = net.calibration_data(folder).head(CALIBRATION[name])
    batches, metric = [dict(batch.inputs) for batch in data.batches(50)], load_metric("top1")
    folded = fold_batchnorm(program)
    wanted = outputs_of(float_file(trace(folded), folded.state()), batches, "deployed")
    rows = []
    for bits in widths:
        for recipe in recipes:
            effort, has_data = RECIPES[recipe]
            given = calibration if has_data else None
            start = time.process_time()
            small = compress_program(program, Plan.from_flags(bits=bits), calibration=given, effort=effort)
            cpu_s = time.process_time() - start
            file = build(small).data
            got = outputs_of(file, batches, "deployed")
            found = compare(metric, wanted, got, data.labels)
            low, high = found.interval or (float("nan"), float("nan"))
            rows.append(
                Row(
                    name,
                    bits,
                    recipe,
                    len(file),
                    found.compressed,
                    low,
                    high,
                    *closeness(wanted, got),
                    cpu_s,
                    peak_mb(),
                )
            )
    return rows


def closeness(wanted: dict[str, Any], got: dict[str, Any]) -> tuple[float, float]:
    """Agreement, and the mean KL divergence in nats."""
    ((_, original),) = wanted.items()
    ((_, compressed),) = got.items()
    logs = [np.asarray(torch.from_numpy(v).double().log_softmax(1)) for v in (original, compressed)]
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(1).mean()
    return float((original.argmax(1) == compressed.argmax(1)).mean()), float(kl)


def peak_mb() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main())
