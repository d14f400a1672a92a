"""Trains MobileNetV1 0.75 at 3 bits for minutes on 128 images without labels, and compares it with `export`.

    python benchmarks/few_images.py --data DIR [--bits 3] [--max-time 10m] [--options "…"] [--json FILE]

DIR holds the net and images of `_nets.py`. All sides see the same 128 images: `export --effort best` compresses without
training, to palettes and to even grids; `finetune --max-time` trains LSQ's even grids from the float net, and from what
`export` left ("from post-hoc codes", at half the rate: they need less). Each file runs in onnxruntime on 250 other
images, and is compared with the float net: the divergence of its outputs, in nats, and top-1. The time of a side is
that of its commands, on one thread.
"""

import argparse
import json
import resource
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from _common import Bar
from _nets import NETS
from _training import logits
from finetune import run

NET, IMAGES = NETS["mobilenet"], 128


def main() -> int:
    """Run the benchmark; return 1 if training is no nearer to the float net."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--max-time", default="10m")
    parser.add_argument("--options", default="--batchnorm freeze --batch-size 16 --rate 2e-4 --epochs 100")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, file, seconds in files(args, Path(folder)):
            found[name] = measured(file, args.data) | {"bytes": len(file), "cpu_s": seconds}
            line = found[name]
            print(
                f"{name:28} KL {line['kl']:.4f}, top-1 {line['top1']:.1%}, {len(file):,} B, {seconds / 60:.1f} CPU min",
                flush=True,
            )
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    trained = min(line["kl"] for name, line in found.items() if name.startswith("finetune"))
    bar = Bar("KL of the better training", trained, found["export --effort best"]["kl"])
    print(bar)
    return int(bar.verdict == "FAIL")


def files(args: argparse.Namespace, work: Path) -> Iterator[tuple[str, bytes, float]]:
    """Yield the name, the file and the CPU seconds of each side."""
    module = f"{args.data}/{NET.arch.partition(':')[0]}"
    arch = ["--arch", f"{args.data}/{NET.arch}", "--transform", f"{module}:{NET.transform}"]
    images, data = work / "few.npz", args.data / NET.calibration.partition(":")[0]
    np.savez(images, x=np.load(data)["x"][:IMAGES])
    for name, scheme in (("export --effort best", "palette"), ("the same, even grids", "uniform")):
        file = work / f"{scheme}.onnx"
        words = ["export", str(args.data / NET.weights), *arch, "--bits", str(args.bits), "--scheme", scheme]
        words += ["--calibration", str(images), "--effort", "best", "--save-compressed", str(work / scheme)]
        words += ["-o", str(file)]
        yield name, *timed(words, file)
    for name, model, own in (
        ("finetune", str(args.data / NET.weights), [*arch, "--bits", str(args.bits)]),
        ("finetune, from post-hoc codes", str(work / "uniform"), [*arch[2:], "--rate", "1e-4"]),
    ):
        folder, file = work / name.replace(" ", "-"), work / f"{name}.onnx"
        words = ["finetune", model, *shlex.split(args.options), *own, "--method", "lsq", "--data", str(images)]
        _, seconds = timed([*words, "--max-time", args.max_time, "--quiet", "-o", str(folder)], None)
        made, more = timed(["export", str(folder), "-o", str(file)], file)
        yield name, made, seconds + more


def timed(words: list[str], file: Path | None) -> tuple[bytes, float]:
    """Run one of our commands; return the file that it wrote, and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(["qcompress", *words])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return file.read_bytes() if file else b"", after.ru_utime - before.ru_utime


def measured(file: bytes, folder: Path) -> dict[str, float]:
    """Return the divergence from the float net, and top-1."""
    test = NET.test_data(folder)
    run_float = NET.program(folder).runner()
    wanted = np.concatenate([next(iter(run_float(batch.inputs).values())) for batch in test.batches(50)])
    theirs, mine = log_softmax(wanted), log_softmax(logits(file, test))
    kl = (np.exp(theirs) * (theirs - mine)).sum(1).mean()
    return {"kl": float(kl), "top1": float((mine.argmax(1) == test.labels).mean())}


def log_softmax(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the logarithm of softmax over the last axis."""
    x = x.astype(np.float64)
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


if __name__ == "__main__":
    sys.exit(main())
