"""`qcompress finetune MODEL --data train.npz -o ckpt/`: train a model with quantized weights."""

import os
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from qcompress.artifacts import PalettizedWeight
from qcompress.compressed.source import CompressedSource
from qcompress.errors import ConfigError, DivergenceError, OutputError
from qcompress.files import check_writable, write_whole
from qcompress.plan.plan import Plan
from qcompress.plan.settings import Settings
from qcompress.plan.training import Training
from qcompress.sources.base import Source
from qcompress_cli.commands import finetune_report
from qcompress_cli.inputs import options
from qcompress_cli.inputs.finetune_options import FinetuneOptions, finetune_options
from qcompress_cli.inputs.open_model import open_model, source_options
from qcompress_cli.inputs.program import device
from qcompress_cli.inputs.project import RunOptions, run_options
from qcompress_cli.inputs.training_task import METRIC, TrainingTask, training_task
from qcompress_cli.terminal.console import Ui
from qcompress_cli.terminal.exits import INTERRUPTED

if TYPE_CHECKING:
    from qcompress.finetune.processes import Processes
    from qcompress.finetune.run import Run

_SHOWN_EVERY: Final = 10  # steps


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


def _finetune(wanted: FinetuneOptions, given: RunOptions, ui: Ui) -> None:
    folder = _check(wanted, given)
    source = open_model(given, ui)
    plan = _plan(wanted, given, source, ui)

    from qcompress.finetune.processes import Processes

    processes = Processes.launched(device(given))
    if not processes.is_first:
        ui = Ui(quiet=True, silent=True)
    runs: list[finetune_report.Done] = []
    for one, where in _runs(wanted, folder):
        if where != folder:
            ui.note(f"seed {one.seed}: {where}")
        done = _run(plan, one, replace(given, output=where), source, processes, ui)
        runs += [done] if done is not None else []
    processes.close()
    if not processes.is_first:
        return
    if not runs:
        ui.show("nothing written (--dry-run)")
        return
    ui.wrote(folder)
    report = runs[0] if len(runs) == 1 else finetune_report.Seeds(folder, tuple(runs))
    ui.emit(report.as_dict())
    ui.show(*report.tables(), *report.lines())


def _runs(wanted: FinetuneOptions, folder: Path) -> list[tuple[FinetuneOptions, Path]]:
    """Return the options and the folder of each run: one, or one per seed."""
    if wanted.seeds == 1 or wanted.dry_run:
        return [(wanted, folder)]
    seeds = range(wanted.seed, wanted.seed + wanted.seeds)
    others = replace(wanted, save_plan=None)  # the first run saves the plan, which all share
    return [(replace(wanted if i == 0 else others, seed=seed), folder / f"seed-{seed}") for i, seed in enumerate(seeds)]


def _run(
    plan: Plan, wanted: FinetuneOptions, given: RunOptions, source: Source, processes: "Processes", ui: Ui
) -> finetune_report.Done | None:
    """Train in the folder `given.output`; return what came of it, None for a dry run."""
    import torch

    from qcompress.finetune import recipes
    from qcompress.finetune.run import Interruption, Pace, Run
    from qcompress.finetune.run_folder import start_folder
    from qcompress.finetune.trainer import Trainer

    torch.manual_seed(wanted.seed + processes.rank)
    task = training_task(plan, wanted, given, source, processes, ui)
    settings, teacher, metric = task.settings, task.teacher, given.metric or METRIC
    plan = replace(plan, training=settings)
    for note in task.prepared.notes:
        ui.note(note)
    if not recipes.is_tuned(settings, plan.default.bits) and plan.default.bits is not None:
        ui.note(f"The defaults of {settings.method} at {plan.default.bits} bits are untuned; compare a few of --rate.")
    if wanted.dry_run:
        ui.emit(finetune_report.Done(None, wanted.seed, settings, (), None, task.original, metric).as_dict())
        ui.show(*finetune_report.dry_run(settings, task.prepared, len(task.batches)))
        return None
    assert given.output is not None
    folder = given.output
    if processes.is_first:
        start_folder(folder, _identity(plan, wanted, given, task, source))
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
    done = finetune_report.Done(
        folder, wanted.seed, settings, tuple(run.rows), run.best_epoch, task.original, metric, run.best, run.errors
    )
    if processes.is_first:
        write_whole(folder / "curves.svg", finetune_report.curves(done).encode())
    return done


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
        _check_folders(wanted, folder)
    if wanted.save_plan is not None:
        inputs = [path for path in (given.model, given.plan) if path is not None]
        check_writable(wanted.save_plan, force=given.force or wanted.resume, inputs=inputs, flag="--save-plan")
    return folder


def _check_folders(wanted: FinetuneOptions, folder: Path) -> None:
    """Refuse folders that cannot take the runs."""
    runs = [where for _, where in _runs(wanted, folder)]
    if runs == [folder] or not folder.is_dir():
        _check_folder(folder, resume=wanted.resume)
        return
    if any(entry not in runs for entry in folder.iterdir() if not entry.name.startswith(".")):
        raise OutputError(f"{folder} holds other files than the runs of these seeds: name another folder by -o.")
    for where in runs:
        _check_folder(where, resume=wanted.resume)


def _check_folder(folder: Path, *, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"-o {folder} must be a folder, but it is a file: name another one.")
    check_writable(folder / "run" if folder.is_dir() else folder, flag="-o")
    if (folder / "run.json").exists():
        if not resume:
            raise OutputError(f"{folder} holds a training run: add --resume to go on with it, or name another by -o.")
    elif folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise OutputError(f"{folder} holds other files than those of a training run: name another folder by -o.")


def _plan(wanted: FinetuneOptions, given: RunOptions, source: Source, ui: Ui) -> Plan:
    plan = wanted.plan(given.plan, given.bits)
    if plan.training.method == "none":
        if given.bits is not None or plan.kind or plan.name:
            raise ConfigError(
                "--method none trains the float model: remove --bits, --ends and other tables of the plan."
            )
        return replace(plan, default=Settings(skip=True))
    if isinstance(source, CompressedSource) and not (plan.default.given() or plan.kind or plan.name):
        small, training = source.model(), plan.training
        if training.method is None and any(isinstance(a, PalettizedWeight) for a in small.artifacts.values()):
            ui.note("MODEL holds palettes, which --method dkm goes on to train; --method lsq begins with even grids.")
            training = Training(**{**training.given(), "method": "dkm"})
        return replace(small.plan, training=training)
    if plan.default.bits is None and not (plan.kind or plan.name):
        raise ConfigError("finetune needs the bits per weight: add --bits N, or --plan FILE, or --method none.")
    return plan


def _identity(
    plan: Plan, wanted: FinetuneOptions, given: RunOptions, task: TrainingTask, source: Source
) -> dict[str, Any]:
    """Return what a run with --resume must have in common with the one that it goes on with."""
    from qcompress.openers import load_source

    teacher = task.settings.teacher
    has_file = teacher not in ("self", "none")
    return {
        "version": 1,
        "model": source.sha256[:11],
        "seed": wanted.seed,  # before the data, whose fingerprint depends on it
        "data": task.batches.fingerprint,
        "val": task.compared_on,
        "teacher": load_source(Path(teacher), options=source_options(given)).sha256[:11] if has_file else None,
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
