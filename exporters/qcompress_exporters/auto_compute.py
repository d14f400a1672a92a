"""Finds out which layers are worth computing in int8 on this machine, and leaves the others in float.

Integer kernels are not faster everywhere: depthwise layers on small images often lose, and where an int8 layer borders
on a float one, values are converted. So files are timed, all in one run: every layer in float, every layer in int8,
depthwise layers in float, and the best stretch of consecutive layers in int8, which follows from what each layer costs
in both files.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Final

import numpy as np

from qcompress.data.dataset import Dataset
from qcompress.deployment import Compute, Deployment
from qcompress.graph.program import FloatProgram
from qcompress.plan.resolve import ResolvedPlan
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.settings import PosthocSettings
from qcompress.progress import ON_CPU, Execution
from qcompress_exporters.deploy import build
from qcompress_exporters.parity.profile import layer_costs
from qcompress_exporters.parity.timing import cpu_seconds, paired

ALL, NONE, BUT_DEPTHWISE, STRETCH = "all layers", "no layer", "all but depthwise layers", "a stretch of layers"
_SAMPLES: Final = 16  # enough to place grids for timing
_WORTH: Final = 1.03  # how much faster than ALL another choice must be
_SECONDS: Final = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Some layers in int8, and how fast that is.

    Args:
        name: which layers: ALL, NONE, BUT_DEPTHWISE or STRETCH.
        weights: the layers' weights.
        speed: the float file's time over this one's; above 1 is faster.
    """

    name: str
    weights: tuple[str, ...]
    speed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoCompute:
    """What was measured, and picked.

    Args:
        candidates: all that were timed; NONE is the float file against itself in another session.
        spread: quartiles of that over the rounds.
        picked: the name of one.
        float_layers: the weights of the layers that it leaves in float.
    """

    candidates: tuple[Candidate, ...]
    spread: tuple[float, float]
    picked: str
    float_layers: tuple[str, ...]

    @property
    def compute(self) -> Compute:
        """What layers compute in."""
        return "float" if self.picked == NONE else "int8"

    def settle(self, resolved: ResolvedPlan) -> ResolvedPlan:
        """Return the plan without activation bits for the layers that compute in float."""
        return _without(resolved, self.float_layers)


def choose(
    program: FloatProgram,
    resolved: ResolvedPlan,
    settings: PosthocSettings,
    data: Dataset,
    target: Deployment,
    execution: Execution = ON_CPU,
) -> AutoCompute:
    """Time a model with some of its layers in int8, and pick what is fastest.

    Whole int8 is preferred to what is not clearly faster; what is slower than the float file by more than the spread of
    the control is never picked.

    Args:
        program: as it came in.
        resolved: the plan; layers with activation bits can compute in int8.
        settings: of the compression; the files that are timed are made without solving.
        data: calibration data; its first sample is the batch that is timed, if the program takes a batch of 1.
        target: where the file is to run.
        execution: where the program runs here, and what shows the progress.
    """
    kinds = {t.name: t.kind for t in resolved.compressed if t.activation_bits is not None}
    few, batch = data.head(max(_SAMPLES, program.fixed_batch or 1)), program.fixed_batch or 1
    feeds = dict(zip(program.input_names, program.bind(next(few.batches(batch)).inputs), strict=True))
    fast = replace(settings, effort="fast", synthetic=False)

    def file(weights: Collection[str]) -> bytes:
        plan = _without(resolved, [name for name in kinds if name not in weights])
        small = compress_program(
            program, plan, replace(fast, compute="int8" if weights else "float"),
            calibration=few if weights else None, deployment=target, execution=execution,
        )  # fmt: skip
        return build(small, target=target.name).data

    files = {NONE: file(()), ALL: file(kinds)}
    chosen: dict[str, tuple[str, ...]] = {NONE: (), ALL: tuple(kinds)}
    costs = {name: layer_costs(data, feeds, kinds) for name, data in files.items()}
    others = {
        BUT_DEPTHWISE: tuple(name for name, kind in kinds.items() if kind != "depthwise"),
        STRETCH: stretch(costs[NONE], costs[ALL]),
    }
    for name, weights in others.items():
        if weights and weights not in chosen.values():
            chosen[name], files[name] = weights, file(weights)
    times = cpu_seconds([files[NONE], *files.values()], feeds, seconds=_SECONDS)
    ratios = dict(zip(files, (paired(times[:, 0], times[:, i]) for i in range(1, 1 + len(files))), strict=True))
    spread = ratios[NONE].low, ratios[NONE].high
    picked = pick({name: ratio.median for name, ratio in ratios.items()}, spread)
    return AutoCompute(
        candidates=tuple(Candidate(name=n, weights=chosen[n], speed=r.median) for n, r in ratios.items()),
        spread=spread,
        picked=picked,
        float_layers=tuple(name for name in kinds if name not in chosen[picked]),
    )


def pick(speeds: dict[str, float], spread: tuple[float, float]) -> str:
    """Return the candidate to take.

    >>> pick({NONE: 1.0, ALL: 1.5, STRETCH: 1.52}, (0.99, 1.01))
    'all layers'
    >>> pick({NONE: 1.0, ALL: 0.8, STRETCH: 1.2}, (0.99, 1.01))
    'a stretch of layers'
    >>> pick({NONE: 1.0, ALL: 0.8, STRETCH: 0.95}, (0.99, 1.01))
    'no layer'
    """
    in_int8 = {name: speed for name, speed in speeds.items() if name != NONE}
    best = max(in_int8, key=lambda name: in_int8[name])
    if in_int8[best] <= _WORTH * in_int8[ALL]:
        best = ALL
    return best if in_int8[best] >= min(1.0, *spread) else NONE


def stretch(in_float: Mapping[str, float], in_int8: Mapping[str, float]) -> tuple[str, ...]:
    """Return the consecutive layers whose costs in int8, with those of all others in float, are least.

    Args:
        in_float: the cost of each layer in float, in the layers' order.
        in_int8: the same in int8.

    >>> stretch({"a": 1.0, "b": 5.0, "c": 2.0}, {"a": 3.0, "b": 2.0, "c": 1.5})
    ('b', 'c')
    """
    layers, gains = list(in_float), [cost - in_int8.get(layer, 0.0) for layer, cost in in_float.items()]
    sums = np.array([0.0, *accumulate(gains)])
    gain = np.triu(sums[None, :] - sums[:, None])  # of the layers from the row's number up to the column's
    first, last = np.unravel_index(int(gain.argmax()), gain.shape)
    return tuple(layers[int(first) : int(last)])


def _without(resolved: ResolvedPlan, names: Collection[str]) -> ResolvedPlan:
    """Return the plan without activation bits for some weights."""
    left = frozenset(names)
    tensors = []
    for tensor in resolved.tensors:
        if tensor.name in left and tensor.settings is not None:
            given = {name: value for name, value in tensor.settings.given().items() if name != "activation_bits"}
            tensor = replace(tensor, settings=type(tensor.settings)(**given))
        tensors.append(tensor)
    return replace(resolved, tensors=tuple(tensors))
