"""`qcompress finetune MODEL --data train.npz -o ckpt/`: train a model with quantized weights."""

import copy
import os
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from qcompress.compressed.source import CompressedSource
from qcompress.errors import ConfigError, DataError, DivergenceError, OutputError
from qcompress.files import check_writable, write_whole
from qcompress.plan.plan import Plan
from qcompress.plan.settings import Settings
from qcompress.sources.base import Source
from qcompress_cli.commands import finetune_report
from qcompress_cli.inputs import options
from qcompress_cli.inputs.finetune_options import FinetuneOptions, finetune_options
from qcompress_cli.inputs.open_model import open_model, source_options
from qcompress_cli.inputs.program import device, open_program
from qcompress_cli.inputs.project import RunOptions, run_options
from qcompress_cli.terminal.console import Ui
from qcompress_cli.terminal.exits import INTERRUPTED

if TYPE_CHECKING:
    import torch

    from qcompress.data.reader import DataReader
    from qcompress.data.training import TrainingBatches
    from qcompress.finetune.losses import Loss, Objective
    from qcompress.finetune.prepared import Prepared
    from qcompress.finetune.processes import Processes
    from qcompress.finetune.run import Run, Validation
    from qcompress.graph.program import FloatProgram
    from qcompress.plan.training import Training

_METRIC: Final = "top1"
_SHOWN_EVERY: Final = 10  # steps
_CALIBRATION: Final = 4  # batches on which quantizers of activations start


@options.command("finetune")
@options.model_argument
@finetune_options()
@options.source_options
@options.input_options
@options.metric_options
@click.option("-o", "--output", metavar="DIR", type=options.PATH, help="The folder of the run.")
@options.common_options
def command(json: bool, quiet: bool, **params: Any) -> None:
    """Train MODEL with quantized weights, and leave a folder that export takes.

    The outputs of MODEL itself are learned, and with --kd-weight below 1 the labels too; with --teacher none the labels
    alone. The folder holds checkpoints: --resume beside the same command goes on with a run that was interrupted, to
    the same weights bit for bit on a CPU.
    """
    ui = Ui(json=json, quiet=quiet)
    _finetune(FinetuneOptions.of(params), run_options(params), ui)


@dataclass(frozen=True, slots=True)
class _Task:
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


def _finetune(wanted: FinetuneOptions, given: RunOptions, ui: Ui) -> None:
    folder = _check(wanted, given)
    source = open_model(given, ui)
    plan = _plan(wanted, given, source)

    import torch

    from qcompress.finetune import recipes
    from qcompress.finetune.processes import Processes
    from qcompress.finetune.run import Interruption, Pace, Run
    from qcompress.finetune.run_folder import start_folder
    from qcompress.finetune.trainer import Trainer

    processes = Processes.launched(device(given))
    if not processes.is_first:
        ui = Ui(quiet=True, silent=True)
    torch.manual_seed(wanted.seed + processes.rank)
    task = _task(plan, wanted, given, source, processes, ui)
    settings, teacher, metric = task.settings, task.teacher, given.metric or _METRIC
    plan = replace(plan, training=settings)
    for note in task.prepared.notes:
        ui.note(note)
    if not recipes.is_tuned(settings, plan.default.bits) and plan.default.bits is not None:
        ui.note(f"The defaults of {settings.method} at {plan.default.bits} bits are untuned; compare a few of --rate.")
    if wanted.dry_run:
        ui.emit(finetune_report.Done(None, settings, (), None, task.original, metric).as_dict())
        ui.show(*finetune_report.dry_run(settings, task.prepared, len(task.batches)))
        return
    if processes.is_first:
        start_folder(folder, _identity(plan, wanted, task, source))
    if wanted.save_plan is not None and processes.is_first:
        write_whole(wanted.save_plan, plan.to_toml().encode())
        ui.wrote(wanted.save_plan)
    trainer = Trainer(
        task.prepared,
        recipes.loop_config(settings),
        len(task.batches),
        task.objective,
        forward=lambda model, inputs: model(**inputs),
        teacher=None if teacher is None else lambda inputs: teacher(**inputs),
        average=processes.average if processes.size > 1 else None,
    )
    steps, seconds = wanted.checkpoint_every
    pace = Pace(steps=steps, seconds=seconds, keep=wanted.keep, most_seconds=wanted.max_time)
    with _stop_on_signals() as stop:
        run = Run(
            trainer, task.batches, folder, pace, validation=task.validation, reestimate=settings.reestimate,
            stop=stop.is_set, saves_float=settings.method == "none", processes=processes,
        )  # fmt: skip
        if wanted.resume and run.resume():
            ui.note(f"going on at step {run.step:,} of {run.total:,}")
        try:
            _train(run, metric, ui)
        except Interruption:
            again = shlex.join(["qcompress", *_arguments(), *([] if wanted.resume else ["--resume"])])
            click.echo(f"interrupted: {folder} is at step {run.step:,} of {run.total:,}.\nNext: {again}", err=True)
            click.get_current_context().exit(INTERRUPTED)
        except DivergenceError as e:
            raise DivergenceError(f"{e} {_left_by(folder)}") from None
    processes.close()
    if not processes.is_first:
        return
    ui.wrote(folder)
    done = finetune_report.Done(folder, settings, tuple(run.rows), run.best_epoch, task.original, metric, run.errors)
    write_whole(folder / "curves.svg", finetune_report.curves(done).encode())
    ui.emit(done.as_dict())
    ui.show(*done.tables(), *done.lines())


