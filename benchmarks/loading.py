"""Measures how long onnxruntime takes to load portable files, compared with another target or an earlier version.

    python benchmarks/loading.py [--weights 10000000] [--width 1024] [--bits 2 3 4 5 6 7] [--target onnxruntime==1.24]
                                 [--rounds 9] [--save DIR] [--before DIR] [--json FILE]

The net is a chain of linear layers of `--width` inputs and outputs, `--weights` weights in all, with random codes. The
portable file and the other one are loaded in turns, in alternating order, on one thread; times are CPU time. The ratio
is the median over the rounds. Comparing two equal files shows the noise. `--save` keeps the portable files; `--before`
compares with files that `--save` kept with an earlier version (or that were written for its default target). The exit
code is 1 if a portable file takes over 1.15 times as long as the other, beyond the quartiles.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

import qcompress
from qcompress.compressed.model import CompressedModel
from qcompress.plan.plan import Plan, Settings
from qcompress_exporters import build

MOST = 1.15


@dataclass(frozen=True)
class Row:
    """The result at one width.

    Args:
        bits: bits per weight.
        nbytes: sizes of the portable and the other file.
        load_ms: median CPU times of both.
        ratio: the portable file's time over the other's, median over the rounds.
        quartiles: lower and upper quartile of the ratio.
    """

    bits: int
    nbytes: tuple[int, int]
    load_ms: tuple[float, float]
    ratio: float
    quartiles: tuple[float, float]

    @property
    def slow(self) -> bool:
        """Return whether the portable file exceeds the limit beyond the noise."""
        return self.quartiles[0] > MOST


def main() -> int:
    """Measure all widths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=10_000_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 7])
    parser.add_argument("--target", default="onnxruntime==1.24")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = chain(arguments.width, max(1, arguments.weights // arguments.width**2))
    rows = []
    print(f"{'bits':>4} {'portable B':>11} {'other B':>11} {'portable ms':>11} {'other ms':>9} {'ratio':>6}  quartiles")
    for bits in arguments.bits:
        coded = with_random_codes(model, bits)
        portable = build(coded).data
        if arguments.save:
            arguments.save.mkdir(parents=True, exist_ok=True)
            (arguments.save / f"w{bits}.onnx").write_bytes(portable)
        before = arguments.before and arguments.before / f"w{bits}.onnx"
        other = before.read_bytes() if before else build(coded, target=arguments.target).data
        row = measured(bits, portable, other, arguments.rounds)
        rows.append(row)
        print(
            f"{bits:>4} {row.nbytes[0]:>11,} {row.nbytes[1]:>11,} {row.load_ms[0]:>11.0f} {row.load_ms[1]:>9.0f} "
            f"{row.ratio:>6.2f}  {row.quartiles[0]:.2f} to {row.quartiles[1]:.2f}{'  FAIL' if row.slow else ''}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return int(any(row.slow for row in rows))


def chain(width: int, layers: int) -> CompressedModel:
    """Return linear layers with ReLUs between them, all weights in float."""
    net = nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(width, width, bias=False), nn.ReLU())))
    plan = Plan(default=Settings(bits=8), name={"*": Settings(skip=True)})
    return qcompress.compress(net.eval(), plan, example_inputs=(torch.zeros(2, width),))


def with_random_codes(model: CompressedModel, bits: int) -> CompressedModel:
    """Return the same model with palettes of random codes."""
    random = np.random.default_rng(bits)
    return replace(
        model,
        artifacts={
            name: qcompress.PalettizedWeight(
                codes=random.integers(0, 1 << bits, artifact.shape).astype(np.uint8),
                lut=random.standard_normal((1, 1 << bits)).astype(np.float32),
                bits=bits,
            )
            for name, artifact in model.artifacts.items()
        },
    )


def measured(bits: int, portable: bytes, other: bytes, rounds: int) -> Row:
    """Measure how two files load, after a warm-up round."""
    times: list[tuple[float, float]] = []
    for turn in range(rounds + 1):
        order = (portable, other) if turn % 2 else (other, portable)
        first, second = (load_ms(data) for data in order)
        times.append((first, second) if turn % 2 else (second, first))
    ratios = [ours / theirs for ours, theirs in times[1:]]
    ours, theirs = zip(*times[1:], strict=True)
    low, _, high = statistics.quantiles(ratios, n=4)
    return Row(
        bits=bits,
        nbytes=(len(portable), len(other)),
        load_ms=(statistics.median(ours), statistics.median(theirs)),
        ratio=statistics.median(ratios),
        quartiles=(low, high),
    )


def load_ms(data: bytes) -> float:
    """Return the CPU time of one load, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    start = time.process_time()
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return 1e3 * (time.process_time() - start)


if __name__ == "__main__":
    sys.exit(main())
