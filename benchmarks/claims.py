"""Repeats comparisons of the papers at our scale, and prints what comes out beside what the papers found.

    python benchmarks/claims.py --json FILE [--claims NAME …] [--seeds N]
    python benchmarks/claims.py --json FILE --claims n2uq --data DIR [--epochs 3]

`configurations` and `starts` are of LSQ+, `bins` of Bin Regularization, `range` of R²; they train nets of five layers
on scikit-learn's digits, and take minutes. `n2uq` trains ResNet-20 from DIR, which holds the nets and images of
`_nets.py`, and takes hours. Without `--claims` all but `n2uq` run.

All sides of a comparison have the same start, data, order of the data, epochs, rates, widths, placement and settings of
the loop, which are printed; they differ in what their names say. Files are exported and measured in onnxruntime on test
images. Nets of usual size have nearly the same accuracy on digits whatever the side, so these nets have 8 and 16
channels and train for few epochs, and sides are judged by the cross entropy on the test images (loss, in nats), which
moves where the few errors in 600 images do not. ResNet-20 is judged by its top-1 on 5,000 images.

Differences are paired by seed, with a 95 % interval (Student); a seed sets the order of the data, and in `range` the
weights at the start. Of a paper's "a > b" the table says: shown or contradicted, if the interval lies on one side of 0,
else undecided. Runs that diverge are left out. Each result is written to FILE as soon as it is there; results that FILE
holds already are not measured again.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from _training import FloatRow, Row, Task, interval, logits, named, tensors, tuned
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from training import resnet20

from qcompress import compress
from qcompress.data.dataset import Dataset
from qcompress.errors import DivergenceError
from qcompress.finetune.methods import Methods
from qcompress.graph.layers import Layer
from qcompress.plan.plan import Plan
from qcompress.plan.resolve import TensorPlan
from qcompress.quantizers import AbstractQuantizer
from qcompress.regularizers import BinRegularizer, RangeRegularizer
from qcompress_exporters import build

TRAINING_IMAGES, CALIBRATION_IMAGES = 1197, 256
FLOAT_EPOCHS, FLOAT_RATE = 12, 5e-3
UNITS = {"loss": (1, "nats"), "top1": (100, "points")}


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Args:
        row: what is trained; its name is the side's.
        options: arguments of `LoopConfig` in which this side differs.
    """

    row: Row
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A comparison of a paper.

    Args:
        start: what all sides start from, in words.
        task: makes the net with its data from the folder of nets and images.
        measure: returns the figures of a side, given the task, the side, the options of the loop and a seed.
        sides: what is compared; differences are from the first one.
        expected: pairs (better, worse) of the paper.
        epochs: passes over the training data.
        rate: see `LoopConfig`.
        options: arguments of `LoopConfig` that all sides share.
        seeds: how many runs each side has.
        judged_by: "loss" or "top1".
    """

    start: str
    task: Callable[[Path | None], Task]
    measure: Callable[[Task, Row, Mapping[str, Any], int], dict[str, float]]
    sides: tuple[Side, ...]
    expected: tuple[tuple[str, str], ...]
    epochs: int
    rate: float
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 5
    judged_by: str = "loss"

    @property
    def setting(self) -> str:
        """Return in words what all sides share."""
        row = self.sides[0].row
        width = f"W{row.bits}" + (f"A{row.activation_bits}" if row.activation_bits else "")
        ends = "8-bit ends" if row.wide_ends else f"ends at {row.bits} bits too"
        options = "".join(f", {name} {value}" for name, value in self.options.items())
        return (
            f"{self.start}; {self.epochs} epochs, rate {self.rate:g}, of quantizers x {row.quantizer_rate:g}{options}; "
            f"{width}, {ends}, placement {row.placement}"
        )


@dataclass(frozen=True)
class Result:
    """The figures of one side and seed.

    Args:
        claim: name of the claim.
        side: name of the side.
        seed: the seed.
        setting: what all sides shared.
        figures: by name; empty if training diverged.
    """

    claim: str
    side: str
    seed: int
    setting: str
    figures: dict[str, float]

    @property
    def key(self) -> tuple[str, str, int, str]:
        """Return what tells results apart."""
        return self.claim, self.side, self.seed, self.setting


def small_net(activation: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return a net of four convolutions and a linear layer for images of 8 x 8 pixels, with random weights."""
    torch.manual_seed(seed)
    blocks: list[nn.Module] = []
    for (channels, out), stride in zip(itertools.pairwise((1, 8, 8, 16, 16)), (1, 1, 2, 1), strict=True):
        blocks += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), activation()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def untrained(_: Path | None, activation: Callable[[], nn.Module] = nn.ReLU) -> Task:
    """Return the digits with a net that has random weights."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))
    x, y = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)[order], labels[order]
    parts = (slice(TRAINING_IMAGES), slice(TRAINING_IMAGES, None))
    training, test = (Dataset(inputs={"input": x[part]}, labels=y[part], name="digits") for part in parts)
    return Task(small_net(activation, 0), training, test, epochs=FLOAT_EPOCHS, rate=FLOAT_RATE)


def trained_float(folder: Path | None, activation: Callable[[], nn.Module] = nn.ReLU) -> Task:
    """Return the digits with a net trained in float from a fixed seed."""
    task = untrained(folder, activation)
    return replace(task, module=tuned(task, FloatRow("float", 2, None, named()))[0].unwrap().eval())


def quantized(task: Task, row: Row, options: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Return the figures of the file after training with quantizers."""
    model, _ = tuned(task, row, seed, **options)
    return figures(logits(build(model.finalize()).data, task.test), task.test)


