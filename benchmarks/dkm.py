"""Compares a step of DKM on one weight with coremltools, textbook torch and rounding: time and memory; and in training.

    python benchmarks/dkm.py [--sections time memory training] [--data DIR] [--quick] [--json FILE]

A step is forward and backward, with three iterations. Weights are drawn from N(0, 0.05²), with outliers one in a
thousand is multiplied by 8. τ is that of our quantizer at the start, in the middle and at the end of its schedule;
centroids are k-means', moved to their soft fixed point, the same for all tools. "qcompress" chooses the form before the
step, as training does; 'form="auto"' in every step.

Time is the median CPU time on one thread over rounds in which the tools take turns; slow tools run once. Memory is the
largest resident set of a step in a fresh process, after a first step, beyond what the process has then, and without the
weight's gradient and the soft weights. coremltools and textbook torch run where they are expected to need 6 GB and 60 s
at most.

A section's results replace those that FILE has of it. The section `training` needs the nets and images of `_nets.py` in
DIR. It times steps of ResNet-20 with DKM and LSQ at 2 bits in turns with float steps, and counts their operators, as a
GPU would get them: all weights of DKM in one piece, and nothing left out for which it would have to be waited.
"""

import argparse
import copy
import ctypes
import itertools
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import Bar, in_fresh_process, peak_resident, quiet, resident, restart_peak
from _dkm_tools import AUTO, COREML, HARD, LSQ, OURS, PLACES, TOOLS, TORCH, Case, Problem, Step, settled
from _training import Row, Shuffled, interleaved, named, prepared, ratios, stepper
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import resnet20

from qcompress.quantizers import Dkm, choose_form
from qcompress.quantizers.soft_kmeans import table, tabulated
from qcompress.quantizers.soft_kmeans.table import Table

SECTIONS = ("time", "memory", "training")
MOST_BYTES, MOST_SECONDS = 6e9, 60.0
ROUNDS = 7
ROUNDS_S = 6.0  # fewer rounds of a tool that would take longer for all of them, but one at least
FLOAT, CONTROL = "float", "control"


@dataclass(frozen=True)
class Found:
    """What a tool needs for a step of a case.

    Args:
        case: the case.
        tool: key of TOOLS.
        form: for ours, the form that was taken.
        cpu_s: CPU seconds of each round; None: not measured.
        memory: bytes; None: not measured.
        expected: bytes that a tool would need that did not run.
    """

    case: Case
    tool: str
    form: str = ""
    cpu_s: list[float] | None = None
    memory: int | None = None
    expected: float | None = None

    @property
    def seconds(self) -> float:
        """Return the median CPU time."""
        return statistics.median(self.cpu_s or [])

    @property
    def text(self) -> str:
        """Return the figure, or the reason why it was not measured."""
        if self.expected is not None:
            return f"not run (expected {self.expected / 1e9:.1f} GB)"
        return f"{1e3 * self.seconds:.1f} ms" if self.memory is None else f"{self.memory / 1e6:.1f} MB"


@dataclass
class Results:
    """All figures, and limits."""

    found: list[Found] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)

    def hold(self, what: str, value: float, limit: float, *, at_least: bool = False) -> None:
        """Add a limit and print it."""
        self.bars.append(Bar(what, value, limit, at_least))
        print(f"  {self.bars[-1]}", flush=True)


