"""Compares k-means for palettes with coremltools, kmeans1d and scikit-learn: time, error and memory, with limits.

    python benchmarks/kmeans.py [--quick] [--json FILE]

Weights are drawn from N(0, 0.05^2), and one in a thousand is multiplied by 8. Time is the median CPU time on one thread
over rounds in which all tools of a case take turns; slow tools run once. Error is the mean squared error per weight.
The other tools are listed in requirements.txt; those that are not installed are skipped. `--quick` skips the cases that
take minutes.
"""

import argparse
import contextlib
import importlib
import json
import time
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from _common import Bar, quiet

from qcompress.palettes.scalar import palettize
from qcompress.palettes.vector import palettize_vectors

Floats = npt.NDArray[np.float32]
Decode = Callable[[], npt.NDArray[Any]]  # returns the weights that a palette encodes
Tool = Callable[[Floats], Decode]

OURS, COREML, EXACT = "qcompress", "coremltools", "kmeans1d"
KMEANS, MINIBATCH = "KMeans", "MiniBatchKMeans"
MODULES = {COREML: "coremltools", EXACT: "kmeans1d", KMEANS: "sklearn.cluster", MINIBATCH: "sklearn.cluster"}
ROUNDS = 5
SLOW_S = 4.0  # a tool that takes longer runs for one round only
BUFFERS = 3 * 4 * (1 << 18)  # bytes of three buffers of 256k float32
BERT = [(30522, 768), (512, 768), (2, 768), *([(768, 768)] * 4 + [(3072, 768), (768, 3072)]) * 12, (768, 768)]


@dataclass(frozen=True)
class Row:
    """The result of a tool on a case.

    Args:
        case: name of the case.
        tool: name of the tool.
        cpu_s: CPU seconds of each round.
        mse: mean squared error per weight; the median if each round has a different seed.
    """

    case: str
    tool: str
    cpu_s: list[float]
    mse: float

    @property
    def seconds(self) -> float:
        """Return the median CPU time."""
        return float(np.median(self.cpu_s))


