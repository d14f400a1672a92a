"""Post-hoc compression: a float program and a plan in, a compressed model out."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from qcompress.artifacts import Artifact, FloatWeight, PalettizedWeight
from qcompress.batchnorm import fold_batchnorm
from qcompress.combinations import check_calibration, settled_compute
from qcompress.compressed import CompressedModel, Compute, LayerGain
from qcompress.data import Dataset, as_dataset
from qcompress.errors import ConfigError, SourceError
from qcompress.layers import weight_layers
from qcompress.palettes.integer import palettize_int8
from qcompress.palettes.scalar import palettize
from qcompress.palettes.vector import palettize_vectors
from qcompress.plan import Plan, ResolvedPlan, TensorPlan, resolve
from qcompress.posthoc.activations import BATCH, calibrate, constant_inputs, whole_batches
from qcompress.posthoc.biases import fitting, in_steps
from qcompress.posthoc.schemes import Codes, better, codes_for
from qcompress.posthoc.solve import solve_weights
from qcompress.posthoc.synthesis import synthesize
from qcompress.posthoc.tune import output_error, tune
from qcompress.program import Arrays, FloatProgram
from qcompress.sites import Placement, activation_sites, mark
from qcompress.solvers import SOLVERS
from qcompress.sources.base import LazyArray, ProgramOptions, SourceTensor
from qcompress.tracing import from_module
from qcompress.uniform import round_to_nearest

_FOLDING_TOLERANCE: Final = 1e-2
_AS_GOOD: Final = 10 ** (0.5 / 10)  # squared error that one scale for a tensor may cost: 0.5 dB
_UNCLIPPED: Final = 8  # bits at which clipping gains nothing
_HELD_BACK: Final = 8  # one batch of so many says whether tuning helped
_PARAMETRIZED: Final = ".parametrizations."
# Kinds of layers that compute in integers.
_INTEGER_KINDS: Final[Mapping[Compute, tuple[str, ...]]] = {
    "float": (),
    "int8": ("conv", "depthwise", "linear"),
    "dynamic8": ("linear",),
}

Effort = Literal["fast", "balanced", "best"]
Track = Callable[[Iterable[Any]], Iterable[Any]]
Notes = tuple[str, ...]


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
        named = example_inputs if isinstance(example_inputs, Mapping) else _by_position(model, example_inputs)
        inputs = {name: value.detach().cpu().numpy() for name, value in named.items()}
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
    track: Track = iter,
    track_batches: Track = iter,
    track_layers: Track = iter,
    track_synthesis: Track = iter,
    track_tuning: Track = iter,
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
        track: passes the names of the tensors on while they are compressed: a progress bar.
        track_batches: the same for batches of calibration data.
        track_layers: the same for layers while they are solved.
        track_synthesis: the same for the steps in which inputs are synthesised.
        track_tuning: the same for those in which all layers are tuned together.
    """
    check_finite(program)
    resolved = resolve(plan, program_tensors(program))
    compute = resolved_compute(resolved, compute)
    check_calibration(compute, calibration is not None)
    check_effort(effort, compute)
    if solver not in SOLVERS:
        raise ConfigError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}.")
    if calibration is not None:
        whole_batches(program, calibration)
    inputs, effort_notes = calibration, tuple[str, ...]()
    if calibration is None and effort != "fast":
        inputs = synthesize(program, device=device, track=track_synthesis) if synthetic else None
        effort, effort_notes = _effort_without_data(effort, inputs, synthetic)
    effort = effort or "balanced"
    folded = fold_batchnorm(program)
    check_finite(folded)
    _check_same_function(program, folded)
    layers = weight_layers(folded)
    by_name = {t.name: t for t in resolved.tensors}
    state = {name: _numpy(value) for name, value in folded.state().items()}
    artifacts: dict[str, Artifact] = {}
    for name in track(state):
        layer = layers.get(name)
        integer = layer is not None and layer.kind in _INTEGER_KINDS[compute]
        axis = 0 if layer is None else layer.axis
        artifacts[name] = _artifact(
            state[name], by_name.get(name), _How(axis, integer, compute == "dynamic8", reduce_range)
        )
    small = CompressedModel(
        program=folded,
        artifacts=artifacts,
        plan=resolved.as_plan(),
        plan_digest=resolved.digest,
        source_digest=source_digest,
        notes=(*folded.notes, *effort_notes),
        compute=compute,
    )

    def solved(small: CompressedModel) -> CompressedModel:
        if inputs is None or effort == "fast":
            return small
        data, grids = whole_batches(program, inputs), list(small.activations.values())
        batches = [batch.inputs for batch in data.batches(program.fixed_batch or BATCH)]

        def solve(batches: Sequence[Arrays]) -> tuple[dict[str, Artifact], list[LayerGain]]:
            return solve_weights(
                mark(folded, list(small.activations)) if grids else folded,
                {t.name: t for t in resolved.compressed}, small.artifacts, batches,
                solver=solver, integer_kinds=_INTEGER_KINDS[compute], reduce_range=reduce_range, grids=grids,
                device=device, track=track_layers,
            )  # fmt: skip

        def tuned(artifacts: Mapping[str, Artifact], batches: Sequence[Arrays]) -> dict[str, Artifact]:
            return tune(folded, artifacts, batches, device=device, track=track_tuning)

        found, gains = solve(batches)
        source = f"{data.samples:,} samples of {data.name}" if calibration is not None else data.name
        notes = small.notes
        if effort == "best":
            held_back = batches[: len(batches) // _HELD_BACK]
            gain = _gain_of_tuning(folded, solve, tuned, batches[len(held_back) :], held_back, device)
            notes = (*notes, gain.note)
            found = tuned(found, batches) if gain.pays else found
        return replace(small, artifacts=found, gains=tuple(gains), solved_on=source, notes=notes)

    if compute != "int8" or calibration is None:
        return solved(small)
    widths = {t.name: t.activation_bits for t in resolved.compressed if t.activation_bits is not None}
    found = calibrate(
        folded if effort != "fast" else folded.with_state({name: a.dequantize() for name, a in artifacts.items()}),
        activation_sites(folded, widths, placement),
        calibration, method=calibration_method, percentile=percentile, device=device, track=track_batches,
    )  # fmt: skip
    grids = [c.grid for c in found]
    calibrated = replace(
        small,
        artifacts=fitting(folded, artifacts, grids),
        activations={c.grid.site: c.grid for c in found},
        saturation={c.grid.site: c.saturation for c in found},
        notes=(*small.notes, *constant_inputs(calibration)),
    )
    computed = solved(calibrated)
    return in_steps(replace(computed, artifacts=fitting(folded, computed.artifacts, grids)))


@dataclass(frozen=True, slots=True)
class _TuningGain:
    """Whether tuning all layers together pays on inputs that it has not seen, and what a user should be told."""

    pays: bool
    note: str


def _gain_of_tuning(
    folded: FloatProgram,
    solve: Callable[[Sequence[Arrays]], tuple[dict[str, Artifact], list[LayerGain]]],
    tuned: Callable[[Mapping[str, Artifact], Sequence[Arrays]], dict[str, Artifact]],
    batches: Sequence[Arrays],
    held_back: Sequence[Arrays],
    device: str,
) -> _TuningGain:
    if not held_back:
        return _TuningGain(False, f"too few inputs to tune on: effort best takes {_HELD_BACK * BATCH} or more.")
    found, _ = solve(batches)
    before, after = (output_error(folded, a, held_back, device=device) for a in (found, tuned(found, batches)))
    samples = sum(len(next(iter(batch.values()))) for batch in held_back)
    what = f"error of the outputs over their variance on {samples} samples that were held back"
    end = "so all layers were tuned" if after < before else "no gain, so all stays as it was solved"
    return _TuningGain(after < before, f"{what}: {before:.4f} solved, {after:.4f} tuned together; {end}.")


def check_effort(effort: Effort | None, compute: Compute) -> None:
    """Refuse another word, and one that is not for what layers compute in.

    Raises:
        ConfigError: names those that there are.
    """
    if effort not in (None, *get_args(Effort)):
        raise ConfigError(f"effort must be one of {', '.join(get_args(Effort))}, got {effort!r}.")
    if effort == "best" and compute != "float":
        raise ConfigError(f"effort best tunes weights for compute float alone, got compute {compute}: take balanced.")


def _effort_without_data(effort: Effort | None, inputs: Dataset | None, synthetic: bool) -> tuple[Effort, Notes]:
    """What can be done with synthesised inputs, or with none, and what a user should be told."""
    if inputs is not None:
        return effort or "balanced", ()
    why = "the model has no BatchNorm to synthesise any from" if synthetic else "none are synthesised"
    if effort is not None:
        raise ConfigError(f"effort {effort} must have inputs to solve weights on, and {why}: give --calibration.")
    note = f"no calibration data, and {why}: each weight goes to its nearest level. --calibration solves them."
    return "fast", (note,)


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
        SourceTensor(name, kind, _lazy(state[name]), aliases.get(name, ()))
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


@dataclass(frozen=True, slots=True)
class _How:
    """How a weight is compressed, beside what its plan says.

    Args:
        axis: of the output channels.
        integer: whether integer kernels shall compute with it.
        one_scale: whether the kernel is faster with one scale for the tensor than with one for each output channel.
        reduce_range: whether 8-bit codes keep to 7 bits.
    """

    axis: int
    integer: bool
    one_scale: bool
    reduce_range: bool


def _artifact(values: npt.NDArray[Any], tensor: TensorPlan | None, how: _How) -> Artifact:
    """One tensor by its plan; float where that is smaller."""
    if tensor is None or tensor.settings is None:
        reason = None if tensor is None else tensor.reason
        if tensor is not None and _PARAMETRIZED in tensor.name:
            reason = "part of a parametrization: torch.nn.utils.parametrize.remove_parametrizations makes it a weight"
        return FloatWeight(values=values, reason=reason or "not a weight")
    made = [_MAKERS[codes](values, tensor, how) for codes in codes_for(tensor, integer=how.integer)]
    small = made[0] if len(made) == 1 else better((a, _error(a, values)) for a in made)
    if how.integer and small.nbytes >= values.nbytes and tensor.bits > 1:  # a table does not pay, plain codes may
        small = _uniform(values, tensor, how)
    if small.nbytes >= values.nbytes:
        reason = f"too small: {small.nbytes} bytes at {tensor.bits} bits, {values.nbytes} in float"
        return FloatWeight(values=values, reason=reason)
    return _narrowed(small) if isinstance(small, PalettizedWeight) else small


def _palette(values: npt.NDArray[Any], tensor: TensorPlan, how: _How) -> Artifact:
    return palettize(values, tensor.bits, tensor.rows_per_lut, how.axis)


def _palette_int8(values: npt.NDArray[Any], tensor: TensorPlan, how: _How) -> Artifact:
    def made(*, per_channel: bool) -> PalettizedWeight:
        return palettize_int8(
            values, tensor.bits, tensor.rows_per_lut, how.axis,
            reduce_range=how.reduce_range, per_channel=per_channel,
        )  # fmt: skip

    by_channel = made(per_channel=True)
    if not how.one_scale:
        return by_channel
    whole = made(per_channel=False)
    return whole if _error(whole, values) <= _AS_GOOD * _error(by_channel, values) else by_channel


def _vectors(values: npt.NDArray[Any], tensor: TensorPlan, how: _How) -> Artifact:
    if values.size % tensor.vector_dim:
        raise ConfigError(
            f"{tensor.name}: vector_dim = {tensor.vector_dim} ({tensor.origins['vector_dim']}) must divide the "
            f"{values.size} weights, of shape {list(values.shape)}: give it another in a plan "
            f'([name."{tensor.name}"] vector_dim = 1).'
        )
    return palettize_vectors(values, tensor.bits, tensor.vector_dim, how.axis)


def _uniform(values: npt.NDArray[Any], tensor: TensorPlan, how: _How) -> Artifact:
    return round_to_nearest(values, tensor.bits, how.axis, reduce_range=how.reduce_range, clip=tensor.bits < _UNCLIPPED)


def _error(small: Artifact, values: npt.NDArray[Any]) -> float:
    return float(np.square(small.dequantize().astype(np.float64) - values).sum())


_MAKERS: Final[Mapping[Codes, Callable[[npt.NDArray[Any], TensorPlan, _How], Artifact]]] = {
    "palette": _palette,
    "int8 palette": _palette_int8,
    "vectors": _vectors,
    "uniform": _uniform,
}


def _narrowed(weight: PalettizedWeight) -> PalettizedWeight:
    """The same weight at the fewest bits that hold its codes: one with few distinct values needs no more."""
    entries = weight.lut.shape[1]
    bits = max(1, (entries - 1).bit_length())
    if bits == weight.bits:
        return weight
    return replace(weight, bits=bits)


def _by_position(model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    import inspect

    names = list(inspect.signature(model.forward).parameters)
    if len(example_inputs) > len(names):
        raise ConfigError(f"The model's forward takes {len(names)} inputs, got {len(example_inputs)} example inputs.")
    return dict(zip(names, example_inputs, strict=False))


def _numpy(value: torch.Tensor) -> npt.NDArray[Any]:
    value = value.detach().cpu().contiguous()
    if value.dtype == torch.bfloat16:
        import ml_dtypes

        bits: npt.NDArray[Any] = value.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: npt.NDArray[Any] = value.numpy()
    return array


def _lazy(value: torch.Tensor) -> LazyArray:
    return LazyArray(tuple(value.shape), str(value.dtype).removeprefix("torch."), lambda: np.asarray(_numpy(value)))
