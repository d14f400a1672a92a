"""Compares `qcompress finetune` with a plain training loop that takes the same steps: CPU time of a step, and memory.

    python benchmarks/overhead.py --data DIR [--images 2000] [--rounds 2] [--json FILE]

ResNet-20 with LSQ at 2 bits, distilled, images mirrored and shifted. The plain loop is what a user of the library
writes: `prepare`, a shuffled tensor, AdamW, the distance from the float net. Each run is a fresh process with one
thread. The time of a step is that of a run of three epochs minus that of a run of one, so that imports, tracing and the
first checkpoint do not count, but the end of epochs does. Rounds are interleaved; medians are compared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from _common import Bar
from _nets import NETS
from _training import Row, Shuffled, named, prepared
from finetune import QCOMPRESS
from training import resnet20

from qcompress.data.augment import Share, parse_augment
from qcompress.finetune.losses import distillation

EPOCHS, BATCH, AUGMENT = (1, 3), 64, "flip,crop:2"
MOST_TIME, MOST_MEMORY = 1.05, 1.1
SIDES = ("command", "loop")


def main() -> int:
    """Run the benchmark; return 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--epochs", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.epochs:
        loop(args.data, args.images, args.epochs)
        return 0
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    memory: dict[str, list[int]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as work:
        for i in range(args.rounds):
            for side in SIDES if i % 2 else reversed(SIDES):
                short, long = (run(side, args, epochs, Path(work)) for epochs in EPOCHS)
                seconds[side].append((long[0] - short[0]) / ((EPOCHS[1] - EPOCHS[0]) * (args.images // BATCH)))
                memory[side].append(long[1])
                print(f"{side}: {1000 * seconds[side][-1]:.0f} ms a step, {memory[side][-1] / 1e6:.0f} MB", flush=True)
    time, peak = (statistics.median(found["command"]) / statistics.median(found["loop"]) for found in (seconds, memory))
    bars = [Bar("CPU time of a step, command over loop", time, MOST_TIME), Bar("peak memory", peak, MOST_MEMORY)]
    print(*bars, sep="\n")
    if args.json is not None:
        args.json.write_text(json.dumps({"time": time, "memory": peak}, indent=1) + "\n")
    return int(any(bar.verdict == "FAIL" for bar in bars))


def run(side: str, args: argparse.Namespace, epochs: int, work: Path) -> tuple[float, int]:
    """Return the CPU seconds and the largest resident memory in bytes of one process."""
    net, images = NETS["resnet20"], work / "images.npz"
    if not images.exists():
        np.savez(images, x=np.load(args.data / "cifar10jpeg_small.npz")["train_x"][: args.images])
    module = f"{args.data}/{net.arch.partition(':')[0]}"
    folder = work / f"{side}-{epochs}-{len(list(work.iterdir()))}"
    words = {
        "command": [
            str(QCOMPRESS), "finetune", str(args.data / net.weights), "--arch", f"{args.data}/{net.arch}", "--data",
            str(images), "--transform", f"{module}:{net.transform}", "--augment", AUGMENT, "--bits", "2", "--epochs",
            str(epochs), "--batch-size", str(BATCH), "--quiet", "-o", str(folder),
        ],
        "loop": [sys.executable, __file__, "--data", str(args.data), "--images", str(args.images), "--epochs",
                 str(epochs)],
    }[side]  # fmt: skip
    process = subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{words} failed")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def loop(folder: Path, images: int, epochs: int) -> None:
    """Train as a user of the library would."""
    task = resnet20(folder, epochs)
    task = replace(task, training=task.training.head(images))
    model, _ = prepared(task, Row("LSQ W2", 2, None, named()))
    batches, augment, teacher = Shuffled(task.training, size=BATCH), parse_augment(AUGMENT), task.teacher
    assert teacher is not None
    own = {id(parameter) for parameter in model.quantizer_parameters()}
    groups = [
        {"params": [p for p in model.parameters() if (id(p) in own) is chosen], "weight_decay": 0.0}
        for chosen in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    model.train()
    for epoch in range(epochs):
        for step, (x, _) in enumerate(batches):
            x = augment({"x": x}, Share(len(x), 0, len(x)), (0, epoch, step))["x"]
            with torch.no_grad():
                wanted = teacher(x)
            optimizer.zero_grad()
            distillation(model(x), wanted).backward()
            optimizer.step()
            schedule.step()
    model.finalize()


if __name__ == "__main__":
    sys.exit(main())
