"""Post-hoc palettes at every width on two real nets: bytes, accuracy, parity, operators, latency.

    python benchmarks/export.py --data DIR [--nets resnet20 mobilenet] [--bits 8 7 6 5 4 3 2 1] [--json FILE]

DIR holds the nets and images (`resnet_cifar.py`, `resnet20_cifar10jpeg_ft.safetensors`, `cifar10jpeg_small.npz`,
`mobilenet_v1.py`, `mobilenet_v1_075_imagenet.safetensors`, `imagenet1k_sample_part1.npz`).

Accuracy is measured through onnxruntime on the exported file. Latency: one thread, batch 1, medians of CPU time over
interleaved runs (A B B A) against the float file of the same graph, beside a float-against-float control.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from qcompress.data import load_data
from qcompress.metrics import load_metric
from qcompress.plan import Plan
from qcompress.posthoc.compress import compress_program
from qcompress.program import FloatProgram
from qcompress.sources import ProgramOptions, SourceOptions, load_source
from qcompress_exporters import build, validate
from qcompress_exporters.onnx_file import float_file
from qcompress_exporters.trace import trace


@dataclass(frozen=True)
class Net:
    """A net of the benchmark: its weights, its architecture, its test images."""

    weights: str
    arch: str
    images: str
    shape: tuple[int, ...]


NETS = {
    "resnet20": Net(
        "resnet20_cifar10jpeg_ft.safetensors",
        "resnet_cifar.py:ResNetCifar",
        "cifar10jpeg_small.npz:test_x,test_y",
        (1, 3, 32, 32),
    ),
    "mobilenet": Net(
        "mobilenet_v1_075_imagenet.safetensors",
        "mobilenet_v1.py:MobileNetV1",
        "imagenet1k_sample_part1.npz:x,y",
        (1, 3, 224, 224),
    ),
}
COLUMNS = ("bits", "ideal", "file", "over", "over/ideal", "ratio", "top1", "drop", "agree", "parity", "ops", "latency")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 7, 6, 5, 4, 3, 2, 1])
    parser.add_argument("--pairs", type=int, default=300, help="timed A B B A rounds; 0: no latency")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {name: measure(NETS[name], args) for name in args.nets}
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def measure(net: Net, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All widths of one net, a row each, printed as they come."""
    source = load_source(args.data / net.weights, options=SourceOptions(arch=f"{args.data}/{net.arch}"))
    example = {"x": np.random.default_rng(0).standard_normal(net.shape).astype(np.float32)}
    program = source.program(ProgramOptions(inputs=example))
    module = net.arch.partition(":")[0]
    data = load_data(f"{args.data}/{net.images}", transform=f"{args.data}/{module}:preprocess")
    print(f"\n{net.weights}: onnxruntime {onnxruntime.__version__}, {data.samples} images", flush=True)
    print(" ".join(f"{c:>10}" for c in COLUMNS), flush=True)
    return [row(program, bits, data, example, args.pairs) for bits in args.bits]


def row(program: FloatProgram, bits: int, data: Any, example: dict[str, Any], pairs: int) -> dict[str, Any]:
    """Export at one width and measure the file."""
    start = time.process_time()
    small = compress_program(program, Plan.from_flags(bits=bits))
    compress_s = time.process_time() - start
    built = build(small)
    size = built.report.size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"net.w{bits}.onnx"
        built.write(path)
        report = validate(program, path, data, metric=load_metric("top1"))
    assert report.metric is not None
    original = float_file(trace(small.program), small.program.state())
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
        "latency": latency(original, built.data, example, pairs) if pairs else None,
    }
    timing = result["latency"]
    texts = (
        str(bits), f"{size.ideal:,}", f"{size.file:,}", f"{size.overhead:,}", f"{size.file / size.ideal:.4f}",
        f"{size.ratio:.2f}", f"{report.metric.compressed:.2%}", f"{report.metric.drop:+.2%}",
        f"{report.agreement:.2%}", "ok" if report.ok else "FAIL", "same" if report.same_ops else "OTHER",
        f"{timing['ratio']:.3f} (control {timing['control']:.3f})" if timing else "-",
    )  # fmt: skip
    print(" ".join(f"{t:>10}" for t in texts), flush=True)
    return result


def latency(original: bytes, ours: bytes, example: dict[str, Any], pairs: int) -> dict[str, float]:
    """Float time over our time, and float over float, as medians of paired CPU times."""
    sessions = []
    for data in (original, ours, original):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        sessions.append(onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]))

    def cpu(active: Any) -> float:
        start = time.thread_time()
        active.run(None, example)
        return time.thread_time() - start

    for active in sessions:
        for _ in range(10):
            active.run(None, example)
    a, b, c = sessions
    ratios, controls = [], []
    for _ in range(pairs):
        first, ours_1, ours_2, second = cpu(a), cpu(b), cpu(b), cpu(a)
        ratios.append((first + second) / (ours_1 + ours_2))
        first, control_1, control_2, second = cpu(a), cpu(c), cpu(c), cpu(a)
        controls.append((first + second) / (control_1 + control_2))
    return {"ratio": statistics.median(ratios), "control": statistics.median(controls), "pairs": pairs}


if __name__ == "__main__":
    sys.exit(main())
