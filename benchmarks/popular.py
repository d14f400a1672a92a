"""Compares int8 files of popular nets with onnxruntime's own quantization, and export with torch.onnx: time only.

    python benchmarks/popular.py [--sections speed export] [--nets YOLOv8n …] [--seconds 20] [--json FILE]

The nets are those of the zoo, with random weights; `make zoo` sets up what they need. Speed: CPU time on one thread at
batch 1, medians over rounds in which all files take turns, with the float file against itself as the control. The
baselines are `quantize_static` (QDQ, uint8 activations, int8 weights per channel), and for MobileBERT the faster of
`quantize_dynamic` per tensor and per channel, both after onnxruntime's own preprocessing. A speed below its limit, but
within the control's spread, counts as `noise`. Export: CPU time of `compress` with effort fast and `export`, over that
of `torch.onnx.export` with the same dynamic axes; both run in turns in one process, the first turn does not count.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import _baselines
import numpy as np
import torch
from _common import Bar, quiet
from torch import nn
from zoo_nets import NETS
from zoo_nets.net import Example, images

import qcompress as qc
from qcompress.data.dataset import Dataset
from qcompress.graph.batchnorm import fold_batchnorm
from qcompress.graph.options import ProgramOptions
from qcompress.graph.tracing import from_module
from qcompress_exporters import build, export
from qcompress_exporters.onnx_format.file import float_file
from qcompress_exporters.onnx_format.metadata import read
from qcompress_exporters.onnx_format.trace import trace
from qcompress_exporters.parity.sessions import optimized_ops
from qcompress_exporters.parity.timing import cpu_seconds, paired

STATIC, DYNAMIC, OURS, FLOAT, CONTROL = "quantize_static", "quantize_dynamic", "qcompress", "float", "control"
SIZES = {"YOLOv8n": 320, "MixNet-S": 224, "EfficientNet-B0": 224, "ResNet-18": 224, "MobileNetV2": 224}  # of images
TEXT = "MobileBERT"
EXPORTED = ("ResNet-18", "MobileNetV2", "MixNet-S", TEXT)
SLOWEST = 1.4  # limit of our export's time over torch.onnx's
TURNS = 3


@dataclass(frozen=True)
class Speed:
    """Speeds of one net's files, over the float file's.

    Args:
        net: its name.
        ms: of a run of the float file.
        ours: ours.
        baseline: that of the faster of the baselines.
        over_baseline: ours over the baseline's.
        spread: quartiles of the control.
        float_between: float operators between our int8 layers.
        operators: those that onnxruntime runs of our file.
    """

    net: str
    ms: float
    ours: float
    baseline: float
    over_baseline: float
    spread: tuple[float, float]
    float_between: dict[str, int]
    operators: dict[str, int]


@dataclass(frozen=True)
class ExportTime:
    """CPU seconds of both ways to export a net."""

    net: str
    ours_s: float
    torch_s: float


def main() -> int:
    """Measure, and return 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=("speed", "export"), default=("speed", "export"))
    parser.add_argument("--nets", nargs="+", choices=[*SIZES, TEXT], default=[*SIZES, TEXT])
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, for each net")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, list[Any]] = {"speed": [], "export": []}
    failed = 0
    for name in args.nets:
        with quiet():
            example = example_of(name)
        if "speed" in args.sections:
            found = speed(name, example, args.seconds)
            results["speed"].append(asdict(found))
            failed += show_speed(found)
        if "export" in args.sections and name in EXPORTED:
            taken = export_time(name, example)
            results["export"].append(asdict(taken))
            bar = Bar(f"{name}: export over torch.onnx ({taken.torch_s:.1f} s)", taken.ours_s / taken.torch_s, SLOWEST)
            failed += bar.verdict == "FAIL"
            print(bar, flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(failed > 0)


def example_of(name: str) -> Example:
    """Return a net with inputs of the usual size."""
    torch.manual_seed(0)
    example = NETS[name].make()
    if name in SIZES:
        (key,) = example.inputs
        example = replace(example, inputs={key: images(SIZES[name])})
    return example


def speed(name: str, example: Example, seconds: float) -> Speed:
    """Time the float file, ours and the baselines'."""
    arrays = {key: np.asarray(value) for key, value in example.inputs.items()}
    data = Dataset(inputs=arrays, name="random")
    with quiet():
        program = from_module(example.module, ProgramOptions(inputs=data.example()))
        folded = fold_batchnorm(program)
        original = float_file(trace(folded), folded.state())
        if name == TEXT:
            plan, asked = qc.Plan.from_flags(bits=8), {"compute": "dynamic8"}
            made = {f"{DYNAMIC} {c}": _baselines.dynamic(original, per_channel=c) for c in (False, True)}
        else:
            plan, asked = qc.Plan.from_flags(bits=8, activation_bits=8), {"calibration": data}
            made = {STATIC: _baselines.static(original, data, "MinMax", batch=1)}
        small = qc.compress(example.module, plan, example_inputs=dict(example.inputs), effort="fast", **asked)
        built = build(small)
        files = {FLOAT: original, OURS: built.data, **made, CONTROL: original}
        feeds = {key: value[:1] for key, value in arrays.items()}
        times = dict(zip(files, cpu_seconds(list(files.values()), feeds, seconds=seconds).T, strict=True))
        ratios = {key: paired(times[FLOAT], spent) for key, spent in times.items()}
        best = max(made, key=lambda key: ratios[key].median)
        return Speed(
            net=name,
            ms=1e3 * float(np.median(times[FLOAT])),
            ours=ratios[OURS].median,
            baseline=ratios[best].median,
            over_baseline=paired(times[best], times[OURS]).median,
            spread=(ratios[CONTROL].low, ratios[CONTROL].high),
            float_between=dict(built.report.float_operators),
            operators={op: count for op, count in optimized_ops(built.data).items() if count},
        )


def show_speed(found: Speed) -> bool:
    """Print a net's speeds; return whether the limit is missed by more than noise."""
    low, high = found.spread
    verdict = "pass" if found.over_baseline >= 1 else "noise" if found.over_baseline >= min(1.0, low) else "FAIL"
    between = ", ".join(f"{count} {op}" for op, count in found.float_between.items()) or "none"
    print(f"{verdict:5} {found.net}: {found.over_baseline:.3f} x the baseline's speed >= 1")
    print(
        f"      over float ({found.ms:.1f} ms): ours {found.ours:.2f}, baseline {found.baseline:.2f}, control "
        f"{low:.2f} to {high:.2f}; float operators between int8 layers: {between}",
        flush=True,
    )
    return verdict == "FAIL"


def export_time(name: str, example: Example) -> ExportTime:
    """Export a net both ways, in turns."""
    inputs = dict(example.inputs)
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "net.onnx"
        ways = (lambda: ours(example.module, inputs, path), lambda: theirs(example.module, inputs, path))
        times = [[seconds_of(way) for way in ways] for _ in range(TURNS)][1:]
    own, torchs = (statistics.median(column) for column in zip(*times, strict=True))
    return ExportTime(name, own, torchs)


def ours(module: nn.Module, inputs: dict[str, torch.Tensor], path: Path) -> None:
    """Compress to 4 bits and export."""
    export(qc.compress(module, qc.Plan.from_flags(bits=4), example_inputs=inputs, effort="fast"), path, force=True)


def theirs(module: nn.Module, inputs: dict[str, torch.Tensor], path: Path) -> None:
    """Export in float, with the dynamic axes of the file that ours wrote there."""
    dynamic = read(path).dynamic
    axes = {name: {axis: torch.export.Dim.AUTO for key, axis in dynamic if key == name} for name in inputs}
    torch.onnx.export(module, (), path, kwargs=inputs, dynamo=True, dynamic_shapes=axes, verbose=False)


def seconds_of(work: Callable[[], Any]) -> float:
    """Return the CPU seconds of some work."""
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    sys.exit(main())
