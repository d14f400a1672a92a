"""What `finetune` trains, on what: MODEL with its quantizers, data, loss, teacher and validation."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qcompress.compressed.source import CompressedSource
from qcompress.errors import ConfigError, DataError
from qcompress.graph.options import ProgramOptions
from qcompress.plan.plan import Plan
from qcompress.sources.base import Source
from qcompress_cli.inputs.finetune_options import FinetuneOptions
from qcompress_cli.inputs.open_model import source_options
from qcompress_cli.inputs.program import open_program
from qcompress_cli.inputs.project import RunOptions
from qcompress_cli.terminal.console import Ui

if TYPE_CHECKING:
    import torch

    from qcompress.data.reader import DataReader
    from qcompress.data.training import TrainingBatches
    from qcompress.finetune.losses import Loss, Objective
    from qcompress.finetune.prepared import Prepared
    from qcompress.finetune.processes import Processes
    from qcompress.finetune.run import Validation
    from qcompress.graph.program import FloatProgram
    from qcompress.plan.training import Training

METRIC: Final = "top1"  # on validation data, if the user names no other
_CALIBRATION: Final = 4  # batches on which quantizers of activations start


@dataclass(frozen=True, slots=True)
class TrainingTask:
    """What is trained, on what.

    Args:
        prepared: the model with its quantizers.
        batches: the training data.
        settings: how it is trained.
        objective: the loss.
        validation: how epochs are compared; None: there is no such data.
        teacher: takes the inputs by name; None: labels are learned.
        original: the metric of the float model; None: there is no validation data.
        compared_on: names the validation data and the metric; None: there is no such data.
    """

    prepared: "Prepared"
    batches: "TrainingBatches"
    settings: "Training"
    objective: "Objective"
    validation: "Validation | None"
    teacher: "torch.nn.Module | None"
    original: float | None
    compared_on: str | None


def training_task(
    plan: Plan, wanted: FinetuneOptions, given: RunOptions, source: Source, processes: "Processes", ui: Ui
) -> TrainingTask:
    """Prepare a model for training, and open its data.

    Args:
        plan: the plan, whose [training] may be incomplete.
        wanted: the options of the command.
        given: those that it shares with others.
        source: the opened MODEL.
        processes: those that train together.
        ui: shows notes.

    Raises:
        ConfigError, DataError: options, data and model do not fit each other.
    """
    from qcompress.data.augment import parse_augment
    from qcompress.data.reader import open_data
    from qcompress.data.training import BatchSettings, TrainingBatches
    from qcompress.finetune import recipes
    from qcompress.finetune.attach import prepare
    from qcompress.openers import load_source
    from qcompress.sources.trainable import module_of

    assert given.data is not None
    data = open_data(given.data, transform=given.transform)
    for note in data.notes:
        ui.note(note)
    settings = recipes.complete(plan.training, plan.default.bits, has_labels=data.has_labels)
    objective = _objective(settings)
    has_activations = any(s.activation_bits for s in (plan.default, *plan.kind.values(), *plan.name.values()))
    methods = recipes.methods(settings, has_activations=has_activations)
    module = module_of(source, source_options(given), untrained=settings.from_scratch)
    if settings.from_scratch and module is None:
        raise ConfigError("--from-scratch needs the architecture of the model: add --arch module:factory.")
    # The program may share tensors with the module that it is traced from, and so may a source; a copy trains.
    given_module, module = module, copy.deepcopy(module)
    traced = source if given_module is None else load_source(given_module.eval())
    # A module trains the tensors that it holds; weights that it computes from them stay computed.
    program = open_program(traced, given, ui, ProgramOptions(computes=module is None))
    if module is None:
        ui.note("MODEL is a graph: BatchNorm keeps its statistics, and dropout stays off, as export left them.")
    outputs = _first_shape(program, data)
    _check_outputs(outputs, settings)
    teacher = _teacher(settings, program, data, given, ui)
    if isinstance(source, CompressedSource):
        small = source.model()
        program = program.with_state({name: a.dequantize() for name, a in small.artifacts.items()})
    where = processes.device
    if module is not None:
        module.to(where)
    batches = TrainingBatches(
        data,
        BatchSettings(
            size=settings.batch_size,
            seed=wanted.seed,
            workers=wanted.workers,
            device=where,
            rank=processes.rank,
            world_size=processes.size,
        ),
        program=program,
        classes=_classes(outputs, settings, data),
        augment=parse_augment(settings.augment) if settings.augment else None,
    )
    batches.check()
    # All processes start from the same batches, which depend on the seed alone.
    whole = TrainingBatches(data, BatchSettings(size=settings.batch_size, seed=wanted.seed), program=program)
    first = [inputs for _, (inputs, _) in zip(range(_CALIBRATION), whole.epoch(0), strict=False)]
    first = [{name: value.to(where) for name, value in inputs.items()} for inputs in first]
    prepared = prepare(
        program if module is None else module,
        plan,
        program=program,
        example_inputs=first[0],
        calibration=first[1:],
        methods=methods,
        regularizers=recipes.regularizers(settings),
        placement=settings.placement,
        batchnorm=settings.batchnorm,
    ).to(where)
    if settings.compile:
        prepared.compile()
    teacher = None if teacher is None else teacher.to(where)
    return TrainingTask(
        prepared, batches, settings, objective, teacher=teacher, **_validation(wanted, given, program, where)
    )


def _first_shape(program: "FloatProgram", data: "DataReader") -> tuple[int, ...]:
    """Return the shape of a model's first output for an example batch."""
    return next(iter(program.run(data.example()).values())).shape


