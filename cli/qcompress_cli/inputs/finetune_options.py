"""The options of `finetune`: those of the plan's fields, made from their tables, and its own, as a typed record."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import click

from qcompress.errors import ConfigError
from qcompress.plan.fields import FIELDS, FLOAT16, Fields
from qcompress.plan.plan import FIRST, LAST, Plan, load_plan
from qcompress.plan.settings import Settings
from qcompress.plan.training import TRAINING_FIELDS
from qcompress_cli.inputs import options
from qcompress_cli.inputs.export_options import plan_options

TRAINED: Final = tuple(field for field in FIELDS if field.trains and field.has_option)
ENDS: Final = ("2", "4", "8", "16", "float")

_TIME: Final = re.compile(r"(\d+(?:\.\d+)?)([smh])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneOptions:
    """The options of one `finetune`, beside those in `RunOptions`; None where an option was not given.

    Args:
        plan_fields: values of the plan's fields by name.
        training: values of the fields of [training] by name.
        ends: bits of the first and of the last layer.
        val: data that epochs are compared on.
        resume: whether to go on with the run in the folder.
        checkpoint_every: (steps, seconds) between checkpoints, one of them None.
        keep: checkpoints that stay.
        max_time: seconds of training.
        workers: processes that load data.
        seed: of what is random.
        seeds: how often the model is trained, with as many seeds.
        save_plan: where the resolved plan goes.
        dry_run: whether nothing is trained.
    """

    plan_fields: Mapping[str, Any]
    training: Mapping[str, Any]
    ends: str | None
    val: str | None
    resume: bool
    checkpoint_every: tuple[int | None, float | None]
    keep: int
    max_time: float | None
    workers: int
    seed: int
    seeds: int
    save_plan: Path | None
    dry_run: bool

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> "FinetuneOptions":
        """Return the record of what click parsed."""
        return cls(
            plan_fields={f.name: params[f.name] for f in TRAINED},
            training={f.name: params[f.name] for f in TRAINING_FIELDS},
            **{f.name: params[f.name] for f in fields(cls) if f.name in params},
        )

    def plan(self, file: Path | None, bits: int | None) -> Plan:
        """Return the plan of the file and the options.

        Args:
            file: value of `--plan`.
            bits: value of `--bits`, or of the project's config.
        """
        plan = load_plan(file) if file else Plan()
        plan = plan.with_flags(**{**self.plan_fields, "bits": bits}).with_training(**self.training)
        return plan if self.ends is None else with_ends(plan, self.ends)


def with_ends(plan: Plan, ends: str) -> Plan:
    """Return a plan whose first and last layer have other bits than the rest.

    >>> with_ends(Plan.from_flags(bits=2, activation_bits=2), "8").kind["first"]
    Settings(bits=8, activation_bits=8)
    >>> with_ends(Plan.from_flags(bits=2), "16").kind["last"]
    Settings(skip='float16')
    """
    from dataclasses import replace

    if ends == "float":
        wide = Settings(skip=True)
    elif ends == "16":
        wide = Settings(skip=FLOAT16)
    else:
        activations = {} if plan.default.activation_bits is None else {"activation_bits": int(ends)}
        wide = Settings(bits=int(ends), **activations)
    origins = {**plan.origins}
    for kind in (FIRST, LAST):
        origins["kind", kind] = "--ends"
        for name in wide.given():
            origins["kind", kind, name] = "--ends"
    return replace(plan, kind={**plan.kind, FIRST: wide, LAST: wide}, origins=origins)


def seconds(text: str) -> float:
    """Return the seconds of a time.

    >>> seconds("90s"), seconds("30m"), seconds("1.5h")
    (90.0, 1800.0, 5400.0)
    """
    found = _TIME.fullmatch(text)
    if not found or not float(found[1]):
        raise ConfigError(f"must be a time such as 90s, 30m or 8h, got {text!r}.")
    return float(found[1]) * _SECONDS[found[2]]


def steps_or_seconds(text: str) -> tuple[int | None, float | None]:
    """Return (steps, None) of a number, (None, seconds) of a time.

    >>> steps_or_seconds("200"), steps_or_seconds("10m")
    ((200, None), (None, 600.0))
    """
    if text.isdecimal() and int(text):
        return int(text), None
    if text.isdecimal():
        raise ConfigError("must be at least 1 step, got 0.")
    return None, seconds(text)


def training_options(rows: Fields = TRAINING_FIELDS) -> Callable[[options.F], options.F]:
    """Return a decorator that adds an option for each field of [training]."""
    return plan_options(rows)


def finetune_options() -> Callable[[options.F], options.F]:
    """Return a decorator that adds the options of `finetune`."""
    return options.together(plan_options(TRAINED), training_options(), _OWN)


_OWN: Final = options.together(
    click.option(
        "--ends",
        type=click.Choice(ENDS),
        help="Bits of the first and of the last layer: [kind.first] and [kind.last] of the plan; with 16 they train as "
        "floats and are stored as float16. Default: as the rest.",
    ),
    click.option("--plan", type=options.PATH, metavar="FILE", help="A plan in TOML; options replace what it sets."),
    click.option("--save-plan", type=options.PATH, metavar="FILE", help="Write the resolved plan to FILE."),
    click.option("--val", metavar="FILE", help="Labelled data on which epochs are compared; the best one is kept."),
    click.option(
        "--seeds",
        type=click.IntRange(1),
        default=1,
        metavar="N",
        help="Train N times, with the seeds from --seed on, each in a folder of its own in -o, and compare the runs.",
    ),
    click.option("--resume", is_flag=True, help="Go on with the run in the folder, from its last checkpoint."),
    click.option(
        "--checkpoint-every",
        metavar="N|10m",
        default="10m",
        show_default=True,
        type=options.Parsed("steps or time", steps_or_seconds),
        help="Steps, or time, between checkpoints; each epoch ends with one, too.",
    ),
    click.option(
        "--keep", type=click.IntRange(1), default=2, show_default=True, help="Checkpoints that stay in the folder."
    ),
    click.option(
        "--max-time",
        metavar="30m",
        type=options.Parsed("time", seconds),
        help="Train for about this time: the first steps tell how many fit, and the schedule ends with these.",
    ),
    click.option(
        "--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that load data ahead."
    ),
    click.option(
        "--force", is_flag=True, help="Replace the file of --save-plan if it exists; no run is ever replaced."
    ),
    click.option("--dry-run", is_flag=True, help="Show the settings and the size; train nothing, write nothing."),
)