def palettized(task: Task, row: Row, options: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Return the figures of the file with palettes found without training, after training a float net from scratch."""
    model, _ = tuned(replace(task, module=small_net(nn.ReLU, seed)), row, seed, **options)
    net = model.unwrap().eval()
    calibration = Dataset(inputs=task.training.inputs).head(CALIBRATION_IMAGES)
    small = compress(net, Plan.from_flags(bits=row.bits), calibration=calibration, effort="balanced")
    with torch.no_grad():
        before = figures(net(tensors(task.test)[0]).numpy(), task.test)
    ranges = [_range(m.weight.detach()) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return {
        **figures(logits(build(small).data, task.test), task.test),
        "float loss": before["loss"],
        "float top1": before["top1"],
        "range": float(np.mean(ranges)),
    }


def _range(weight: Tensor) -> float:
    """Return the distance of the largest weight from the smallest in standard deviations."""
    return float((weight.max() - weight.min()) / weight.std(correction=0))


def figures(outputs: npt.NDArray[np.float32], data: Dataset) -> dict[str, float]:
    """Return the cross entropy in nats, and top-1."""
    assert data.labels is not None
    loss = functional.cross_entropy(torch.from_numpy(outputs).double(), torch.tensor(data.labels).long())
    return {"loss": float(loss), "top1": float((outputs.argmax(1) == data.labels).mean())}


def lsq_plus(name: str, configuration: int = 4, **init: str) -> Row:
    """Return a row of LSQ+ in which the outputs of SiLU have one of the paper's configurations."""
    sites = {"silu*": {"configuration": configuration}}
    methods = named("lsq_plus", "lsq_plus", weight_options=init, activation_options=init, site_options=sites)
    return Row(name, 2, 2, methods, wide_ends=True)


def bins(name: str, **options: Any) -> Row:
    """Return a row of LSQ, with Bin Regularization if it has options."""
    regularizers = (partial(BinRegularizer, **options),) if options else ()
    methods = named("lsq", "lsq", activation_options={"init": "lsq_plus"})
    return Row(name, 2, 2, methods, regularizers, wide_ends=True)


def ranged(kind: str, weight: float, **options: Any) -> Side:
    """Return a side that trains the float net with R²."""
    name = f"{'relative ' if options else ''}{kind.replace('_', '-')} {weight:g}"
    return Side(FloatRow(name, 2, None, named(), (partial(RangeRegularizer, kind=kind, weight=weight, **options),)))


class LsqEnds(Methods):
    """Methods in which LSQ quantizes weights of 8 bits, those of the ends.

    N2UQ would clip them at twice their mean size; its paper leaves the first and the last layer out.
    """

    def weight(self, tensor: TensorPlan, layer: Layer, channels: int) -> AbstractQuantizer:
        """Return the quantizer of a layer's weight."""
        return Methods.weight(replace(self, weights="lsq") if tensor.bits == 8 else self, tensor, layer, channels)


def resnet(name: str, weights: str, activations: str) -> Side:
    """Return a side of N2UQ's ablation: `lsq_plus` is LSQ behind ReLU; both methods start at the least error."""
    return Side(Row(name, 2, 2, LsqEnds(weights=weights, activations=activations), wide_ends=True))


_SILU = partial(trained_float, activation=nn.SiLU)
_DIGITS = f"digits, {{}} net after {FLOAT_EPOCHS} float epochs"
_FREE = {"snap_offsets": 0, "settle": 0}
_STAGES, _LAMBDAS, _BEST = ("S1", "S2", "S3"), (0.05, 0.5, 4.0), 0.5
_KINDS: dict[str, dict[str, Any]] = {"linf": {}, "margin": {}, "soft_min_max": {"relative": True}}
_RANGES = tuple(ranged(kind, weight, **options) for weight in (0.01, 0.1) for kind, options in _KINDS.items())

CLAIMS = {
    # Offsets are free, as in the paper; those of the last two sides end at values that a zero point can hold.
    "configurations": Claim(
        _DIGITS.format("SiLU"), _SILU, quantized,
        (*(Side(lsq_plus(str(i), i)) for i in (1, 2, 3, 4)),
         *(Side(lsq_plus(f"{i} zero points", i), {"snap_offsets": 0.5}) for i in (3, 4))),
        expected=(("4", "3"), ("3", "1"), ("1", "2")), epochs=6, rate=3e-3, options=_FREE, seeds=10,
    ),
    "starts": Claim(
        _DIGITS.format("SiLU"), _SILU, quantized,
        tuple(Side(lsq_plus(name, init=init)) for name, init in
              (("min-max", "min_max"), ("LSQ", "lsq"), ("least error", "lsq_plus"))),
        expected=(("least error", "LSQ"), ("LSQ", "min-max")), epochs=6, rate=3e-3, options=_FREE, seeds=10,
    ),
    "bins": Claim(
        _DIGITS.format("ReLU"), trained_float, quantized,
        (Side(bins("none")),
         *(Side(bins(f"{stage} λ {weight:g}", weight=weight), {"stage": stage})
           for weight in _LAMBDAS for stage in _STAGES),
         Side(bins(f"S2 λ {_BEST:g} moving scales", weight=_BEST, detach_targets=False), {"stage": "S2"})),
        expected=(("S2 λ 0.5", "none"), ("none", "S1 λ 0.5"), ("none", "S3 λ 0.5"), ("S2 λ 0.5", "S2 λ 0.05"),
                  ("S2 λ 0.5", "S2 λ 4")),
        epochs=6, rate=3e-3,
    ),
    "range": Claim(
        "digits, ReLU net with random weights", untrained, palettized,
        (Side(FloatRow("none", 2, None, named())), *_RANGES),
        expected=tuple((side.row.name, "none") for side in _RANGES),
        epochs=FLOAT_EPOCHS, rate=FLOAT_RATE, options={"stage": "S1"},
    ),
    # In earlier runs N2UQ did as well with quantizers' rates x 1 as with its usual x 0.1, so all sides have LSQ's x 1.
    "n2uq": Claim(
        "ResNet-20, taught by itself, ends by LSQ", lambda folder: resnet20(folder, 1), quantized,
        (resnet("uniform", "lsq", "lsq_plus"), resnet("+ thresholds", "lsq", "n2uq"),
         resnet("+ weights", "n2uq", "lsq_plus"), resnet("both", "n2uq", "n2uq")),
        expected=(("both", "+ thresholds"), ("+ thresholds", "+ weights"), ("+ weights", "uniform")),
        epochs=3, rate=2e-3, seeds=3, judged_by="top1",
    ),
}  # fmt: skip


def main() -> None:
    """Measure what is missing, and print a table for each claim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, default=[name for name in CLAIMS if name != "n2uq"])
    parser.add_argument("--seeds", type=int, default=10, help="limit to the runs of a side")
    parser.add_argument("--data", type=Path, help="for n2uq")
    parser.add_argument("--epochs", type=int, default=CLAIMS["n2uq"].epochs, help="of n2uq")
    args = parser.parse_args()
    if "n2uq" in args.claims and args.data is None:
        parser.error("n2uq needs --data")
    torch.set_num_threads(1)
    results = [Result(**entry) for entry in json.loads(args.json.read_text())] if args.json.exists() else []
    for name in args.claims:
        claim = replace(CLAIMS[name], epochs=args.epochs) if name == "n2uq" else CLAIMS[name]
        run(name, claim, min(args.seeds, claim.seeds), args, results)
        show(name, claim, [r for r in results if (r.claim, r.setting) == (name, claim.setting)])


def run(name: str, claim: Claim, seeds: int, args: argparse.Namespace, results: list[Result]) -> None:
    """Measure what is missing of a claim, all sides with the first seed, then with the next; add it to the results."""
    known = {result.key for result in results}
    asked = [(side, seed) for seed in range(seeds) for side in claim.sides]
    missing = [(side, seed) for side, seed in asked if (name, side.row.name, seed, claim.setting) not in known]
    if not missing:
        return
    task = replace(claim.task(args.data), epochs=claim.epochs, rate=claim.rate)
    for side, seed in missing:
        try:
            found = claim.measure(task, side.row, {**claim.options, **side.options}, seed)
        except DivergenceError as error:
            print(f"{name}: {side.row.name}, seed {seed}: {error}", flush=True)
            found = {}
        results.append(Result(name, side.row.name, seed, claim.setting, found))
        print(f"{name}: {side.row.name}, seed {seed}: {found}", flush=True)
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


def show(name: str, claim: Claim, results: list[Result]) -> None:
    """Print the table of a claim, the paper's order, and the order found."""
    sides = [side.row.name for side in claim.sides if any(r.side == side.row.name for r in results)]
    more = [*dict.fromkeys(key for result in results for key in result.figures if key not in UNITS)]
    print(f"\n{name}: {claim.setting}")
    print(f"{'':27} seeds    loss     sd  {'difference, nats':28} top-1  {'difference, points':24}" + "  ".join(more))
    for side in sides:
        loss, top1 = (values(results, side, key) for key in UNITS)
        gaps = [difference(results, side, sides[0], key) if side != sides[0] else "" for key in UNITS]
        others = "  ".join(f"{np.mean([*values(results, side, key).values()]):{len(key)}.3f}" for key in more)
        numbers = f"{np.mean([*loss.values()]):7.4f} {np.std([*loss.values()], ddof=1) if len(loss) > 1 else 0:6.4f}"
        print(f"{side:27} {len(loss):5} {numbers}  {gaps[0]:28} {np.mean([*top1.values()]):6.2%}  {gaps[1]:24}{others}")
    sign = -1 if claim.judged_by == "loss" else 1
    means = {side: float(np.mean([*values(results, side, claim.judged_by).values()])) for side in sides}
    print(f"found by {claim.judged_by}, best first: {' > '.join(sorted(sides, key=lambda s: -sign * means[s]))}")
    for better, worse in claim.expected:
        if {better, worse} <= {*sides}:
            _, low, high = interval(*(values(results, side, claim.judged_by) for side in (better, worse)))
            gap = difference(results, better, worse, claim.judged_by)
            print(f"the paper's {better} > {worse}: {verdict(sign * low, sign * high)} ({gap})")


def values(results: list[Result], side: str, figure: str) -> dict[int, float]:
    """Return a figure of a side by seed."""
    return {result.seed: result.figures[figure] for result in results if result.side == side and result.figures}


def difference(results: list[Result], side: str, other: str, figure: str) -> str:
    """Return the paired difference of two sides with its interval."""
    scale, _ = UNITS[figure]
    mean, low, high = (scale * v for v in interval(values(results, side, figure), values(results, other, figure)))
    digits = 4 if scale == 1 else 2
    return f"{mean:+.{digits}f}" + ("" if math.isnan(low) else f" ({low:+.{digits}f} to {high:+.{digits}f})")


def verdict(one: float, other: float) -> str:
    """Return what an interval says of "better", given its two ends; positive values are better.

    >>> verdict(0.1, 0.3), verdict(0.1, -0.3), verdict(-0.1, -0.3), verdict(float("nan"), float("nan"))
    ('shown', 'undecided', 'contradicted', 'undecided')
    """
    if math.isnan(one) or min(one, other) <= 0 <= max(one, other):
        return "undecided"
    return "shown" if one > 0 else "contradicted"


if __name__ == "__main__":
    main()