def _check_outputs(shape: tuple[int, ...], settings: "Training") -> None:
    """Refuse outputs from which cross entropy, or the distance from a teacher's classes, teaches nothing."""
    if settings.loss == "cross_entropy" and (len(shape) < 2 or shape[1] < 2):
        raise ConfigError(
            f"--loss cross_entropy needs a score for each class, but the model's first output has shape {list(shape)}; "
            "use --loss mse, or module:fn."
        )


def _teacher(
    settings: "Training", program: "FloatProgram", data: "DataReader", given: RunOptions, ui: Ui
) -> "torch.nn.Module | None":
    from qcompress.finetune.held import Teacher
    from qcompress.openers import load_source

    if settings.teacher == "none":
        return None
    if settings.teacher == "self":
        return Teacher(program)
    path = Path(settings.teacher)
    if not path.exists():
        raise ConfigError(f"--teacher must be self, none or a model file, but {path} does not exist.")
    try:
        taught = open_program(load_source(path, options=source_options(given)), given, ui)
    except DataError as e:
        raise DataError(f"--teacher {path} must take the inputs of the model: {e}") from None
    is_same = set(taught.input_names) == set(program.input_names)
    if not is_same and len(taught.input_names) != len(program.input_names):
        raise ConfigError(
            f"--teacher {path} must take the inputs of the model, {', '.join(program.input_names)}, but it takes "
            f"{', '.join(taught.input_names)}; name another teacher."
        )
    wanted, shape = _first_shape(program, data), _first_shape(taught, data)
    if shape != wanted:
        raise ConfigError(
            f"--teacher {path} must have outputs of the model's shape, {list(wanted)}, but they have shape "
            f"{list(shape)}; name another teacher."
        )
    return Teacher(taught, taught.input_names if is_same else program.input_names)


def _classes(outputs: tuple[int, ...], settings: "Training", data: "DataReader") -> int | None:
    """Return how many classes labels can name; None where labels are not used, or are not classes."""
    uses_labels = settings.teacher == "none" or settings.kd_weight < 1
    return outputs[1] if settings.loss == "cross_entropy" and data.has_labels and uses_labels else None


def _objective(settings: "Training") -> "Objective":
    from functools import partial

    from qcompress.data.samples import find_function
    from qcompress.finetune.losses import Objective, cross_entropy, distillation, squared_error

    known: dict[str, Loss] = {"cross_entropy": cross_entropy, "mse": squared_error}
    task = known.get(settings.loss) or find_function(settings.loss, "--loss")[1]
    distance = squared_error if settings.loss == "mse" else partial(distillation, temperature=settings.temperature)
    return Objective(_named(task, settings.loss), distance, settings.kd_weight)


def _named(task: "Loss", name: str) -> "Loss":
    """Return a loss whose failures are one message about the user's labels or function."""
    import torch

    from qcompress.user_code import one_line

    def loss(outputs: Any, target: Any) -> "torch.Tensor":
        try:
            found = task(outputs, target)
        except Exception as e:
            raise DataError(f"--loss {name} failed with the model's outputs and the labels: {one_line(e)}.") from e
        if not isinstance(found, torch.Tensor) or found.ndim or not found.requires_grad:
            got = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise DataError(f"--loss {name} must return a tensor of shape [] that depends on the outputs, got {got}.")
        return found

    return loss


def _validation(wanted: FinetuneOptions, given: RunOptions, program: "FloatProgram", where: str) -> dict[str, Any]:
    """Return the fields of `TrainingTask` that validation data decides."""
    if wanted.val is None:
        return {"validation": None, "original": None, "compared_on": None}
    from qcompress.data.dataset import load_data
    from qcompress.finetune.scoring import Scorer
    from qcompress.metrics.metric import load_metric

    data = load_data(wanted.val, transform=given.transform, what="--val")
    if data.labels is None:
        raise ConfigError(f"--val {wanted.val} needs labels, to compare epochs by the metric; add them as y.")
    metric = load_metric(given.metric or METRIC, lower_is_better=given.lower_is_better)
    scorer = Scorer(program, data, metric, where)
    return {
        "validation": scorer,
        "original": scorer.original,
        "compared_on": f"{data.digest} {metric.name} {metric.lower_is_better}",
    }
