"""Post-hoc compression: a float program and a plan in, a compressed model out."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch

from qcompress.artifacts import Artifact, FloatWeight
from qcompress.compressed.model import CompressedModel
from qcompress.data.dataset import Dataset, as_dataset
from qcompress.deployment import Compute
from qcompress.errors import ConfigError, SourceError
from qcompress.graph.batchnorm import fold_batchnorm
from qcompress.graph.layers import weight_layers
from qcompress.graph.options import ProgramOptions
from qcompress.graph.program import FloatProgram
from qcompress.graph.sites import Placement, activation_sites
from qcompress.graph.tensors import to_numpy
from qcompress.graph.tracing import from_module
from qcompress.plan.combinations import check_calibration, settled_compute
from qcompress.plan.plan import Plan, ResolvedPlan, resolve
from qcompress.posthoc.activations import calibrate, constant_inputs, whole_batches
from qcompress.posthoc.biases import fitting, in_steps
from qcompress.posthoc.effort import Effort, check_effort, inputs_for, solve
from qcompress.posthoc.nearest import How, nearest
from qcompress.posthoc.solve import SolveSettings
from qcompress.progress import Track, untracked
from qcompress.solvers import check_solver
from qcompress.sources.base import SourceTensor
from qcompress.sources.memory.module import lazy_tensor

_FOLDING_TOLERANCE: Final = 1e-2
# Kinds of layers that compute in integers.
_INTEGER_KINDS: Final[Mapping[Compute, tuple[str, ...]]] = {
    "float": (),
    "int8": ("conv", "depthwise", "linear"),
    "dynamic8": ("linear",),
}


def compress(
    model: torch.nn.Module,
    plan: Plan,
    *,
    example_inputs: tuple[torch.Tensor, ...] | Mapping[str, torch.Tensor] | None = None,
    calibration: Dataset | Mapping[str, Any] | Iterable[Any] | None = None,
    compute: Compute | None = None,
    calibration_method: str = "mse",
    percentile: float = 99.99,
    placement: Placement = "deploy",
    reduce_range: bool = False,
    effort: Effort | None = None,
    synthetic: bool = True,
    solver: str = "gptq",
) -> CompressedModel:
    """Compress a module without training.

    Args:
        model: traced by torch.export; not modified.
        plan: what to do with which weight.
        example_inputs: one example batch, by position or by name; not needed with calibration data.
        calibration: unlabelled inputs, as `data.as_dataset` takes them; what activations are quantized by.
        compute: `float`, `int8` (the default where the plan sets activation_bits) or `dynamic8`.
        calibration_method: a key of `posthoc.calibration.METHODS`.
        percentile: for the method of that name.
        placement: where activations are quantized; see `sites.activation_sites`.
        reduce_range: 8-bit weights keep to 7 bits, for CPUs whose sums of products saturate (no VNNI).
        effort: `fast` takes the nearest levels, `balanced` solves weights and biases on the calibration data; None:
            balanced where there is such data, or what can stand in for it. `best` tunes all layers together after it,
            and is for compute float alone.
        synthetic: whether inputs are synthesised where there is no calibration data; see `posthoc.synthesis`.
        solver: of `balanced` and `best`, a key of `solvers.SOLVERS`.

    Returns:
        One artifact per tensor; `export` of the exporters writes it.

    Raises:
        ConfigError: the plan does not fit the model, or no example input was given.
        SourceError: the model cannot be traced, or a weight is not finite.

    >>> import torch
    >>> small = compress(torch.nn.Linear(8, 4).eval(), Plan.from_flags(bits=2), example_inputs=(torch.zeros(1, 8),))
    >>> small.artifacts["weight"].bits
    2
    """
    data = None if calibration is None else as_dataset(calibration)
    if example_inputs is not None:
        named = example_inputs if isinstance(example_inputs, Mapping) else by_position(model, example_inputs)
        inputs = {name: to_numpy(value) for name, value in named.items()}
    elif data is not None:
        inputs = dict(data.example())
    else:
        raise ConfigError(
            "compress must have example_inputs=(x,) or calibration data: one batch that the model can be traced with."
        )
    return compress_program(
        from_module(model, ProgramOptions(inputs=inputs)), plan, calibration=data, compute=compute,
        calibration_method=calibration_method, percentile=percentile, placement=placement, reduce_range=reduce_range,
        effort=effort, synthetic=synthetic, solver=solver,
    )  # fmt: skip


def compress_program(
    program: FloatProgram,
    plan: Plan,
    *,
    calibration: Dataset | None = None,
    compute: Compute | None = None,
    calibration_method: str = "mse",
    percentile: float = 99.99,
    placement: Placement = "deploy",
    reduce_range: bool = False,
    effort: Effort | None = None,
    synthetic: bool = True,
    solver: str = "gptq",
    source_digest: str = "",
    device: str = "cpu",
    track: Track = untracked,
) -> CompressedModel:
    """Compress a program; see `compress`.

    Args:
        program: as it came in, BatchNorm not folded.
        plan: what to do with which weight.
        calibration: unlabelled inputs.
        compute: as in `compress`, like the arguments that follow.
        calibration_method: ...
        percentile: ...
        placement: ...
        reduce_range: ...
        effort: ...
        synthetic: ...
        solver: ...
        source_digest: short digest of the model file.
        device: where the program runs.
        track: passes on what the long parts go through: a progress bar.
    """
    check_finite(program)
    resolved = resolve(plan, program_tensors(program))
    compute = resolved_compute(resolved, compute)
    integer_kinds = _INTEGER_KINDS[compute]
    check_calibration(compute, calibration is not None)
    check_effort(effort, compute)
    check_solver(solver)
    if calibration is not None:
        whole_batches(program, calibration)
    folded = fold_batchnorm(program)
    check_finite(folded)
    _check_same_function(program, folded)
    small = CompressedModel(
        program=folded,
        artifacts=_nearest(folded, resolved, compute, reduce_range=reduce_range, track=track),
        plan=resolved.as_plan(),
        plan_digest=resolved.digest,
        source_digest=source_digest,
        notes=folded.notes,
        compute=compute,
    )
    if all(isinstance(artifact, FloatWeight) for artifact in small.artifacts.values()):
        effort = "fast"
    inputs = inputs_for(program, calibration, effort, synthetic=synthetic, device=device, track=track)
    small = replace(small, notes=(*small.notes, *inputs.notes))
    if compute == "int8" and calibration is not None:
        small = _with_grids(
            small, resolved, calibration, is_solved=inputs.data is not None, method=calibration_method,
            percentile=percentile, placement=placement, device=device, track=track,
        )  # fmt: skip
    settings = SolveSettings(solver, integer_kinds, reduce_range)
    solved = solve(small, {t.name: t for t in resolved.compressed}, inputs, settings, device=device, track=track)
    if not small.activations:
        return solved
    return in_steps(replace(solved, artifacts=fitting(folded, solved.artifacts, list(small.activations.values()))))


def _nearest(
    folded: FloatProgram,
    resolved: ResolvedPlan,
    compute: Compute,
    *,
    reduce_range: bool,
    track: Track,
) -> dict[str, Artifact]:
    """Each tensor by itself."""
    layers, plans, artifacts = weight_layers(folded), {t.name: t for t in resolved.tensors}, dict[str, Artifact]()
    state = folded.state()
    for name in track(state, "compressing"):
        layer = layers.get(name)
        how = How(
            axis=0 if layer is None else layer.axis,
            integer=layer is not None and layer.kind in _INTEGER_KINDS[compute],
            one_scale=compute == "dynamic8",
            reduce_range=reduce_range,
        )
        artifacts[name] = nearest(np.asarray(to_numpy(state[name]), order="C"), plans.get(name), how)
    return artifacts


def _with_grids(
    small: CompressedModel,
    resolved: ResolvedPlan,
    calibration: Dataset,
    *,
    is_solved: bool,
    method: str,
    percentile: float,
    placement: Placement,
    device: str,
    track: Track,
) -> CompressedModel:
    """The model with its activations quantized: on the float net's values where weights are yet to be solved."""
    program, artifacts = small.program, small.artifacts
    run = program if is_solved else program.with_state({name: a.dequantize() for name, a in artifacts.items()})
    widths = {t.name: t.activation_bits for t in resolved.compressed if t.activation_bits is not None}
    found = calibrate(
        run, activation_sites(program, widths, placement), calibration,
        method=method, percentile=percentile, device=device, track=track,
    )  # fmt: skip
    return replace(
        small,
        artifacts=fitting(program, artifacts, [c.grid for c in found]),
        activations={c.grid.site: c.grid for c in found},
        saturation={c.grid.site: c.saturation for c in found},
        notes=(*small.notes, *constant_inputs(calibration)),
    )


