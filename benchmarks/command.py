"""Compares the CPU time of `qcompress export` with compression only and with `torch.onnx.export` of the same net.

    python benchmarks/command.py --data DIR [--nets resnet20 mobilenet] [--bits 4] [--rounds 3] [--json FILE]

DIR holds the nets of `_nets.py`. Each run is a separate process with one thread, and its imports count. Rounds are
interleaved and medians compared. Compression only is measured inside its process, without imports.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _common import Bar, quiet
from _nets import NETS

MOST_MORE = 1.3  # CPU time beyond compression, as a multiple of torch.onnx.export's
STEPS = ("compress", "torch.onnx.export", "command")


def main() -> int:
    """Run the benchmark; return 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step", choices=("compress", "torch.onnx.export"), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if args.step:
        print(alone(args.step, args.nets[0], args.data, args.bits))
        return 0
    found, bars = {}, []
    for name in args.nets:
        rounds = [{step: cpu_s(step, name, args) for step in STEPS} for _ in range(args.rounds)]
        row = found[name] = {step: statistics.median(r[step] for r in rounds) for step in STEPS}
        print(f"{name}: " + ", ".join(f"{step} {seconds:.1f} s CPU" for step, seconds in row.items()), flush=True)
        more = statistics.median((r["command"] - r["compress"]) / r["torch.onnx.export"] for r in rounds)
        bars.append(Bar(f"{name}: (command - compress) / torch.onnx.export", more, MOST_MORE))
    print("\n".join(map(str, bars)))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(bar.verdict == "FAIL" for bar in bars))


def cpu_s(step: str, name: str, args: argparse.Namespace) -> float:
    """Return the CPU seconds of one step in a separate process."""
    net = NETS[name]
    if step == "command":
        with tempfile.TemporaryDirectory() as folder:
            command = [
                "qcompress", "export", f"{args.data}/{net.weights}", "--arch", f"{args.data}/{net.arch}",
                "--input-shape", ",".join(map(str, net.shape)), "--bits", str(args.bits), "--effort", "fast",
                "-o", f"{folder}/small.onnx",
            ]  # fmt: skip
            return of_children(lambda: subprocess.run(command, check=True, capture_output=True))
    command = [sys.executable, __file__, "--data", str(args.data), "--nets", name, "--bits", str(args.bits)]
    outputs = list[str]()

    def run() -> None:
        done = subprocess.run([*command, "--step", step], check=True, capture_output=True, text=True)
        outputs.append(done.stdout)

    whole = of_children(run)
    return float(outputs[0].splitlines()[-1]) if step == "compress" else whole


def of_children(run: Callable[[], object]) -> float:
    """Return the CPU seconds of the processes that a function starts and waits for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def alone(step: str, name: str, folder: Path, bits: int) -> float:
    """Return the CPU seconds of one step in this process, without imports."""
    net = NETS[name]
    if step == "torch.onnx.export":
        import torch

        module, start = net.module(folder), time.process_time()
        with tempfile.TemporaryDirectory() as written, quiet():
            torch.onnx.export(module, (torch.zeros(net.shape),), f"{written}/net.onnx", dynamo=True, verbose=False)
        return time.process_time() - start
    from qcompress.plan.plan import Plan
    from qcompress.posthoc.compress import compress_program
    from qcompress.posthoc.settings import PosthocSettings

    program, start = net.program(folder), time.process_time()
    compress_program(program, Plan.from_flags(bits=bits), PosthocSettings(effort="fast"))
    return time.process_time() - start


if __name__ == "__main__":
    sys.exit(main())
