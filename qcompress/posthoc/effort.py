"""How hard weights are tried: on which inputs they are solved, and whether all layers are tuned together after it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

from qcompress.artifacts import Artifact
from qcompress.compressed.model import CompressedModel
from qcompress.data.dataset import Dataset
from qcompress.deployment import Compute
from qcompress.errors import ConfigError
from qcompress.graph.program import Arrays, FloatProgram
from qcompress.graph.sites import mark
from qcompress.plan.resolve import TensorPlan
from qcompress.posthoc.activations import BATCH, whole_batches
from qcompress.posthoc.solve import Solved, SolveSettings, solve_weights
from qcompress.posthoc.synthesis import synthesize
from qcompress.posthoc.tune import output_error, tune
from qcompress.progress import Track, untracked

Effort = Literal["fast", "balanced", "best"]

_HELD_BACK: Final = 8  # one batch of so many says whether tuning helped


def check_effort(effort: Effort | None, compute: Compute) -> None:
    """Refuse another word, and one that is not for what layers compute in.

    Raises:
        ConfigError: names those that there are.
    """
    if effort not in (None, *get_args(Effort)):
        raise ConfigError(f"effort must be one of {', '.join(get_args(Effort))}, got {effort!r}.")
    if effort == "best" and compute != "float":
        raise ConfigError(f"effort best tunes weights for compute float alone, got compute {compute}: take balanced.")


@dataclass(frozen=True, slots=True)
class Inputs:
    """What weights are solved on.

    Args:
        data: None: nothing, weights stay at their nearest levels.
        effort: as it was asked for, or what can be done.
        is_synthetic: whether the data was made for this.
        notes: what a user should be told.
    """

    data: Dataset | None
    effort: Effort
    is_synthetic: bool = False
    notes: tuple[str, ...] = ()


def inputs_for(
    program: FloatProgram,
    calibration: Dataset | None,
    effort: Effort | None,
    *,
    synthetic: bool = True,
    seed: int = 0,
    device: str = "cpu",
    track: Track = untracked,
) -> Inputs:
    """Inputs to solve weights on: calibration data, or else some that the model's BatchNorms tell of.

    Args:
        program: as it came in, BatchNorm not folded.
        calibration: unlabelled inputs.
        effort: None: balanced where there are inputs.
        synthetic: whether inputs may be synthesised.
        seed: of synthesised inputs.
        device: where the program runs.
        track: passes steps on: a progress bar.

    Raises:
        ConfigError: an effort that must have inputs, and there are none.
    """
    if effort == "fast":
        return Inputs(None, "fast")
    if calibration is not None:
        return Inputs(calibration, effort or "balanced")
    made = synthesize(program, seed=seed, device=device, track=track) if synthetic else None
    if made is not None:
        return Inputs(made, effort or "balanced", is_synthetic=True)
    why = "the model has no BatchNorm to synthesise any from" if synthetic else "none are synthesised"
    if effort is not None:
        raise ConfigError(f"effort {effort} must have inputs to solve weights on, and {why}: give --calibration.")
    note = f"no calibration data, and {why}: each weight goes to its nearest level. --calibration solves them."
    return Inputs(None, "fast", notes=(note,))


def solve(
    small: CompressedModel,
    plans: Mapping[str, TensorPlan],
    inputs: Inputs,
    settings: SolveSettings,
    *,
    device: str = "cpu",
    track: Track = untracked,
) -> CompressedModel:
    """A model whose weights went to their nearest levels, solved.

    Args:
        small: the model, its activations quantized where they shall be.
        plans: of the tensors that are compressed.
        inputs: to solve them on, and how hard: effort best then tunes all layers together, where inputs that were held
            back say that it pays.
        settings: of `solve_weights`.
        device: where the program runs.
        track: passes layers and steps on: a progress bar.
    """
    if inputs.data is None:
        return small
    program, grids = small.program, list(small.activations.values())
    data = whole_batches(program, inputs.data)
    batches = [batch.inputs for batch in data.batches(program.fixed_batch or BATCH)]
    marked = mark(program, list(small.activations)) if grids else program

    def solved(batches: Sequence[Arrays]) -> Solved:
        return solve_weights(marked, plans, small.artifacts, batches, settings, grids=grids, device=device, track=track)

    def tuned(artifacts: Mapping[str, Artifact], batches: Sequence[Arrays]) -> dict[str, Artifact]:
        return tune(program, artifacts, batches, device=device, track=track)

    found, notes = solved(batches), small.notes
    artifacts = found.artifacts
    if inputs.effort == "best":
        gain = _gain_of_tuning(program, solved, tuned, batches, device)
        notes = (*notes, gain.note)
        artifacts = tuned(artifacts, batches) if gain.pays else artifacts
    source = data.name if inputs.is_synthetic else f"{data.samples:,} samples of {data.name}"
    return replace(small, artifacts=artifacts, gains=tuple(found.gains), solved_on=source, notes=notes)


@dataclass(frozen=True, slots=True)
class _TuningGain:
    """Whether tuning all layers together pays on inputs that it has not seen, and what a user should be told."""

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
        return _TuningGain(False, f"too few inputs to tune on: effort best takes {_HELD_BACK * BATCH} or more.")
    found = solved(kept).artifacts
    before, after = (output_error(program, a, held_back, device=device) for a in (found, tuned(found, kept)))
    samples = sum(len(next(iter(batch.values()))) for batch in held_back)
    what = f"error of the outputs over their variance on {samples} samples that were held back"
    end = "so all layers were tuned" if after < before else "no gain, so all stays as it was solved"
    return _TuningGain(after < before, f"{what}: {before:.4f} solved, {after:.4f} tuned together; {end}.")
