"""Measures a training step of a transformer with 22 million parameters, quantized and in float: time and memory.

    python benchmarks/transformer.py [--methods lsq] [--bits 2] [--rounds 8] [--json FILE]

The net has MiniLM's sizes and random weights; all its matrices and embeddings are quantized. A step of AdamW takes 8
sentences of 128 tokens, on one thread. Steps of the float net and of the methods take turns in one process; ratios of
CPU time are medians over rounds, and the control is a second float net. Memory is measured in a fresh process for each
net: the largest resident set during steps after the first, beyond what the imports take.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from _common import Bar, in_fresh_process, peak_resident, resident, restart_peak
from _training import interleaved, named, ratios, stepper
from _transformer import MINILM, Encoder
from torch import Tensor, nn

from qcompress.finetune.attach import prepare
from qcompress.plan.plan import Plan

FLOAT, CONTROL = "float", "control"
BATCH, TOKENS = 8, 128
MOST_TIME, MOST_MEMORY = 2.0, 1.5  # of a step, over the float net's


def main() -> int:
    """Run the benchmark; return 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["lsq"], help="keys of `quantizers.QUANTIZERS`")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    times = in_fresh_process(step_times, args.methods, args.bits, args.rounds)
    memory = {name: in_fresh_process(step_memory, name, args.bits) for name in (FLOAT, *args.methods)}
    slower = ratios(times, FLOAT)
    bars = []
    print(
        f"{FLOAT}: {median(times[FLOAT]):.2f} s CPU, {memory[FLOAT] / 2**20:.0f} MiB; {CONTROL}: {slower[CONTROL]:.3f}"
    )
    for name in args.methods:
        print(f"{name}, {args.bits} bits: {median(times[name]):.2f} s CPU, {memory[name] / 2**20:.0f} MiB")
        bars.append(Bar(f"{name}: time of a step over float", slower[name], MOST_TIME))
        bars.append(Bar(f"{name}: memory of a step over float", memory[name] / memory[FLOAT], MOST_MEMORY))
    print("\n".join(map(str, bars)))
    if args.json is not None:
        found = {"bits": args.bits, "cpu_s": times, "memory": memory, "slower": slower}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(bar.verdict == "FAIL" for bar in bars))


def step_times(methods: list[str], bits: int, rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each round's steps of the float net, of another one, and of the methods."""
    torch.set_num_threads(1)
    steps = {name: step_of(name, bits) for name in (FLOAT, CONTROL, *methods)}
    return interleaved(steps, [batch()], rounds)


def step_memory(name: str, bits: int) -> int:
    """Return the bytes that steps of a net need at their peak, with the net itself and the optimizer's state."""
    torch.set_num_threads(1)
    quantized(nn.Linear(2, 2), torch.zeros(1, 2), "lsq", bits)  # imports what preparing needs
    before = resident()
    step, (ids, labels) = step_of(name, bits), batch()
    step(ids, labels)
    restart_peak()
    for _ in range(2):
        step(ids, labels)
    return peak_resident() - before


def step_of(name: str, bits: int) -> Callable[[Tensor, Tensor], None]:
    """Return a training step of a new net: FLOAT, CONTROL, or quantized by a method of this name."""
    torch.manual_seed(0)
    net = Encoder(MINILM)
    return stepper((net if name in (FLOAT, CONTROL) else quantized(net, batch()[0], name, bits)).train())


def quantized(net: nn.Module, example: Tensor, method: str, bits: int) -> nn.Module:
    """Return a net whose weights have quantizers."""
    return prepare(net, Plan.from_flags(bits=bits), example_inputs=example, methods=named(method))


def batch() -> tuple[Tensor, Tensor]:
    """Return token ids and labels, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, MINILM.vocabulary, (BATCH, TOKENS), generator=generator)
    return ids, torch.randint(0, MINILM.classes, (BATCH,), generator=generator)


if __name__ == "__main__":
    sys.exit(main())
