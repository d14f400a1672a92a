"""Compares integer files with onnxruntime's own quantization: bytes, speed, operators and accuracy, with limits.

    python benchmarks/integer.py --data DIR [--nets resnet20 mobilenet linear] [--no-accuracy] [--no-latency]
                                 [--baselines] [--json FILE]

DIR holds the nets and images of `_nets.py`. `--baselines` measures onnxruntime's files only.

Speed is the median over paired rounds of CPU time on one thread, with all files of a group in the same rounds. The
control is the float file against itself. A speed below its limit but within the control's spread counts as `noise`, not
as a failure. Accuracy is measured in onnxruntime on the files themselves.
"""

import argparse
import collections
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import _baselines
import numpy as np
import onnxruntime
import torch
from _nets import NETS, Net

from qcompress.compressed.model import CompressedModel
from qcompress.data.dataset import Dataset
from qcompress.deployment import Compute
from qcompress.errors import QCompressError
from qcompress.graph.batchnorm import fold_batchnorm
from qcompress.graph.marks import MarkedRunner, mark, rounding
from qcompress.graph.options import ProgramOptions
from qcompress.graph.program import FloatProgram
from qcompress.graph.tracing import from_module
from qcompress.metrics.metric import MetricResult, compare, load_metric
from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.settings import PosthocSettings
from qcompress_exporters import build, validate
from qcompress_exporters.onnx_format.file import float_file, sites_of
from qcompress_exporters.onnx_format.trace import trace
from qcompress_exporters.parity.differences import outputs_of
from qcompress_exporters.parity.sessions import optimized_ops
from qcompress_exporters.parity.timing import Ratio, cpu_seconds, paired

FLOAT, CONTROL, STATIC, STATIC_MEAN = "float", "control", "quantize_static", "quantize_static, ReduceMean"
DYNAMIC = ("quantize_dynamic", "quantize_dynamic per channel")
SCHEMES, FORMATS = ("palette", "uniform"), ("qdq", "integer")
ROUNDS = {1: 300, 32: 60, 128: 60}  # by batch
PARITY_SAMPLES = 256
STATIC_IS_SLOW = 1.42  # if quantize_static itself is slower than this, the limit against float is not applied


@dataclass(frozen=True)
class Bar:
    """A figure with its limit.

    Args:
        name: the file.
        what: the figure.
        value: the measured value.
        limit: lower or upper limit.
        at_least: whether the limit is a lower one.
        slack: a speed fails only below this share of its limit; it follows from the control's spread.
    """

    name: str
    what: str
    value: float
    limit: float
    at_least: bool = True
    slack: float = 1.0

    @property
    def verdict(self) -> str:
        """Return `pass`, `noise` or `FAIL`."""
        if self.value >= self.limit if self.at_least else self.value <= self.limit:
            return "pass"
        return "noise" if self.at_least and self.value >= self.limit * self.slack else "FAIL"


