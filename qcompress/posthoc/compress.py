"""Post-hoc compression: a float program and a plan in, a compressed model out."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from qcompress.artifacts import Artifact
from qcompress.compressed.model import CompressedModel
from qcompress.data.dataset import Dataset, as_dataset
from qcompress.deployment import DEFAULT, Compute, Deployment
from qcompress.errors import ConfigError
from qcompress.graph.batchnorm import fold_batchnorm
from qcompress.graph.channels_first import channels_first
from qcompress.graph.conversion import to_numpy
from qcompress.graph.example_inputs import by_position
from qcompress.graph.layers import weight_layers
from qcompress.graph.options import ProgramOptions
from qcompress.graph.program import FloatProgram
from qcompress.graph.sites import Placement, activation_sites
from qcompress.graph.tensors import check_finite, check_same_function, program_tensors
from qcompress.graph.tracing import from_module
from qcompress.plan.combinations import check_calibration, settled_compute
from qcompress.plan.plan import Plan
from qcompress.plan.resolve import ResolvedPlan, resolve
from qcompress.posthoc.activations import calibrate, constant_inputs, whole_batches
from qcompress.posthoc.biases import fit_biases
from qcompress.posthoc.effort import inputs_for, solve
from qcompress.posthoc.settings import DEFAULTS, Effort, PosthocSettings, check_effort
from qcompress.posthoc.solve import SolveSettings
from qcompress.posthoc.without_data import How, compress_weight, wider_entries
from qcompress.progress import ON_CPU, Execution
from qcompress.solvers import check_solver


def compress(
    model: torch.nn.Module,
    plan: Plan,
    *,
    example_inputs: tuple[torch.Tensor, ...] | Mapping[str, torch.Tensor] | None = None,
    calibration: Dataset | Mapping[str, Any] | Iterable[Any] | None = None,
    deployment: Deployment = DEFAULT,
    compute: Compute | None = DEFAULTS.compute,
    calibration_method: str = DEFAULTS.calibration_method,
    percentile: float = DEFAULTS.percentile,
    placement: Placement = DEFAULTS.placement,
    reduce_range: bool = DEFAULTS.reduce_range,
    effort: Effort | None = DEFAULTS.effort,
    synthetic: bool = DEFAULTS.synthetic,
    solver: str = DEFAULTS.solver,
    seed: int = DEFAULTS.seed,
) -> CompressedModel:
    """Compress a module without training.

    Args:
        model: traced by torch.export; not modified.
        plan: how to compress each weight.
        example_inputs: one example batch, by position or by name; not needed with calibration data.
        calibration: unlabelled inputs, in any form that `data.dataset.as_dataset` accepts; activation ranges are chosen
            and weights are solved on them.
        deployment: the place where the model is to run.
        compute: as in `PosthocSettings`, like all arguments below.
        calibration_method: how activation ranges are chosen.
        percentile: the upper percentile of the method `percentile`.
        placement: which activations are quantized.
        reduce_range: whether 8-bit weights keep to 7 bits.
        effort: how much work is done.
        synthetic: whether inputs are synthesised if there is no calibration data.
        solver: how codes are found.
        seed: of the synthesised inputs.

    Returns:
        One artifact per tensor; `qcompress_exporters.export` writes it.

    Raises:
        ConfigError: the plan does not fit the model, a setting is invalid, or there is no example input.
        SourceError: the model cannot be traced, or a weight is not finite.

    >>> import torch
    >>> small = compress(torch.nn.Linear(8, 4).eval(), Plan.from_flags(bits=2), example_inputs=(torch.zeros(1, 8),))
    >>> small.artifacts["weight"].bits
    2
    """
    settings = PosthocSettings(
        compute=compute, calibration_method=calibration_method, percentile=percentile, placement=placement,
        reduce_range=reduce_range, effort=effort, synthetic=synthetic, solver=solver, seed=seed,
    )  # fmt: skip
    data = None if calibration is None else as_dataset(calibration)
    if example_inputs is not None:
        named = example_inputs if isinstance(example_inputs, Mapping) else by_position(model, example_inputs)
        inputs = {name: to_numpy(value) for name, value in named.items()}
    elif data is not None:
        inputs = dict(data.example())
    else:
        raise ConfigError("compress needs example_inputs=(x,) or calibration data: one batch to trace the model with.")
    program = from_module(model, ProgramOptions(inputs=inputs))
    return compress_program(program, plan, settings, calibration=data, deployment=deployment)


def compress_program(
    program: FloatProgram,
    plan: Plan | ResolvedPlan,
    settings: PosthocSettings = DEFAULTS,
    *,
    calibration: Dataset | None = None,
    source_digest: str = "",
    deployment: Deployment = DEFAULT,
    execution: Execution = ON_CPU,
) -> CompressedModel:
    """Compress a program without training.

    Args:
        program: as it came in, BatchNorm not folded.
        plan: how to compress each weight; one that is resolved for this program already is used as it is.
        settings: everything else that the result depends on.
        calibration: unlabelled inputs.
        source_digest: short digest of the model file.
        deployment: the place where the model is to run.
        execution: where the program runs here, and what shows the progress.

    Raises:
        ConfigError: the plan does not fit the program, or a setting is invalid.
        SourceError: a weight is not finite.
    """
    check_finite(program)
    resolved = plan if isinstance(plan, ResolvedPlan) else resolved_plan(program, plan)
    compute = resolved_compute(resolved, settings.compute)
    integer_kinds = deployment.integer_kinds(compute)
    check_calibration(compute, calibration is not None)
    check_effort(settings.effort, compute)
    check_solver(settings.solver)
    if calibration is not None:
        whole_batches(program, calibration)
    folded = fold_batchnorm(program)
    check_finite(folded)
    check_same_function(program, folded)
    by_channel = [t.name for t in resolved.compressed if t.scheme != "palette" or t.rows_per_lut is not None]
    folded = channels_first(folded, by_channel)
    solving = SolveSettings(settings.solver, integer_kinds, settings.reduce_range)
    model = CompressedModel(
        program=folded,
        artifacts=_without_data(folded, resolved, solving, execution, one_scale=compute == "dynamic8"),
        plan=resolved.as_plan(),
        plan_digest=resolved.digest,
        source_digest=source_digest,
        notes=folded.notes,
        compute=compute,
    )
    if all(artifact.reason for artifact in model.artifacts.values()):
        settings = replace(settings, effort="fast")
    inputs = inputs_for(program, calibration, settings, execution)
    model = replace(model, notes=(*model.notes, *inputs.notes))
    if compute == "int8" and calibration is not None:
        is_solved = inputs.data is not None
        model = _with_grids(
            model, resolved, calibration, settings, execution, fused=deployment.fused, is_solved=is_solved
        )
        model = _with_fitting_biases(model, deployment)
    solved = solve(model, {t.name: t for t in resolved.compressed}, inputs, solving, execution)
    wider = wider_entries(resolved.tensors, solved.artifacts)
    return _with_fitting_biases(replace(solved, notes=(*solved.notes, *wider)), deployment)


def _without_data(
    folded: FloatProgram, resolved: ResolvedPlan, settings: SolveSettings, execution: Execution, *, one_scale: bool
) -> dict[str, Artifact]:
    """Return each tensor compressed by itself."""
    layers, plans, artifacts = weight_layers(folded), {t.name: t for t in resolved.tensors}, dict[str, Artifact]()
    state = folded.state()
    for name in execution.track(state, "compressing"):
        layer = layers.get(name)
        how = How(
            axis=0 if layer is None else layer.axis,
            integer=layer is not None and layer.kind in settings.integer_kinds,
            one_scale=one_scale,
            reduce_range=settings.reduce_range,
        )
        artifacts[name] = compress_weight(np.asarray(to_numpy(state[name]), order="C"), plans.get(name), how)
    return artifacts


def _with_grids(
    model: CompressedModel,
    resolved: ResolvedPlan,
    calibration: Dataset,
    settings: PosthocSettings,
    execution: Execution,
    *,
    fused: frozenset[str],
    is_solved: bool,
) -> CompressedModel:
    """Return the model with activation grids, chosen on the float program's values if its weights will be solved."""
    widths = {t.name: t.activation_bits for t in resolved.compressed if t.activation_bits is not None}
    sites, program = activation_sites(model.program, widths, settings.placement, fused), model.program
    if not is_solved:
        program = program.with_state({name: a.dequantize() for name, a in model.artifacts.items()})
    found = calibrate(program, sites, calibration, settings, execution)
    return replace(
        model,
        activations={c.grid.site: c.grid for c in found},
        saturation={c.grid.site: c.saturation for c in found},
        notes=(*model.notes, *constant_inputs(calibration)),
    )


def _with_fitting_biases(model: CompressedModel, deployment: Deployment) -> CompressedModel:
    """Return the model with weight scales that are large enough for its biases; see `fit_biases`."""
    if not model.activations:
        return model
    grids = list(model.activations.values())
    return replace(model, artifacts=fit_biases(model.program, model.artifacts, grids, deployment.largest_bias))


def resolved_plan(program: FloatProgram, plan: Plan) -> ResolvedPlan:
    """Return what a plan means for a program."""
    return resolve(plan, program_tensors(program))


def resolved_compute(resolved: ResolvedPlan, compute: Compute | None) -> Compute:
    """Return what the layers compute in: the given compute, or by default int8 if any layer has activation_bits.

    Args:
        resolved: the plan.
        compute: None if unset.

    Raises:
        ConfigError: the plan and `compute` contradict each other.
    """
    first = next((t for t in resolved.compressed if t.activation_bits is not None), None)
    if first is None:
        return settled_compute(compute, None)
    where = first.origins["activation_bits"]
    return settled_compute(compute, f"{first.name} has activation_bits = {first.activation_bits} ({where})")
