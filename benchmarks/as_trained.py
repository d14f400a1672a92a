"""Compares exported files with the trained nets that they were made from, evaluated in float64.

    python benchmarks/as_trained.py [--rows "LSQ+ W2A2" …] [--epochs N] [--seeds N] [--unsettled] [--json FILE]

The nets are the digits sample's, and a ResNet of three blocks on the same images; both have BatchNorm and sums. For
each row the table gives the share of activation codes in which the file, as deployed in onnxruntime, differs from the
trained net, the SQNR of the logits by sample (median, of the worst seed; mean; lowest), and how many biases of the file
are not those that the trained net computed with. Where codes differ, a value lies so close to the middle between two
codes that float32 rounds it to the other one; all values that follow from it may then differ. `--unsettled` trains
without `Prepared.settle`, for comparison.
"""

import argparse
import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from _common import Bar
from _nets import trained_digits
from _training import Row, Shuffled, Task, digits, named, tensors, tuned
from torch import nn

from qcompress.data.dataset import Dataset
from qcompress.finetune.prepared import Prepared
from qcompress_exporters import build
from qcompress_exporters.onnx_format.int8.stepped_biases import stepped
from qcompress_exporters.onnx_format.names import code_name
from qcompress_exporters.parity.differences import outputs_of

ROWS = (
    Row("LSQ+ W2A2", 2, 2, named("lsq", "lsq_plus")),
    Row("N2UQ W2A2", 2, 2, named("n2uq", "n2uq"), quantizer_rate=0.1),
    Row("DoReFa + PACT W2A2", 2, 2, named("dorefa", "pact")),
    Row("LSQ+ W4A4", 4, 4, named("lsq_plus", "lsq_plus")),
    Row("TQT W4A4", 4, 4, named("tqt", "tqt")),
)
BARRED = ("LSQ+ W2A2", "LSQ+ W4A4")
MOST_CODES, LEAST_DB = 1e-4, 60.0
NETS = ("digits", "resnet")
NO_NOISE = 200.0  # dB that stand for equal outputs


class Block(nn.Module):
    """Two convolutions with BatchNorm, and a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out))
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        self.shortcut = nn.Sequential()
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.second(self.first(x).relu()) + self.shortcut(x)).relu()


class SmallResNet(nn.Module):
    """Three residual blocks on images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1))
        self.head = nn.Linear(32, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(image)).mean((2, 3)))


def main() -> int:
    """Run the benchmark; return 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=NETS)
    parser.add_argument("--epochs", type=int, default=3, help="of training with quantizers")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row")
    parser.add_argument("--unsettled", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with trained_digits() as folder:
        task = replace(digits(folder), epochs=args.epochs)
    tasks = {"digits": task, "resnet": resnet(task)}
    found: dict[str, Any] = {}
    bars = []
    print(
        f"{'net':7} {'row':20} {'top-1':>7} {'codes off':>10} {'median dB':>10} {'mean':>7} {'lowest':>7} {'biases':>9}"
    )
    for name in args.nets:
        for row in [r for r in ROWS if r.name in (args.rows or [r.name for r in ROWS])]:
            options = {"settle": 0} if args.unsettled else {}
            models = (tuned(tasks[name], row, seed, **options)[0].eval() for seed in range(args.seeds))
            result = pooled([measured(model, task.test) for model in models])
            found[f"{name} {row.name}"] = result
            line = "{top1:7.2%} {codes_off:10.6%} {median_db:10.1f} {mean_db:7.1f} {lowest_db:7.1f}"
            print(f"{name:7} {row.name:20} {line.format(**result)} {result['biases_off']:>4} off", flush=True)
            if row.name in BARRED and not args.unsettled:
                label = f"{name} {row.name}"
                bars += [
                    Bar(f"{label}, share of codes off", result["codes_off"], MOST_CODES),
                    Bar(f"{label}, median dB", result["median_db"], LEAST_DB, at_least=True),
                    Bar(f"{label}, biases off", result["biases_off"], 0),
                ]
    print("\n" + "\n".join(map(str, bars)))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(bar.verdict == "FAIL" for bar in bars))


def resnet(task: Task) -> Task:
    """Return the task of another net, trained from random weights for six epochs."""
    torch.manual_seed(0)
    module = SmallResNet()
    optimizer, batches = torch.optim.AdamW(module.parameters(), lr=3e-3), Shuffled(task.training)
    for _ in range(6):
        for x, y in batches:
            loss = nn.functional.cross_entropy(module(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return replace(task, module=module)


def pooled(results: list[dict[str, float]]) -> dict[str, float]:
    """Return the means of the figures of several runs, their lowest SQNRs, and the sum of their wrong biases."""
    means = {key: float(np.mean([result[key] for result in results])) for key in results[0]}
    lowest = {key: min(result[key] for result in results) for key in ("median_db", "lowest_db")}
    return means | lowest | {"biases_off": sum(result["biases_off"] for result in results)}


def measured(model: Prepared, test: Dataset) -> dict[str, float]:
    """Return the figures of one row."""
    x, y = tensors(test)
    wanted, wanted_codes = in_float64(model, x)
    small = model.finalize()
    written = stepped(small).artifacts
    file = onnx.load_from_string(build(small).data)
    names = {output for node in file.graph.node for output in node.output}
    codes = {code_name(i): codes for i, codes in enumerate(wanted_codes) if code_name(i) in names}
    logits = file.graph.output[0].name
    file.graph.output.extend(onnx.ValueInfoProto(name=name) for name in codes)
    got = outputs_of(file.SerializeToString(), [{file.graph.input[0].name: x.numpy()}], "deployed")
    off = sum(int((got[name].ravel() != wanted_codes.ravel()).sum()) for name, wanted_codes in codes.items())
    noise, signal = np.square(got[logits] - wanted).sum(1), np.square(wanted).sum(1)
    db = 10 * np.log10(signal / np.maximum(noise, signal * 10 ** (-NO_NOISE / 10)))
    trained = {n: a.dequantize() for n, a in small.artifacts.items() if n.endswith("bias")}
    same = (np.array_equal(written[n].dequantize(), value) for n, value in trained.items())
    return {
        "top1": float((got[logits].argmax(1) == y.numpy()).mean()),
        "codes_off": off / sum(c.size for c in codes.values()),
        "median_db": float(np.median(db)),
        "mean_db": float(db.mean()),
        "lowest_db": float(db.min()),
        "biases_off": sum(not equal for equal in same),
    }


def in_float64(model: Prepared, x: torch.Tensor) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the logits and the codes at all sites of a trained net that computes in float64."""
    model, codes = copy.deepcopy(model).double().eval(), []
    grids = [q.activation_grid(s.key) for q, s in zip(model.activations, model.parts.sites, strict=True)]
    seen: dict[int, np.ndarray] = {}
    for i, quantizer in enumerate(model.activations):
        quantizer.register_forward_hook(lambda _, __, out, i=i: seen.__setitem__(i, out.detach().numpy()))
    with torch.no_grad():
        logits = model(x.double()).numpy()
    for i, grid in enumerate(grids):
        codes.append(np.rint((seen[i] - float(grid.free_offset)) / float(grid.scale)) + grid.stored_zero_point)
    return logits, codes


if __name__ == "__main__":
    sys.exit(main())
