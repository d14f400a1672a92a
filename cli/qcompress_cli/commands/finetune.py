"""`qcompress finetune MODEL --data train.npz -o ckpt/`: train a model with quantized weights."""

import copy
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
from qcompress.errors import ConfigError, DivergenceError
from qcompress.files import check_writable, write_whole
from qcompress.plan.plan import Plan
from qcompress.plan.settings import Settings
from qcompress.sources.base import Source, SourceOptions
from qcompress_cli.commands import finetune_report
from qcompress_cli.inputs import options
from qcompress_cli.inputs.finetune_options import FinetuneOptions, finetune_options
from qcompress_cli.inputs.open_model import open_model
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

    Where the data has labels they are learned; else, or with --kd-weight, the outputs of MODEL itself. The folder
    holds checkpoints: --resume goes on with a run that was interrupted, to the same weights bit for bit on a CPU.
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
        validation: how epochs are compared; None: there is no such data.
        teacher: takes the inputs by name; None: labels are learned.
        original: the metric of the float model; None: there is no validation data.
    """

    prepared: "Prepared"
    batches: "TrainingBatches"
    settings: "Training"
    validation: "Validation | None"
    teacher: "torch.nn.Module | None"
    original: float | None


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
    settings, teacher = task.settings, task.teacher
    plan = replace(plan, training=settings)
    for note in task.prepared.notes:
        ui.note(note)
    if wanted.dry_run:
        ui.emit({"format_version": 1, "settings": settings.given()})
        ui.show(*finetune_report.dry_run(settings, task.prepared, len(task.batches)))
        return
    if processes.is_first:
        start_folder(folder, _identity(plan, wanted, task, source), resume=wanted.resume)
    if wanted.save_plan is not None and processes.is_first:
        write_whole(wanted.save_plan, plan.to_toml().encode())
        ui.wrote(wanted.save_plan)
    trainer = Trainer(
        task.prepared,
        recipes.loop_config(settings),
        len(task.batches),
        _objective(settings),
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
            _train(run, settings, ui)
        except Interruption:
            again = shlex.join(["qcompress", *_arguments(), *([] if wanted.resume else ["--resume"])])
            ui.note(f"interrupted: the checkpoint in {folder} is at step {run.step:,} of {run.total:,}. Next: {again}")
            click.get_current_context().exit(INTERRUPTED)
        except DivergenceError as e:
            raise DivergenceError(f"{e} The last checkpoint in {folder} is good.") from None
    processes.close()
    if not processes.is_first:
        return
    ui.wrote(folder)
    done = finetune_report.Done(
        folder, settings, tuple(run.rows), run.best_epoch, task.original, given.metric or "top1"
    )
    write_whole(folder / "curves.svg", finetune_report.curves(done).encode())
    ui.emit(done.as_dict())
    ui.show(*done.tables(), *done.lines(given.data or ""))


def _check(wanted: FinetuneOptions, given: RunOptions) -> Path:
    """Refuse what cannot work, before anything is imported; return the folder."""
    missing = []
    if given.data is None:
        missing.append("training data: --data train.npz (x, and y where there are labels)")
    if given.output is None and not wanted.dry_run:
        missing.append("a folder for the run: -o ckpt")
    if missing:
        raise ConfigError(f"finetune needs {', and '.join(missing)}.")
    folder = given.output or Path("ckpt")
    if not wanted.dry_run:
        if folder.is_file():
            raise ConfigError(f"-o {folder} is a file: finetune writes a folder; name another one.")
        if not (folder / "run.json").exists():
            check_writable(folder / "probe" if folder.is_dir() else folder, flag="-o")
        elif not wanted.resume:
            raise ConfigError(
                f"{folder} holds a training run: go on with it by --resume, or name another folder by -o."
            )
    if wanted.save_plan is not None:
        check_writable(wanted.save_plan, force=given.force, flag="--save-plan")
    return folder


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
    methods, regularizers = recipes.methods(settings), recipes.regularizers(settings)
    module = module_of(source, _source_options(given), untrained=settings.from_scratch)
    if settings.from_scratch and module is None:
        raise ConfigError("--from-scratch needs the architecture of the model: add --arch module:factory.")
    # The program may share tensors with the module that it is traced from; the one that trains is another.
    traced = source if module is None else load_source(copy.deepcopy(module).eval())
    program = open_program(traced, given, ui)
    if module is None:
        ui.note("MODEL is a graph: BatchNorm keeps its statistics, and dropout stays off, as export left them.")
    teacher = _teacher(settings, program, given, ui)
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
        classes=_classes(program, settings, data),
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
    validation, original = _validation(wanted, given, program, where)
    return _Task(prepared, batches, settings, validation, None if teacher is None else teacher.to(where), original)


def _source_options(given: RunOptions) -> SourceOptions:
    return SourceOptions(
        arch=given.arch,
        arch_kwargs=given.arch_kwargs,
        allow_classes=given.allow_class,
        trust_pickle=given.trust_pickle,
    )


def _teacher(settings: "Training", program: "FloatProgram", given: RunOptions, ui: Ui) -> "torch.nn.Module | None":
    from qcompress.finetune.held import Teacher
    from qcompress.openers import load_source

    if settings.teacher == "none":
        return None
    if settings.teacher == "self":
        return Teacher(program)
    path = Path(settings.teacher)
    if not path.exists():
        raise ConfigError(f"--teacher must be self, none or a model file, but {path} does not exist.")
    found = Teacher(open_program(load_source(path, options=_source_options(given)), given, ui))
    if found.input_names != program.input_names:
        raise ConfigError(
            f"--teacher {path} takes {', '.join(found.input_names)}, the model {', '.join(program.input_names)}: both "
            "need the same inputs."
        )
    return found


def _classes(program: "FloatProgram", settings: "Training", data: "DataReader") -> int | None:
    """Return how many classes labels can name; None where the loss is not about classes."""
    uses_labels = settings.teacher == "none" or settings.kd_weight < 1
    if settings.loss != "cross_entropy" or not data.has_labels or not uses_labels:
        return None
    outputs = program.run(data.example())
    shape = next(iter(outputs.values())).shape
    return shape[1] if len(shape) > 1 else None


def _objective(settings: "Training") -> "Objective":
    from functools import partial

    from qcompress.data.samples import find_function
    from qcompress.finetune.losses import Objective, cross_entropy, distillation, squared_error

    known: dict[str, Loss] = {"cross_entropy": cross_entropy, "mse": squared_error}
    task = known.get(settings.loss) or find_function(settings.loss, "--loss")[1]
    distance = squared_error if settings.loss == "mse" else partial(distillation, temperature=settings.temperature)
    return Objective(task, distance, settings.kd_weight)


def _validation(
    wanted: FinetuneOptions, given: RunOptions, program: "FloatProgram", where: str
) -> tuple["Validation | None", float | None]:
    if wanted.val is None:
        return None, None
    from qcompress.data.dataset import load_data
    from qcompress.finetune.run import Validation
    from qcompress.finetune.scoring import score, scorer
    from qcompress.metrics.metric import load_metric

    data = load_data(wanted.val, transform=given.transform, what="--val")
    if data.labels is None:
        raise ConfigError(f"--val {wanted.val} needs labels, to compare epochs by the metric; add them as y.")
    metric = load_metric(given.metric or "top1", lower_is_better=given.lower_is_better)
    original = score(program.runner(where), data, metric)
    return Validation(score=scorer(program, data, metric, where), lower_is_better=metric.lower_is_better), original


def _identity(plan: Plan, wanted: FinetuneOptions, task: _Task, source: Source) -> dict[str, Any]:
    """Return what a run with --resume must have in common with the one that it goes on with."""
    return {
        "version": 1,
        "model": source.sha256[:11],
        "data": task.batches.fingerprint,
        "seed": wanted.seed,
        "max_time": wanted.max_time,
        "plan": plan.to_toml(),
    }


def _train(run: "Run", settings: "Training", ui: Ui) -> None:
    epochs = len(run.rows)
    with ui.bar(run.step, run.total) as update:
        for record in run.steps():
            if len(run.rows) > epochs:
                epochs = len(run.rows)
                ui.note(finetune_report.epoch_line(run.rows[-1], settings.epochs, run.seconds))
            if record.step % _SHOWN_EVERY == 0:  # reading a loss waits for the device
                update(run.step, run.total, f"epoch {record.epoch + 1}, loss {record.loss:.4g}")


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
