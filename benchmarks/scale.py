"""Measures CPU time and memory of compression and export for a BERT-shaped model of 110 million parameters.

    python benchmarks/scale.py [--bits 4] [--json FILE]

The model is transformers' BertConfig (see requirements.txt) with random weights. Each step runs in a separate process;
memory is the growth of the largest resident set during the step. The comparison is with `torch.onnx.export`.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import resident

STEPS = ("compress", "export", "torch.onnx.export")
MOST_CPU_S = 120.0  # CPU seconds of compression
MOST_COMPRESS = 3.0  # memory of compression over the fp32 size
MOST_MORE = 1.0  # memory of the whole export beyond torch.onnx.export's, over the fp32 size


def main() -> int:
    """Run every step and print the figures with their limits; return 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(measure(args.step, args.bits)))
        return 0
    found = {step: in_process(step, args.bits) for step in STEPS}
    for step, row in found.items():
        size = row["peak"] / row["fp32"]
        print(f"{step:18} {row['cpu_s']:7.1f} s CPU {row['peak'] / 2**20:8.0f} MiB, {size:.2f} x fp32")
    fp32 = found["compress"]["fp32"]
    more = (found["export"]["peak"] - found["torch.onnx.export"]["peak"]) / fp32
    bars = (
        ("compress, CPU s", found["compress"]["cpu_s"], MOST_CPU_S),
        ("compress, memory x fp32", found["compress"]["peak"] / fp32, MOST_COMPRESS),
        ("export, memory above torch.onnx.export's x fp32", more, MOST_MORE),
    )
    for what, value, most in bars:
        print(f"{what}: {value:.2f}, at most {most:g}: {'pass' if value <= most else 'FAIL'}")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(value > most for _, value, most in bars))


def in_process(step: str, bits: int) -> dict[str, Any]:
    """Measure a step in a separate process."""
    command = [sys.executable, __file__, "--step", step, "--bits", str(bits)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(step: str, bits: int) -> dict[str, Any]:
    """Return the CPU seconds of a step and the bytes by which memory grew."""
    from transformers import BertConfig, BertModel

    import qcompress_exporters
    from qcompress.graph.options import ProgramOptions
    from qcompress.graph.tracing import from_module
    from qcompress.plan.plan import Plan
    from qcompress.posthoc.compress import compress, compress_program
    from qcompress.posthoc.settings import PosthocSettings

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = BertModel(BertConfig()).eval()
    fp32 = sum(p.numel() * 4 for p in model.parameters())
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 1000, (2, 16)))
    torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))  # imports modules before the measurement
    before, start = resident(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        if step == "torch.onnx.export":
            torch.onnx.export(model, (ids,), path, dynamo=True, verbose=False)
        elif step == "compress":
            compress(model, Plan.from_flags(bits=bits), example_inputs={"input_ids": ids}, effort="fast")
        else:  # like the command, which owns the model
            program = from_module(model, ProgramOptions(inputs={"input_ids": ids.numpy()}, shares=True))
            small = compress_program(program, Plan.from_flags(bits=bits), PosthocSettings(effort="fast"))
            qcompress_exporters.export(small, path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"cpu_s": time.process_time() - start, "peak": peak - before, "fp32": fp32}


if __name__ == "__main__":
    sys.exit(main())