@dataclass
class Results:
    """Rows, limits, and the tools that are not installed."""

    rows: list[Row] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def measure(self, case: str, weight: Floats, tools: Mapping[str, Callable[[int], Tool]]) -> None:
        """Time tools in turns, each round with the next seed, and print their rows."""
        present = {name: tool for name, tool in tools.items() if self.has(name)}
        seconds: dict[str, list[float]] = {name: [] for name in present}
        errors: dict[str, list[float]] = {name: [] for name in present}
        for seed in range(ROUNDS):
            for name, tool in present.items():
                if seconds[name] and seconds[name][0] > SLOW_S:
                    continue
                with quiet():
                    run = tool(seed)
                    start = time.process_time()
                    decode = run(weight)
                    seconds[name].append(time.process_time() - start)
                    difference = np.asarray(decode(), np.float64).reshape(weight.shape) - weight
                errors[name].append(float((difference**2).mean()))
        made = [Row(case, name, seconds[name], float(np.median(errors[name]))) for name in present]
        self.rows += made
        ours = next(row for row in made if row.tool == OURS)
        for row in made:
            times, worse = row.seconds / ours.seconds, row.mse / ours.mse
            print(
                f"{case:26} {row.tool:16} {row.seconds:9.3f} s {times:8.2f} {row.mse:13.6e} {worse:10.6f}", flush=True
            )

    def has(self, tool: str) -> bool:
        """Return whether a tool is ours or can be imported."""
        if tool in MODULES and tool not in self.absent:
            with quiet():
                try:
                    importlib.import_module(MODULES[tool])
                except ImportError as e:
                    self.absent[tool] = str(e)
        return tool not in self.absent

    def faster(self, case: str, peer: str, limit: float) -> None:
        """Add a lower limit for the other tool's time divided by ours."""
        ours, theirs = self._pair(case, peer)
        if theirs:
            self._hold(Bar(f"{case}: times faster than {peer}", theirs.seconds / ours.seconds, limit, at_least=True))

    def error(self, case: str, peer: str, limit: float) -> None:
        """Add an upper limit for our error divided by the other tool's."""
        ours, theirs = self._pair(case, peer)
        if theirs:
            self._hold(Bar(f"{case}: MSE x {peer}'s", ours.mse / theirs.mse, limit))

    def at_most(self, what: str, value: float, limit: float) -> None:
        """Add an upper limit for a figure."""
        self._hold(Bar(what, value, limit))

    def _pair(self, case: str, peer: str) -> tuple[Row, Row | None]:
        rows = {row.tool: row for row in self.rows if row.case == case}
        if peer not in rows:
            print(f"  -     {case}: not compared, {peer} is not installed")
        return rows[OURS], rows.get(peer)

    def _hold(self, bar: Bar) -> None:
        self.bars.append(bar)
        print(f"  {bar}", flush=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = Results()
    print(f"{'case':26} {'tool':16} {'CPU':>11} {'x ours':>8} {'MSE':>13} {'x ours':>10}")
    with one_thread():
        scalars(results, args.quick)
        memory(results)
        vectors(results, args.quick)
        if not args.quick:
            model(results)
    for name, reason in results.absent.items():
        print(f"left out: {name} ({reason})")
    if args.json:
        args.json.write_text(json.dumps(as_dict(results), indent=1) + "\n")


def scalars(results: Results, quick: bool) -> None:
    """Measure palettes with one value per code."""
    for name, count, sigma in (("1e7 weights, K=16", 10**7, 0.05), ("1e5 of sigma 1e-4, K=16", 10**5, 1e-4)):
        results.measure(name, weights(count, sigma), {OURS: ours(4), COREML: coreml(4)})
        if count == 10**7:
            results.faster(name, COREML, 15)
        results.error(name, COREML, 1.00005)
    weight = weights(10**6)
    for bits, limit in ((2, 1.0001), (4, 1.0001), (6, 1.0005), (8, 1.01)):
        if quick and bits > 4:
            continue
        name, peers = f"1e6 weights, K={1 << bits}", {COREML: coreml(bits), EXACT: exact(bits)}
        if bits == 4:
            peers |= {kind: sklearn(kind, bits, 1) for kind in (KMEANS, MINIBATCH)}
        results.measure(name, weight, {OURS: ours(bits), **peers})
        results.error(name, EXACT, limit)


def memory(results: Results) -> None:
    """Measure the memory used in addition to the weight and its codes."""
    weight = weights(10**7).reshape(1000, -1)
    for bits in (4, 8):
        tracemalloc.start()
        palettize(weight, bits)
        peak = tracemalloc.get_traced_memory()[1] - weight.size
        tracemalloc.stop()
        results.at_most(f"1e7 weights, K={1 << bits}: bytes beside the codes", peak, BUFFERS)


def vectors(results: Results, quick: bool) -> None:
    """Measure palettes with several weights per code."""
    weight = weights(10**6)
    name = "1e6 weights, K=16, d=2"
    results.measure(name, weight, {OURS: ours(4, 2), KMEANS: sklearn(KMEANS, 4, 2)})
    results.error(name, KMEANS, 1.0)
    results.faster(name, KMEANS, 3)
    name = "1e6 weights, K=256, d=2"
    results.measure(name, weight, {OURS: ours(8, 2), MINIBATCH: sklearn(MINIBATCH, 8, 2)})
    results.at_most(f"{name}: MSE", next(r.mse for r in results.rows if (r.case, r.tool) == (name, OURS)), 2.45e-5)
    results.error(name, MINIBATCH, 0.7)
    results.faster(name, MINIBATCH, 1 / 3)
    for dim in () if quick else (4, 8):
        tools = {OURS: ours(8, dim), MINIBATCH: sklearn(MINIBATCH, 8, dim)}
        results.measure(f"1e6 weights, K=256, d={dim}", weight, tools)


def model(results: Results) -> None:
    """Measure all weights of a BERT-shaped net."""
    random, seconds = np.random.default_rng(0), 0.0
    for shape in BERT:
        weight = random.standard_normal(shape, np.float32) * np.float32(0.05)
        start = time.process_time()
        palettize(weight, 4)
        seconds += time.process_time() - start
    results.at_most("BERT's 110 million weights, K=16: CPU s", seconds, 60)


def weights(count: int, sigma: float = 0.05) -> Floats:
    """Return weights from N(0, sigma^2), one in a thousand multiplied by 8."""
    random = np.random.default_rng(0)
    values = random.standard_normal(count, np.float32) * np.float32(sigma)
    values[random.integers(0, count, count // 1000)] *= 8
    return values


def ours(bits: int, vector_dim: int = 1) -> Callable[[int], Tool]:
    """Return qcompress' k-means, which also computes the codes."""

    def seeded(seed: int) -> Tool:
        if vector_dim == 1:
            return lambda weight: palettize(weight, bits).dequantize
        return lambda weight: palettize_vectors(weight, bits, vector_dim, seed=seed).dequantize

    return seeded


def coreml(bits: int) -> Callable[[int], Tool]:
    """Return coremltools' PostTrainingPalettizer with its defaults (enable_fast_kmeans_mode)."""

    def run(weight: Floats) -> Decode:
        from coremltools.optimize.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig

        net = torch.nn.Sequential(torch.nn.Linear(1000, len(weight) // 1000, bias=False))
        net[0].weight.data = torch.from_numpy(weight).reshape(-1, 1000).clone()
        config = PostTrainingPalettizerConfig.from_dict(
            {"global_config": {"n_bits": bits, "granularity": "per_tensor"}}
        )
        small = PostTrainingPalettizer(net, config).compress(num_kmeans_workers=1)
        return lambda: small[0].weight.detach().numpy()

    return lambda _: run


def exact(bits: int) -> Callable[[int], Tool]:
    """Return kmeans1d, which finds the optimum."""

    def run(weight: Floats) -> Decode:
        import kmeans1d

        found = kmeans1d.cluster(weight, 1 << bits)
        return lambda: np.array(found.centroids)[found.clusters]

    return lambda _: run


def sklearn(kind: str, bits: int, vector_dim: int) -> Callable[[int], Tool]:
    """Return scikit-learn's k-means with one initialisation."""

    def seeded(seed: int) -> Tool:
        def run(weight: Floats) -> Decode:
            kmeans = getattr(importlib.import_module("sklearn.cluster"), kind)
            found = kmeans(1 << bits, n_init=1, random_state=seed).fit(weight.reshape(-1, vector_dim))
            return lambda: found.cluster_centers_[found.labels_]

        return run

    return seeded


def one_thread() -> contextlib.AbstractContextManager[Any]:
    """Limit BLAS and OpenMP to one thread if threadpoolctl is installed."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return contextlib.nullcontext()
    limits: contextlib.AbstractContextManager[Any] = threadpool_limits(1)
    return limits


def as_dict(results: Results) -> dict[str, Any]:
    """Return the results as JSON."""
    return {
        "rows": [asdict(row) for row in results.rows],
        "bars": [{**asdict(bar), "verdict": bar.verdict} for bar in results.bars],
        "absent": results.absent,
    }


if __name__ == "__main__":
    main()