def resolved_compute(resolved: ResolvedPlan, compute: Compute | None) -> Compute:
    """What a plan's layers compute in, where nothing else is said: int8 if any has activation_bits.

    Raises:
        ConfigError: the plan and `compute` do not go together.
    """
    first = next((t for t in resolved.compressed if t.activation_bits is not None), None)
    if first is None:
        return settled_compute(compute, None)
    where = first.origins["activation_bits"]
    return settled_compute(compute, f"{first.name} has activation_bits = {first.activation_bits} ({where})")


def _check_same_function(program: FloatProgram, folded: FloatProgram) -> None:
    """Prove folding on random inputs: nothing later compares with the program as it came in."""
    inputs = program.random_inputs()
    try:
        wanted = program.run(inputs)
    except Exception:  # inputs have a meaning that random ones do not have
        return
    for name, values in folded.run(inputs).items():
        if values.dtype.kind == "f" and np.isfinite(wanted[name]).all():
            off = float(np.abs(values - wanted[name]).max(initial=0.0))
            size = float(np.abs(wanted[name]).max(initial=0.0))
            assert off <= _FOLDING_TOLERANCE * max(size, 1.0), f"folding BatchNorm changed output {name} by {off}"


def resolved_plan(program: FloatProgram, plan: Plan) -> ResolvedPlan:
    """What a plan means for a program, without compressing anything."""
    return resolve(plan, program_tensors(program))