def main() -> int:
    """Run the benchmark; return 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if "training" in args.sections and args.data is None:
        parser.error("the section training needs --data")
    torch.set_num_threads(1)
    absent = [] if has_coreml() else [COREML]
    sections = {"time": times, "memory": memory, "training": partial(training, folder=args.data)}
    known = json.loads(args.json.read_text()) if args.json is not None and args.json.exists() else {}
    missed = 0
    for name in args.sections:
        results = Results(absent=absent)
        print(f"{name}: load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
        sections[name](results, quick=args.quick)
        missed += sum(bar.verdict == "FAIL" for bar in results.bars)
        known[name] = as_dict(results)
        if args.json is not None:
            args.json.write_text(json.dumps(known, indent=1) + "\n")
    print(f"load {os.getloadavg()[0]:.1f}; {missed} limits missed")
    return int(missed > 0)


def has_coreml() -> bool:
    """Return whether coremltools can be imported."""
    with quiet():
        try:
            import coremltools.optimize.torch.palettization  # noqa: F401
        except ImportError:
            return False
    return True


def everywhere(count: int, centroids: int, dim: int = 1) -> list[Case]:
    """Return the cases at all places of the schedule, with and without outliers."""
    return [Case(count, centroids, dim, place, outliers) for outliers in (False, True) for place in PLACES]


def times(results: Results, quick: bool) -> None:
    """Measure the time of steps."""
    peers = (COREML, TORCH, HARD, LSQ)
    for case in everywhere(10**6, 16):
        faster(results, measured(results, case, peers), 80)
        hard = {row.tool: row for row in results.found if row.case == case}
        results.hold(f"{case}: time over {HARD}", hard[OURS].seconds / hard[HARD].seconds, 1.5)
    for case in everywhere(10**6, 4)[2 if quick else 1 :]:
        faster(results, measured(results, case, peers), 25)
    if quick:
        return
    for case in everywhere(4 * 10**6, 16)[1::2]:
        faster(results, measured(results, case, peers), 100)
    faster(results, measured(results, Case(10**6, 256, 4), (COREML, TORCH)), 5)
    for centroids, dim in ((4, 2), (16, 2), (16, 4)):
        measured(results, Case(10**6, centroids, dim), (COREML, TORCH))
    for count, centroids in itertools.product((10**5, 10**6, 4 * 10**6, 16 * 10**6), (2, 4, 16, 64, 256)):
        case = Case(count, centroids)
        takes_minutes = count > 10**6 and centroids > 16  # with outliers, which then need the exact form
        if not takes_minutes and not any(row.case == case for row in results.found):
            measured(results, case, peers)


def memory(results: Results, quick: bool) -> None:
    """Measure the memory of steps."""
    cases = [Case(10**6, 16, place=place) for place in PLACES]
    if not quick:
        cases += [Case(10**6, 256, 4), Case(10**6, 256), Case(4 * 10**6, 16), Case(16 * 10**6, 16)]
    for case in cases:
        rows = weighed(results, case, (COREML, TORCH) if case.place == "middle" else (COREML,))
        if COREML in rows and case.count == 10**6 and (case.centroids, case.dim) in ((16, 1), (256, 4)):
            limit = 60 if case.dim == 1 else 200
            value = (rows[COREML].memory or 0) / max(1, rows[OURS].memory or 0)
            results.hold(f"{case}: times less memory than {COREML}", value, limit, at_least=True)


def faster(results: Results, rows: dict[str, Found], limit: float) -> None:
    """Add lower limits for coremltools' time over ours."""
    if COREML in rows and rows[COREML].cpu_s:
        case = rows[OURS].case
        value = rows[COREML].seconds / rows[OURS].seconds
        results.hold(f"{case}: times faster than {COREML}", value, limit, at_least=True)


def measured(results: Results, case: Case, peers: Sequence[str]) -> dict[str, Found]:
    """Time our step and others in turns, and print the row."""
    problem = Problem.of(case, *settled(case))
    form = choose_form(problem.weight.detach(), problem.centroids, problem.tau)
    steps: dict[str, Step] = {}
    rows: dict[str, Found] = {}
    for name in (OURS, AUTO, *peers):
        if name in results.absent or (name == LSQ and case.centroids == 2):  # LSQ has no single bit
            continue
        if not affordable(name, case):
            rows[name] = Found(case, name, expected=TOOLS[name].expected_bytes(case))
            continue
        steps[name] = TOOLS[name].make(problem)
    first = {name: timed(step) for name, step in steps.items()}
    cpu_s: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(ROUNDS):
        for name in steps if i % 2 else reversed(steps):
            if (i + 1) * first[name] <= ROUNDS_S:
                cpu_s[name].append(timed(steps[name]))
    taken = f"table of {form.edges.shape[1]} edges" if isinstance(form, Table) else f"{form.kind}, {form.dtype}"
    for name in steps:
        rows[name] = Found(case, name, taken if name in (OURS, AUTO) else "", cpu_s[name] or [first[name]])
    report(results, case, taken, rows)
    return rows


def timed(step: Step) -> float:
    """Return the CPU seconds of a step."""
    start = time.process_time()
    step()
    return time.process_time() - start


def weighed(results: Results, case: Case, peers: Iterable[str]) -> dict[str, Found]:
    """Measure the memory of our step and of others, each in a fresh process, and print the row."""
    centroids, tau = settled(case)
    rows: dict[str, Found] = {}
    for name in (OURS, AUTO, *peers):
        if name in results.absent:
            continue
        if affordable(name, case):
            rows[name] = Found(case, name, memory=in_fresh_process(memory_of_step, name, case, centroids.tolist(), tau))
        else:
            rows[name] = Found(case, name, expected=TOOLS[name].expected_bytes(case))
    report(results, case, "memory", rows)
    return rows


def report(results: Results, case: Case, taken: str, rows: dict[str, Found]) -> None:
    """Keep rows and print them in one line."""
    results.found += rows.values()
    print(f"{case} ({taken}): " + ", ".join(f"{name} {row.text}" for name, row in rows.items()), flush=True)


