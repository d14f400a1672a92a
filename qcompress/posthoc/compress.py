"""Post-hoc compression: a float program and a plan in, a compressed model out."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from qcompress.artifacts import Artifact, FloatWeight, PalettizedWeight
from qcompress.batchnorm import fold_batchnorm
from qcompress.compressed import CompressedModel
from qcompress.errors import ConfigError, SourceError
from qcompress.layers import weight_layers
from qcompress.palettes.scalar import palettize
from qcompress.plan import Plan, ResolvedPlan, TensorPlan, resolve
from qcompress.program import FloatProgram
from qcompress.sources.base import LazyArray, ProgramOptions, SourceTensor
from qcompress.tracing import from_module

_FOLDING_TOLERANCE: Final = 1e-2
_PARAMETRIZED: Final = ".parametrizations."

Track = Callable[[Iterable[str]], Iterable[str]]


def compress(
    model: torch.nn.Module,
    plan: Plan,
    *,
    example_inputs: tuple[torch.Tensor, ...] | Mapping[str, torch.Tensor] | None = None,
) -> CompressedModel:
    """Compress a module without training.

    Args:
        model: traced by torch.export; not modified.
        plan: what to do with which weight.
        example_inputs: one example batch, by position or by name.

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
    if example_inputs is None:
        raise ConfigError("compress must have example_inputs=(x,): one batch that the model can be traced with.")
    named = example_inputs if isinstance(example_inputs, Mapping) else _by_position(model, example_inputs)
    inputs = {name: value.detach().cpu().numpy() for name, value in named.items()}
    return compress_program(from_module(model, ProgramOptions(inputs=inputs)), plan)


def compress_program(
    program: FloatProgram, plan: Plan, *, source_digest: str = "", track: Track = iter
) -> CompressedModel:
    """Compress a program; see `compress`.

    Args:
        program: as it came in, BatchNorm not folded.
        plan: what to do with which weight.
        source_digest: short digest of the model file.
        track: passes the names of the tensors on while they are compressed: a progress bar.
    """
    check_finite(program)
    resolved = resolve(plan, program_tensors(program))
    folded = fold_batchnorm(program)
    check_finite(folded)
    _check_same_function(program, folded)
    layers = weight_layers(folded)
    by_name = {t.name: t for t in resolved.tensors}
    state = {name: _numpy(value) for name, value in folded.state().items()}
    artifacts: dict[str, Artifact] = {}
    for name in track(state):
        layer = layers.get(name)
        artifacts[name] = _artifact(state[name], by_name.get(name), 0 if layer is None else layer.axis)
    return CompressedModel(
        program=folded,
        artifacts=artifacts,
        plan=resolved.as_plan(),
        plan_digest=resolved.digest,
        source_digest=source_digest,
        notes=folded.notes,
    )


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


def _artifact(values: npt.NDArray[Any], tensor: TensorPlan | None, axis: int) -> Artifact:
    """One tensor by its plan; float where that is smaller."""
    if tensor is None or tensor.settings is None:
        reason = None if tensor is None else tensor.reason
        if tensor is not None and _PARAMETRIZED in tensor.name:
            reason = "part of a parametrization: torch.nn.utils.parametrize.remove_parametrizations makes it a weight"
        return FloatWeight(values=values, reason=reason or "not a weight")
    small = palettize(values, tensor.bits, tensor.rows_per_lut, axis)
    if small.nbytes >= values.nbytes:
        reason = f"too small: {small.nbytes} bytes at {tensor.bits} bits, {values.nbytes} in float"
        return FloatWeight(values=values, reason=reason)
    return _narrowed(small)


def _narrowed(weight: PalettizedWeight) -> PalettizedWeight:
    """The same weight at the fewest bits that hold its codes: one with few distinct values needs no more."""
    entries = weight.lut.shape[1]
    bits = max(1, (entries - 1).bit_length())
    if bits == weight.bits:
        return weight
    return PalettizedWeight(
        codes=weight.codes, lut=weight.lut, bits=bits, axis=weight.axis, rows_per_lut=weight.rows_per_lut
    )


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