def _check(wanted: FinetuneOptions, given: RunOptions) -> Path:
    """Refuse what cannot work, before anything is imported; return the folder."""
    missing = []
    has_bits = given.bits is not None or given.plan is not None or wanted.training["method"] == "none"
    if not has_bits and not (given.model is not None and given.model.is_dir()):
        missing.append("bits per weight: --bits N (or --plan FILE, or --method none)")
    if given.data is None:
        missing.append("training data: --data train.npz (x, and y where there are labels)")
    if given.output is None and not wanted.dry_run:
        missing.append("a folder for the run: -o ckpt")
    if missing:
        raise ConfigError(f"finetune needs {'; '.join(missing)}.")
    folder = given.output or Path("ckpt")
    if not wanted.dry_run and os.environ.get("RANK", "0") == "0":  # the first of several processes makes the folder
        _check_folder(folder, resume=wanted.resume)
    if wanted.save_plan is not None:
        inputs = [path for path in (given.model, given.plan) if path is not None]
        check_writable(wanted.save_plan, force=given.force or wanted.resume, inputs=inputs, flag="--save-plan")
    return folder


def _check_folder(folder: Path, *, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"-o {folder} must be a folder, but it is a file: name another one.")
    check_writable(folder / "run" if folder.is_dir() else folder, flag="-o")
    if (folder / "run.json").exists():
        if not resume:
            raise OutputError(f"{folder} holds a training run: add --resume to go on with it, or name another by -o.")
    elif folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise OutputError(f"{folder} holds other files than those of a training run: name another folder by -o.")


def _plan(wanted: FinetuneOptions, given: RunOptions, source: Source) -> Plan:
    plan = wanted.plan(given.plan, given.bits)
    if plan.training.method == "none":
        if given.bits is not None or plan.kind or plan.name:
            raise ConfigError(
                "--method none trains the float model: remove --bits, --ends and other tables of the plan."
            )
        return replace(plan, default=Settings(skip=True))
    if isinstance(source, CompressedSource) and not (plan.default.given() or plan.kind or plan.name):
        return replace(source.model().plan, training=plan.training)
    if plan.default.bits is None and not (plan.kind or plan.name):
        raise ConfigError("finetune needs the bits per weight: add --bits N, or --plan FILE, or --method none.")
    return plan


def _task(
    plan: Plan, wanted: FinetuneOptions, given: RunOptions, source: Source, processes: "Processes", ui: Ui
) -> _Task:
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
    methods, regularizers = recipes.methods(settings), recipes.regularizers(settings)
    module = module_of(source, source_options(given), untrained=settings.from_scratch)
    if settings.from_scratch and module is None:
        raise ConfigError("--from-scratch needs the architecture of the model: add --arch module:factory.")
    # The program may share tensors with the module that it is traced from; the one that trains is another.
    traced = source if module is None else load_source(copy.deepcopy(module).eval())
    program = open_program(traced, given, ui)
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
        regularizers=regularizers,
        placement=settings.placement,
        batchnorm=settings.batchnorm,
    ).to(where)
    if settings.compile:
        prepared.compile()
    teacher = None if teacher is None else teacher.to(where)
    return _Task(prepared, batches, settings, objective, teacher=teacher, **_validation(wanted, given, program, where))


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
    """Return the fields of `_Task` that validation data decides."""
    if wanted.val is None:
        return {"validation": None, "original": None, "compared_on": None}
    from qcompress.data.dataset import load_data
    from qcompress.finetune.run import Validation
    from qcompress.finetune.scoring import score, scorer
    from qcompress.metrics.metric import load_metric

    data = load_data(wanted.val, transform=given.transform, what="--val")
    if data.labels is None:
        raise ConfigError(f"--val {wanted.val} needs labels, to compare epochs by the metric; add them as y.")
    metric = load_metric(given.metric or _METRIC, lower_is_better=given.lower_is_better)
    original = score(program.runner(where), data, metric)
    found = Validation(score=scorer(program, data, metric, where), lower_is_better=metric.lower_is_better)
    return {
        "validation": found,
        "original": original,
        "compared_on": f"{data.digest} {metric.name} {metric.lower_is_better}",
    }


def _identity(plan: Plan, wanted: FinetuneOptions, task: _Task, source: Source) -> dict[str, Any]:
    """Return what a run with --resume must have in common with the one that it goes on with."""
    return {
        "version": 1,
        "model": source.sha256[:11],
        "seed": wanted.seed,  # before the data, whose fingerprint depends on it
        "data": task.batches.fingerprint,
        "val": task.compared_on,
        "max_time": wanted.max_time,
        "plan": plan.to_toml(),
    }


def _train(run: "Run", metric: str, ui: Ui) -> None:
    epochs = len(run.rows)
    with ui.bar(run.step, run.total) as update:
        for record in run.steps():
            if len(run.rows) > epochs:
                epochs = len(run.rows)
                ui.note(finetune_report.epoch_line(run.rows[-1], run.epochs, run.seconds, metric))
            if record.step % _SHOWN_EVERY == 0:  # reading a loss waits for the device
                update(run.step, run.total, f"epoch {record.epoch + 1}, loss {record.loss:.4g}")


def _left_by(folder: Path) -> str:
    """Return what a run that diverged leaves, and what to type."""
    from qcompress.compressed.folder import WEIGHTS
    from qcompress.finetune.run_folder import FLOAT

    if not any((folder / name).exists() for name in (WEIGHTS, FLOAT)):
        return f"There was no checkpoint yet: remove {folder} or name another folder by -o."
    return f"The checkpoint in {folder} is good: export it, or pass {folder} as MODEL with another -o to go on from it."


def _arguments() -> list[str]:
    return list(click.get_current_context().find_root().obj)


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into an event; the second one acts as before."""
    event = threading.Event()
    before: dict[signal.Signals, Any] = {}

    def stop(number: int, frame: object) -> None:
        event.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.getsignal(number)
        signal.signal(number, stop)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
