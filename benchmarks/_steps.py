"""Measures training steps of ResNet-20 against the float net's: kernels, waits for the device, and time."""

import copy
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from _common import Bar
from _kernels import REPORTED, counted
from _training import Row, Task, prepared, tensors
from torch import Tensor, nn
from torch.nn import functional

from qcompress.finetune.prepared import Prepared

BATCH: Final = 128
KERNELS: Final = {"LSQ W2": 1.5, "LSQ W2A2": 2.0, "N2UQ W2A2": 2.5}
CPU_TIME: Final = {"LSQ W2": 1.07, "LSQ+ W4A4": 1.5, "N2UQ W2A2": 1.8}
CUDA_TIME: Final = {"LSQ W2": 1.3, "LSQ W2A2": 1.6}


@dataclass(frozen=True)
class Steps:
    """What a step of one row takes.

    Args:
        kernels: over those of the float step.
        operators: over those of the float step.
        waits: how often the host waits for the device.
        time: over that of the float step; the median of pairs.
        compile_s: seconds of the first compiled step; None: nothing is compiled.
    """

    kernels: float
    operators: float
    waits: int
    time: float
    compile_s: float | None


def measure(task: Task, rows: Sequence[Row], device: str, *, compiles: bool, pairs: int) -> dict[str, Steps]:
    """Print and return what steps take, eager and compiled.

    Args:
        task: the net and its data.
        rows: the configurations.
        device: "cpu" or "cuda".
        compiles: whether to measure compiled steps, too.
        pairs: steps of both sides that are timed.
    """
    torch.set_num_threads(1)
    x, y = (tensor[:BATCH].to(device) for tensor in tensors(task.training))
    plain = stepper(copy.deepcopy(task.module).to(device).train(), x, y)
    floats = counted(plain, device)
    print(f"float: {floats.kernels} kernels, {floats.operators} operators; batch {BATCH}, {device}")
    print(f"{'':22}{'kernels':>9}{'operators':>11}{'waits':>7}{'time':>8}{'compiling':>11}", flush=True)
    found = {}
    for row, is_compiled in [(row, c) for row in rows for c in ([False, True] if compiles else [False])]:
        model, name = prepared(task, row)[0].to(device).train(), f"{row.name}{', compiled' if is_compiled else ''}"
        step, seconds, notes = stepper(model, x, y), None, model.notes
        if is_compiled:
            model.compile(**REPORTED)
            start = time.perf_counter()
            step()
            seconds = time.perf_counter() - start
        counts = counted(step, device)
        ratio = paired(plain, step, pairs, device)
        if model.notes != notes:
            print(f"{name}: {model.notes[-1]}")
        else:
            kernels, operators = counts.kernels / floats.kernels, counts.operators / floats.operators
            found[name] = Steps(kernels, operators, counts.waits, ratio, seconds)
            compiling = "" if seconds is None else f"{seconds:9.1f} s"
            print(f"{name:22}{kernels:9.2f}{operators:11.2f}{counts.waits:7}{ratio:8.3f}{compiling:>11}", flush=True)
        del model, step
        gc.collect()
    return found


def stepper(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Return a function that runs one step with AdamW in foreach form, the penalty of a prepared model included."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, foreach=True)

    def step() -> None:
        loss = functional.cross_entropy(model(x), y)
        if isinstance(model, Prepared):
            loss = loss + model.penalty()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def paired(a: Callable[[], None], b: Callable[[], None], pairs: int, device: str) -> float:
    """Return the time of b over that of a: CPU time, or the time until the device is done."""

    def seconds(step: Callable[[], None]) -> float:
        clock = time.process_time
        if device == "cuda":
            clock = time.perf_counter
            torch.cuda.synchronize()
        start = clock()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    found = []
    for i in range(pairs + 2):
        first, second = (a, b) if i % 2 else (b, a)
        one, two = seconds(first), seconds(second)
        found.append(two / one if i % 2 else one / two)
    return statistics.median(found[2:])


def bars(found: dict[str, Steps], device: str) -> list[Bar]:
    """Return the limits. Kernels count as compiled where that was measured; time counts eager on a CPU."""
    limits = []
    for name, most in KERNELS.items():
        for key in (f"{name}, compiled", name):
            if key in found:
                limits.append(Bar(f"kernels of a step, {key}, over float", found[key].kernels, most))
                break
    limits += [Bar(f"waits in a step, {name}", steps.waits, 0) for name, steps in found.items()]
    for name, most in (CUDA_TIME if device == "cuda" else CPU_TIME).items():
        keys = [key for key in (name, f"{name}, compiled") if key in found]
        if keys:
            limits.append(Bar(f"time of a step, {name}, over float", min(found[key].time for key in keys), most))
    return limits
