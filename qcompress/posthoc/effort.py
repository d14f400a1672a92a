"""How much work post-hoc compression does: on which inputs weights are solved, and whether all layers are tuned."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from qcompress.artifacts import Artifact
from qcompress.compressed.model import CompressedModel
from qcompress.data.dataset import Dataset
from qcompress.errors import ConfigError
from qcompress.graph.marks import mark
from qcompress.graph.program import Arrays, FloatProgram
from qcompress.plan.resolve import TensorPlan
from qcompress.posthoc.activations import BATCH, whole_batches
from qcompress.posthoc.settings import Effort, PosthocSettings
from qcompress.posthoc.solve import Solved, SolveSettings, solve_weights
from qcompress.posthoc.synthesis import synthesize
from qcompress.posthoc.tune import output_error, tune
from qcompress.progress import ON_CPU, Execution

_HELD_BACK: Final = 8  # one batch in so many is held back to check whether tuning helps


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs that weights are solved on.

    Args:
        data: the inputs; None: weights stay at their nearest levels.
        effort: the requested effort, or the highest one that the inputs allow.
        is_synthetic: whether the inputs were synthesised.
        notes: for the user.
    """

    data: Dataset | None
    effort: Effort
    is_synthetic: bool = False
    notes: tuple[str, ...] = ()


def inputs_for(
    program: FloatProgram,
    calibration: Dataset | None,
    settings: PosthocSettings,
    execution: Execution = ON_CPU,
) -> Inputs:
    """Return the inputs to solve weights on: calibration data, or inputs synthesised from the model's BatchNorms.

    Args:
        program: as it came in, BatchNorm not folded.
        calibration: unlabelled inputs.
        settings: the effort, whether inputs may be synthesised, and their seed.
        execution: where the program runs; tracks steps.

    Raises:
        ConfigError: the effort needs inputs, and there are none.
    """
    effort, synthetic = settings.effort, settings.synthetic
    if effort == "fast":
        return Inputs(None, "fast")
    if calibration is not None:
        return Inputs(calibration, effort or "balanced")
    made = synthesize(program, settings.seed, execution) if synthetic else None
    if made is not None:
        return Inputs(made, effort or "balanced", is_synthetic=True)
    why = "the model has no BatchNorm to synthesise inputs from" if synthetic else "synthesising inputs is switched off"
    if effort is not None:
        raise ConfigError(f'effort "{effort}" needs inputs to solve weights on, but {why}; pass --calibration.')
    note = f"no calibration data, and {why}: each weight is rounded to its nearest level. --calibration improves this."
    return Inputs(None, "fast", notes=(note,))


def solve(
    model: CompressedModel,
    plans: Mapping[str, TensorPlan],
    inputs: Inputs,
    settings: SolveSettings,
    execution: Execution = ON_CPU,
) -> CompressedModel:
    """Return a model with its weights solved; effort `best` then tunes all layers if that helps on held-back inputs.

    Args:
        model: its weights at their nearest levels, its activation grids chosen.
        plans: the plans of its compressed tensors.
        inputs: the inputs and the effort.
        settings: for `solve_weights`.
        execution: where the program runs; tracks layers and steps.
    """
    if inputs.data is None:
        return model
    program, grids = model.program, list(model.activations.values())
    data = whole_batches(program, inputs.data)
    batches = [batch.inputs for batch in data.batches(program.fixed_batch or BATCH)]
    marked = mark(program, list(model.activations)) if grids else program

    def solved(batches: Sequence[Arrays]) -> Solved:
        return solve_weights(marked, plans, model.artifacts, batches, settings, grids=grids, execution=execution)

    def tuned(artifacts: Mapping[str, Artifact], batches: Sequence[Arrays]) -> dict[str, Artifact]:
        return tune(program, artifacts, batches, device=execution.device, track=execution.track)

    found, notes = solved(batches), model.notes
    artifacts = found.artifacts
    if inputs.effort == "best":
        gain = _gain_of_tuning(program, solved, tuned, batches, execution.device)
        notes = (*notes, gain.note)
        artifacts = tuned(artifacts, batches) if gain.pays else artifacts
    source = data.name if inputs.is_synthetic else f"{data.samples:,} samples of {data.name}"
    return replace(model, artifacts=artifacts, gains=tuple(found.gains), solved_on=source, notes=notes)


@dataclass(frozen=True, slots=True)
class _TuningGain:
    """Whether tuning all layers together helps on inputs that it has not seen, and a note for the user."""

    pays: bool
    note: str


def _gain_of_tuning(
    program: FloatProgram,
    solved: Callable[[Sequence[Arrays]], Solved],
    tuned: Callable[[Mapping[str, Artifact], Sequence[Arrays]], dict[str, Artifact]],
    batches: Sequence[Arrays],
    device: str,
) -> _TuningGain:
    held_back, kept = batches[: len(batches) // _HELD_BACK], batches[len(batches) // _HELD_BACK :]
    if not held_back:
        return _TuningGain(False, f'too few inputs to tune on: effort "best" needs at least {_HELD_BACK * BATCH}.')
    found = solved(kept).artifacts
    before, after = (output_error(program, a, held_back, device=device) for a in (found, tuned(found, kept)))
    samples = sum(len(next(iter(batch.values()))) for batch in held_back)
    what = f"squared error of the outputs over their variance on {samples} held-back samples"
    end = "all layers were tuned" if after < before else "tuning does not help, so the solved weights are kept"
    return _TuningGain(after < before, f"{what}: {before:.4f} solved, {after:.4f} tuned; {end}.")