def program_tensors(program: FloatProgram) -> list[SourceTensor]:
    """The tensors of a program: its weights in the order in which they run, with their kinds, then all others."""
    layers, state, aliases = weight_layers(program), program.state(), program.aliases()
    kinds = {name: layer.kind for name, layer in layers.items()} | {n: "other" for n in state if n not in layers}
    return [
        SourceTensor(name, kind, lazy_tensor(state[name], name), aliases.get(name, ()))
        for name, kind in kinds.items()
        if name in state
    ]


def check_finite(program: FloatProgram) -> None:
    """Refuse NaN and Inf in any floating tensor of a program.

    Raises:
        SourceError: names the first such tensor and how many values it concerns.
    """
    for name, value in program.state().items():
        if value.is_floating_point():
            count = int((~torch.isfinite(value)).sum())
            if count:
                raise SourceError(
                    f"{name} must be finite, but {count} of its {value.numel()} values are NaN or Inf: "
                    "`qcompress analyze MODEL` counts them for each tensor; repair or retrain the model."
                )


def by_position(model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    import inspect

    names = list(inspect.signature(model.forward).parameters)
    if len(example_inputs) > len(names):
        raise ConfigError(f"The model's forward takes {len(names)} inputs, got {len(example_inputs)} example inputs.")
    return dict(zip(names, example_inputs, strict=False))
