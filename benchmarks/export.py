"""Measures post-hoc palettes at every width on two real nets: bytes, accuracy, parity, operators, latency.

    python benchmarks/export.py --data DIR [--nets resnet20 mobilenet] [--bits 8 7 6 5 4 3 2 1] [--json FILE]

DIR holds the nets and images of `_nets.py`.

Accuracy is measured in onnxruntime on the exported file. Latency is the median CPU time on one thread at batch 1,
relative to the float file of the same graph, in interleaved rounds. The control compares the float file with itself.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnxruntime
from _nets import NETS, Net

from qcompress.data.dataset import Dataset
from qcompress.graph.program import FloatProgram
from qcompress.metrics.metric import load_metric
from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.settings import PosthocSettings
from qcompress_exporters import build, validate
from qcompress_exporters.onnx_format.file import float_file
from qcompress_exporters.onnx_format.trace import trace
from qcompress_exporters.parity.timing import latency

COLUMNS = ("bits", "ideal", "file", "over", "over/ideal", "ratio", "top1", "drop", "agree", "parity", "ops", "latency")


def main() -> None:
    """Run the benchmark on the selected nets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 7, 6, 5, 4, 3, 2, 1])
    parser.add_argument("--rounds", type=int, default=300, help="timed rounds; 0: no latency")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {name: measure(NETS[name], args) for name in args.nets}
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def measure(net: Net, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one net at all widths, print the rows as they come, and return them."""
    program, data = net.program(args.data), net.test_data(args.data)
    print(f"\n{net.weights}: onnxruntime {onnxruntime.__version__}, {data.samples} images", flush=True)
    print(" ".join(f"{c:>10}" for c in COLUMNS), flush=True)
    return [row(program, bits, data, args.rounds) for bits in args.bits]


def row(program: FloatProgram, bits: int, data: Dataset, rounds: int) -> dict[str, Any]:
    """Export at one width and measure the file."""
    start = time.process_time()
    small = compress_program(program, Plan.from_flags(bits=bits), PosthocSettings(effort="fast"))
    compress_s = time.process_time() - start
    built = build(small)
    size = built.report.size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"net.w{bits}.onnx"
        built.write(path)
        report = validate(program, path, data, metric=load_metric("top1"))
    assert report.metric is not None
    original = float_file(trace(small.program), small.program.state())
    example = next(data.batches(1)).inputs
    timing = latency(original, built.data, example, rounds=rounds) if rounds else None
    result = {
        "bits": bits,
        "ideal": size.ideal,
        "payload": size.payload,
        "file": size.file,
        "original": size.original,
        "opset": built.report.opset,
        "compress_cpu_s": compress_s,
        "top1": report.metric.compressed,
        "float_top1": report.metric.original,
        "drop": report.metric.drop,
        "interval": report.metric.interval,
        "agreement": report.agreement,
        "checks": [[c.name, c.session, c.ok, c.error] for c in report.checks],
        "same_ops": report.same_ops,
        "latency": asdict(timing) if timing else None,
    }
    texts = (
        str(bits), f"{size.ideal:,}", f"{size.file:,}", f"{size.overhead:,}", f"{size.file / size.ideal:.4f}",
        f"{size.ratio:.2f}", f"{report.metric.compressed:.2%}", f"{report.metric.drop:+.2%}",
        f"{report.agreement:.2%}", "ok" if report.ok else "FAIL", "same" if report.same_ops else "OTHER",
        f"{timing.ratio:.3f} (control {timing.control:.3f})" if timing else "-",
    )  # fmt: skip
    print(" ".join(f"{t:>10}" for t in texts), flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main())