@dataclass
class Group:
    """The files of one net with their measurements.

    Args:
        files: files by name, the float file first.
        parity: whether our files passed `validate`.
        times: CPU seconds by batch and name, one value per round.
        ops: the operators that onnxruntime runs.
        models: the compressed models behind our files.
        accuracy: comparisons with the float file.
        refused: the reason, by file, why it could not be compressed or written.
        bars: figures with their limits.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    parity: dict[str, bool] = field(default_factory=dict)
    times: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    ops: dict[str, collections.Counter[str]] = field(default_factory=dict)
    models: dict[str, CompressedModel] = field(default_factory=dict)
    accuracy: dict[str, MetricResult] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)

    def time(self, feeds: dict[str, Any], names: Iterable[str]) -> None:
        """Time files in the same rounds, with a second float file as the control."""
        batch, names = len(next(iter(feeds.values()))), [FLOAT, *(n for n in names if n != FLOAT)]
        measured = cpu_seconds([*(self.files[n] for n in names), self.files[FLOAT]], feeds, rounds=ROUNDS[batch])
        self.times[batch] = dict(zip([*names, CONTROL], measured.T, strict=True))

    def speed(self, batch: int, name: str, than: str = FLOAT) -> Ratio:
        """Return how many times faster a file is than another."""
        return paired(self.times[batch][than], self.times[batch][name])

    def upper_bar(self, name: str, what: str, value: float, limit: float) -> None:
        """Add an upper limit for a figure."""
        self.bars.append(Bar(name, what, value, limit, at_least=False))

    def speed_bar(self, batch: int, name: str, than: str, limit: float) -> None:
        """Add a lower limit for a speed."""
        slack = min(1.0, self.speed(batch, CONTROL).low)
        what = f"speed at batch {batch} x {than}"
        self.bars.append(Bar(name, what, self.speed(batch, name, than).median, limit, slack=slack))

    def fastest(self, names: Iterable[str]) -> str:
        """Return the file that was fastest at batch 1, or the first one if they were not timed."""
        known = list(names)
        return max(known, key=lambda n: self.speed(1, n).median) if self.times else known[0]

    def ours(self, *parts: str) -> list[str]:
        """Return the names of our files that contain all parts."""
        return [n for n in self.parity if set(parts) <= set(n.split())]


def main() -> None:
    """Run the benchmark on the selected nets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", choices=[*NETS, "linear"], default=[*NETS, "linear"])
    parser.add_argument("--no-accuracy", dest="accuracy", action="store_false")
    parser.add_argument("--no-latency", dest="latency", action="store_false")
    parser.add_argument("--baselines", action="store_true", help="measure onnxruntime's files only")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    for name in args.nets:
        print(f"\n{name}: onnxruntime {onnxruntime.__version__}", flush=True)
        group = measure_linear(args) if name == "linear" else measure_net(name, args)
        show(group)
        results[name] = as_dict(group)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def measure_net(name: str, args: argparse.Namespace) -> Group:
    """Measure ResNet-20 at five widths, or MobileNet at 8 bits, against quantize_static."""
    net, group = NETS[name], Group()
    program, data, calibration = net.program(args.data), net.test_data(args.data), net.calibration_data(args.data)
    group.files[FLOAT] = float_of(program)
    for label in _baselines.CALIBRATIONS:
        if args.accuracy or label == "MinMax":
            group.files[f"{STATIC} {label}"] = static(group.files[FLOAT], calibration, label, net)
    group.files[STATIC_MEAN] = static(_baselines.with_mean(group.files[FLOAT]), calibration, "MinMax", net)
    if not args.baselines:
        widths = ((8, 8), (4, 8), (2, 8), (4, 4), (2, 2)) if name == "resnet20" else ((8, 8),)
        for bits, activation_bits in widths:
            for scheme in SCHEMES:
                plan = Plan.from_flags(bits=bits, scheme=scheme, activation_bits=activation_bits)
                label = f"W{bits}A{activation_bits} {scheme}"
                add_ours(group, label, program, plan, data.head(PARITY_SAMPLES), calibration=calibration)
    group.ops = {n: optimized_ops(f) for n, f in group.files.items()}
    baselines = [f"{STATIC} MinMax", STATIC_MEAN]
    if args.latency:
        for batch in (1, 32) if name == "resnet20" else (1,):
            group.time(dict(next(data.batches(batch)).inputs), [*baselines, *group.parity])
    if args.accuracy:
        measure_accuracy(group, data)
    baseline = group.fastest(baselines)
    print(f"baseline of speed and bytes: {baseline}")
    (bars_of_resnet20 if name == "resnet20" else bars_of_mobilenet)(group, baseline)
    return group


def static(original: bytes, calibration: Dataset, label: str, net: Net) -> bytes:
    """Run quantize_static in chunks that fit into memory: a large net's activations for all samples do not."""
    large = net.shape[-1] > 64
    return _baselines.static(original, calibration, label, batch=25 if large else 64, chunk=2 if large else None)


def measure_linear(args: argparse.Namespace) -> Group:
    """Measure one Linear at 4 bits, calibrated, and with activation scales that are computed at run time."""
    group, rng = Group(), np.random.default_rng(0)
    torch.manual_seed(0)
    calibration = Dataset(inputs={"input": rng.standard_normal((256, 768)).astype(np.float32)}, name="normal")
    program = from_module(torch.nn.Linear(768, 3072).eval(), ProgramOptions(inputs=calibration.example()))
    group.files[FLOAT] = float_of(program)
    group.files[STATIC] = _baselines.static(group.files[FLOAT], calibration, "MinMax", batch=64)
    for label, per_channel in zip(DYNAMIC, (False, True), strict=True):
        group.files[label] = _baselines.dynamic(group.files[FLOAT], per_channel=per_channel)
    if not args.baselines:
        for scheme in SCHEMES:
            plan = Plan.from_flags(bits=4, scheme=scheme, activation_bits=8)
            add_ours(group, f"W4A8 {scheme}", program, plan, calibration, calibration=calibration)
            plan = Plan.from_flags(bits=4, scheme=scheme)
            add_ours(group, f"W4 dynamic8 {scheme}", program, plan, calibration, compute="dynamic8")
    group.ops = {n: optimized_ops(f) for n, f in group.files.items()}
    if args.latency:
        for batch in (1, 128):
            group.time(dict(next(calibration.batches(batch)).inputs), group.files)
    bars_of_linear(group)
    return group