def affordable(tool: str, case: Case) -> bool:
    """Return whether a tool is expected to stay within the limits of a case."""
    tool_ = TOOLS[tool]
    return tool_.expected_bytes(case) <= MOST_BYTES and tool_.expected_seconds(case) <= MOST_SECONDS


def memory_of_step(name: str, case: Case, centroids: list[Any], tau: float) -> int:
    """Return the bytes of a step beside the weight, its gradient and the soft weights."""
    torch.set_num_threads(1)
    problem = Problem.of(case, torch.tensor(centroids), tau)
    step = TOOLS[name].make(problem)
    step()
    problem.weight.grad = None
    ctypes.CDLL(None).malloc_trim(0)
    before = resident()
    restart_peak()
    soft = step()
    assert problem.weight.grad is not None
    return peak_resident() - before - problem.weight.grad.nbytes - soft.nbytes


def training(results: Results, quick: bool, folder: Path) -> None:
    """Measure training steps of ResNet-20."""
    slower = in_fresh_process(step_times, folder, 15 if quick else 40)
    counts = in_fresh_process(step_operators, folder)
    results.training = {"slower": slower, "operators": counts}
    print("ResNet-20, step over float: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in slower.items()))
    results.hold("ResNet-20, DKM at 2 bits: time of a step over float", slower["DKM"], 1.3)
    for name, found in counts.items():
        print(f"{name}: {found['operators']} operators, {found['waits']} of which wait for the device")
    more = counts["DKM"]["operators"] / counts[FLOAT]["operators"]
    results.hold("ResNet-20, DKM at 2 bits: operators of a step over float", more, 2)
    results.hold("ResNet-20, DKM at 2 bits: waits for the device", counts["DKM"]["waits"] - counts[FLOAT]["waits"], 0)


def sides(folder: Path) -> tuple[dict[str, nn.Module], list[tuple[Tensor, Tensor]]]:
    """Return ResNet-20 in float, with DKM and with LSQ, in training mode, and batches of 128 images."""
    task = resnet20(folder, 1)
    nets: dict[str, nn.Module] = {FLOAT: copy.deepcopy(task.module), CONTROL: copy.deepcopy(task.module)}
    for name in ("DKM", "LSQ"):
        nets[name] = prepared(task, Row(name, 2, None, named(name.lower())))[0]
    some = [*itertools.islice(Shuffled(task.training), 8)]
    pairs = [zip(*some[i : i + 2], strict=True) for i in range(0, len(some), 2)]
    batches = [tuple(torch.cat(tensors)[:128] for tensors in pair) for pair in pairs]
    return {name: net.train() for name, net in nets.items()}, batches


def step_times(folder: Path, rounds: int) -> dict[str, float]:
    """Return the CPU time of steps over the float net's; "DKM, with choices" sets τ and the form as training does."""
    torch.set_num_threads(1)
    nets, batches = sides(folder)
    steps = {name: stepper(net) for name, net in nets.items()}
    found = interleaved(steps, batches, rounds)
    slower = ratios(found, FLOAT)
    choosing, every = [], Dkm(bits=2).every
    for i in range(4):
        for j in range(every):
            nets["DKM"].step(i / 4)
            start = time.process_time()
            steps["DKM"](*batches[j % len(batches)])
            choosing.append(time.process_time() - start)
    slower["DKM, with choices"] = statistics.mean(choosing) / statistics.median(found[FLOAT])
    return slower


class _Operators(TorchDispatchMode):
    """Counts operators that compute, and those that wait for the device."""

    WAITING = frozenset({"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_dim"})
    FREE = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"})

    def __init__(self) -> None:
        super().__init__()
        self.computing: Counter[str] = Counter()
        self.waiting: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in self.WAITING:
            self.waiting[name] += 1
        elif not func.is_view and name not in self.FREE:
            self.computing[name] += 1
        return func(*args, **(kwargs or {}))


def step_operators(folder: Path) -> dict[str, dict[str, int]]:
    """Return how many operators a step of each net has, with the optimizer's for all parameters at once."""
    torch.set_num_threads(1)
    table.is_queued = tabulated.is_queued = lambda _: True
    nets, batches = sides(folder)
    counts = {}
    for name, net in nets.items():
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, foreach=True)
        for _ in range(3):
            with _Operators() as operators:
                loss = nn.functional.cross_entropy(net(batches[0][0]), batches[0][1])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        counts[name] = {"operators": operators.computing.total(), "waits": operators.waiting.total()}
    return counts


def as_dict(results: Results) -> dict[str, Any]:
    """Return the results as JSON."""
    return {
        "found": [asdict(row) for row in results.found],
        "bars": [{**asdict(bar), "verdict": bar.verdict} for bar in results.bars],
        "training": results.training,
        "absent": results.absent,
        "load": os.getloadavg()[0],
    }


if __name__ == "__main__":
    sys.exit(main())