def float_of(program: FloatProgram) -> bytes:
    """Return the float file of a program, with BatchNorm folded."""
    folded = fold_batchnorm(program)
    return float_file(trace(folded), folded.state())


def add_ours(
    group: Group,
    label: str,
    program: FloatProgram,
    plan: Plan,
    parity: Dataset,
    *,
    calibration: Dataset | None = None,
    compute: Compute | None = None,
) -> None:
    """Compress once and write all formats; record failures, which are printed at the end."""
    try:
        small = compress_program(program, plan, PosthocSettings(compute=compute), calibration=calibration)
    except QCompressError as e:
        group.refused[label] = str(e)
        return
    for format_ in FORMATS if small.compute == "int8" else (None,):
        name = f"{label} {format_}" if format_ else label
        try:
            built = build(small, format=format_)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "net.onnx"
                built.write(path)
                report = validate(small, path, parity)
        except QCompressError as e:
            group.refused[name] = str(e)
        else:
            group.files[name], group.parity[name], group.models[name] = built.data, report.ok, small


def torch_outputs(small: CompressedModel, batches: Iterable[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return what artifacts and grids compute in torch, without a file."""
    weights = {name: artifact.dequantize() for name, artifact in small.artifacts.items()}
    runner = MarkedRunner(mark(small.program.with_state(weights), sites_of(small)))
    quantize = rounding(list(small.activations.values()))
    found = [runner(batch, quantize) for batch in batches]
    return {name: np.concatenate([outputs[name] for outputs in found]) for name in found[0]}


def measure_accuracy(group: Group, data: Dataset) -> None:
    """Compare top-1 of every file with the float file and, for our files, with the best quantize_static."""
    batches, metric = [dict(batch.inputs) for batch in data.batches(50)], load_metric("top1")
    outputs = {n: outputs_of(f, batches, "deployed") for n, f in group.files.items()}
    group.accuracy = {n: compare(metric, outputs[FLOAT], o, data.labels) for n, o in outputs.items()}
    best = max((n for n in outputs if n.startswith(STATIC)), key=lambda n: group.accuracy[n].compressed)
    print(f"baseline of accuracy: {best}, {group.accuracy[best].compressed:.2%}")
    of_torch: dict[int, float] = {}
    for name, small in group.models.items():
        if id(small) not in of_torch:  # both formats belong to one model
            of_torch[id(small)] = compare(metric, outputs[FLOAT], torch_outputs(small, batches), data.labels).compressed
        off = abs(of_torch[id(small)] - group.accuracy[name].compressed)
        group.upper_bar(name, "top-1 away from the artifacts' in torch", off, 0.001)
    for name in group.ours("W8A8"):
        versus = compare(metric, outputs[best], outputs[name], data.labels)
        low, high = versus.interval or (-1.0, 1.0)
        print(f"{name}: top-1 {low:+.2%} to {high:+.2%} below that")
        group.upper_bar(name, f"top-1 surely below {best}", low, 0.0)


def bars_of_resnet20(group: Group, baseline: str) -> None:
    """Add the limits for ResNet-20."""
    a8 = [n for width in ("W8A8", "W4A8", "W2A8") for n in group.ours(width)]
    for batch in group.times:
        for name in a8:
            group.speed_bar(batch, name, baseline, 0.95)
            if group.speed(batch, baseline).median >= STATIC_IS_SLOW:
                group.speed_bar(batch, name, FLOAT, 1.35)
        for width in ("W4A4", "W2A2"):
            for name in group.ours(width):
                twin = name.replace(width, "W8A8")
                if twin in group.parity:
                    group.speed_bar(batch, name, twin, 0.95)
    for form in FORMATS:
        kinds = {tuple(sorted(group.ops[n].items())) for n in a8 if form in n.split()}
        if kinds:
            group.upper_bar(form, "different operator counts of W8A8, W4A8, W2A8", len(kinds), 1)
    for bits, share in ((8, 1.0), (4, 0.55), (2, 0.34)):
        for name in [n for n in group.parity if n.startswith(f"W{bits}")]:
            size_bar(group, name, baseline, share)
    for name in group.ours("W8A8"):
        if name in group.accuracy:
            group.upper_bar(name, "top-1 below float", group.accuracy[name].drop, 0.003)


def bars_of_mobilenet(group: Group, baseline: str) -> None:
    """Add the limits for MobileNet."""
    for name in group.parity:
        for batch in group.times:
            group.speed_bar(batch, name, FLOAT, 1.7)
            group.speed_bar(batch, name, baseline, 0.92)
        size_bar(group, name, baseline, 1.0)


def bars_of_linear(group: Group) -> None:
    """Add the limits for a Linear."""
    like = {"palette": group.fastest(DYNAMIC), "uniform": DYNAMIC[1]}  # an even grid has a scale for each channel
    for batch, limit in ((1, 3.3), (128, 1.8)):
        if batch in group.times:
            for name in group.ours("W4A8"):
                group.speed_bar(batch, name, FLOAT, limit)
            for name in group.ours("dynamic8"):
                group.speed_bar(batch, name, like[name.split()[-1]], 0.97)
    for name in group.ours("dynamic8"):
        size_bar(group, name, like[name.split()[-1]], 0.55)


def size_bar(group: Group, name: str, baseline: str, share: float) -> None:
    """Limit a file's size to a share of another's."""
    nbytes = len(group.files[name]) / len(group.files[baseline])
    group.upper_bar(name, f"bytes x {baseline}", nbytes, share)


def show(group: Group) -> None:
    """Print the table, the operators and the limits."""
    batches = list(group.times)
    width = max(map(len, group.files))
    head = ["bytes", "x static", *(f"b={b}" for b in batches), "top-1", "drop", "parity", "ops"]
    print(f"{'':{width}} " + " ".join(f"{h:>9}" for h in head))
    kinds: dict[tuple[tuple[str, int], ...], str] = {}
    for name, data in group.files.items():
        kind = kinds.setdefault(tuple(sorted(group.ops[name].items())), chr(ord("a") + len(kinds)))
        cells = [f"{len(data):,}", *cells_of(group, name), kind]
        print(f"{name:{width}} " + " ".join(f"{c:>9}" for c in cells))
    for b in batches:
        control = group.speed(b, CONTROL)
        ms = float(np.median(group.times[b][FLOAT]) * 1e3)
        print(
            f"b={b}: float {ms:.3f} ms, control {control.median:.3f}, half of it {control.low:.3f}-{control.high:.3f}"
        )
    for ops, kind in kinds.items():
        print(f"ops {kind}: {', '.join(f'{n} {op}' for op, n in ops)}")
    for name, reason in group.refused.items():
        print(f"FAIL  {name}: {reason}")
    show_bars(group.bars)


def show_bars(bars: list[Bar]) -> None:
    """Print one line per limit with the worst file, and the files that miss the limit."""
    alike: dict[tuple[Any, ...], list[Bar]] = {}
    for bar in bars:
        twin = bar.what.partition(" x ")[2] in {b.name for b in bars}  # W4A4 against its own W8A8
        what = bar.what.partition(" x ")[0] + " x its W8A8" if twin else bar.what
        alike.setdefault((what, bar.limit, bar.at_least), []).append(bar)
    for (what, limit, at_least), same in alike.items():
        worst = (min if at_least else max)(same, key=lambda b: b.value)
        verdict = next(v for v in ("FAIL", "noise", "pass") if v in {b.verdict for b in same})
        sign = ">=" if at_least else "<="
        missed = [f"{b.name} {b.value:.3f}" for b in same if b.verdict == "FAIL"]
        print(f"{verdict:5} {what} {sign} {limit:g}: {len(same)} files, worst {worst.value:.4g} ({worst.name})")
        if missed:
            print(f"      missed by {len(missed)}: {', '.join(missed)}")


def cells_of(group: Group, name: str) -> Iterator[str]:
    """Yield bytes, speeds, accuracy and parity of a file; `-` if not measured."""
    first = next(n for n in group.files if n.startswith(STATIC))
    yield f"{len(group.files[name]) / len(group.files[first]):.3f}"
    for times_batch, times in group.times.items():
        yield f"{group.speed(times_batch, name).median:.3f}" if name in times else "-"
    accuracy = group.accuracy.get(name)
    yield "-" if accuracy is None else f"{accuracy.compressed:.2%}"
    yield "-" if accuracy is None else f"{accuracy.drop:+.2%}"
    yield {None: "-", True: "ok", False: "FAIL"}[group.parity.get(name)]


def as_dict(group: Group) -> dict[str, Any]:
    """Return the measurements of a group as JSON, without the files."""
    return {
        "files": {
            name: {
                "bytes": len(data),
                "ops": dict(group.ops[name]),
                "speed": {b: asdict(group.speed(b, name)) for b, times in group.times.items() if name in times},
                "ms": {b: float(np.median(t[name]) * 1e3) for b, t in group.times.items() if name in t},
                "top1": asdict(group.accuracy[name]) if name in group.accuracy else None,
                "parity": group.parity.get(name),
            }
            for name, data in group.files.items()
        },
        "control": {b: asdict(group.speed(b, CONTROL)) for b in group.times},
        "rounds": {b: len(times[FLOAT]) for b, times in group.times.items()},
        "refused": group.refused,
        "bars": [{**asdict(bar), "verdict": bar.verdict} for bar in group.bars],
    }


if __name__ == "__main__":
    sys.exit(main())
