"""The options of `export`: those of the plan's fields, made from their table, and its own, as a typed record."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import click
from click.core import ParameterSource

from qcompress.deployment import Compute
from qcompress.errors import ConfigError
from qcompress.plan.fields import Fields, PlanField
from qcompress.plan.settings import Settings
from qcompress.plan.values import OneOf
from qcompress.posthoc.calibration import METHODS
from qcompress.posthoc.settings import DEFAULTS, Effort, PosthocSettings
from qcompress_cli.inputs import options
from qcompress_exporters import formats

if TYPE_CHECKING:
    from qcompress.graph.sites import Placement
    from qcompress_exporters.options import Leftovers

AUTO: Final = "auto"  # measure what layers shall compute in
# Options that apply to some ways to compute only.
_COMPUTES: Final[Mapping[str, tuple[Compute, ...]]] = {
    "calibration_method": ("int8",),
    "percentile": ("int8",),
    "placement": ("int8",),
    "reduce_range": ("int8", "dynamic8"),
}
# Options that a compressed folder has no use for, beside the plan's fields: all of it was settled when it was made.
_FOR_FLOAT_MODELS: Final = (
    "plan", "compute", *_COMPUTES, "effort", "no_synthetic", "input_names", "output_names", "dynamic", "fixed_batch",
    "input_shape",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """The options of one `export`, beside those in `RunOptions`; None where an option was not given.

    Args:
        settings: the class of the plan's settings, which knows the fields of the plan.
        plan_fields: values of the plan's fields by name.
        compute: what layers compute in.
        measures: whether that shall be measured (AUTO).
        format: the deployment format, or its way to write int8 compute.
        calibration_method: how ranges of activations are found, a key of `posthoc.calibration.METHODS`.
        percentile: for the method of that name.
        placement: which activations are quantized.
        reduce_range: whether 8-bit weights keep to 7 bits.
        offsets: what becomes of learned offsets that fit into no bias: `exact` or `snap`.
        effort: how much work compression does.
        no_synthetic: whether no inputs are synthesised.
        seed: of what is random.
        save_plan: where the resolved plan goes.
        save_compressed: where the compressed model goes.
        dry_run: whether nothing is written.
        explain: whether details of tensors, layers and activations are shown.
        float_leftovers: type on disk of tensors that stay float.
        strict: whether a file without any smaller tensor is a failure.
        on_command_line: names of all options on the command line; others come from the project's config.
    """

    settings: type[Settings]
    plan_fields: Mapping[str, Any]
    compute: Compute | None
    format: str | None
    calibration_method: str | None
    percentile: float | None
    placement: "Placement | None"
    reduce_range: bool
    offsets: str | None
    effort: Effort | None
    no_synthetic: bool
    seed: int
    save_plan: Path | None
    save_compressed: Path | None
    dry_run: bool
    explain: bool
    float_leftovers: "Leftovers"
    strict: bool
    on_command_line: frozenset[str]
    measures: bool = False

    @classmethod
    def of(cls, params: Mapping[str, Any], settings: type[Settings]) -> "ExportOptions":
        """Return the record of what click parsed for the current command."""
        source = click.get_current_context().get_parameter_source
        measures = params["compute"] == AUTO
        return cls(
            settings=settings,
            plan_fields={f.name: params[f.name] for f in settings.fields if f.has_option},
            on_command_line=frozenset(name for name in params if source(name) is ParameterSource.COMMANDLINE),
            measures=measures,
            **{f.name: params[f.name] for f in fields(cls) if f.name in params and f.name != "compute"},
            compute=None if measures else params["compute"],
        )

    @property
    def posthoc(self) -> PosthocSettings:
        """The settings of post-hoc compression; those that were not given have their defaults."""
        given = {f.name: getattr(self, f.name) for f in fields(PosthocSettings) if hasattr(self, f.name)}
        return replace(
            DEFAULTS,
            **{name: value for name, value in given.items() if value is not None},
            synthetic=not self.no_synthetic,
        )

    def settled(self, *, planned: bool) -> "ExportOptions":
        """Return these options with int8 compute if it shall be measured, and 8 activation bits where nothing is said.

        Args:
            planned: whether there is a plan, which says what activations have.

        Raises:
            ConfigError: files of this format cannot be measured layer by layer.
        """
        if not self.measures:
            return self
        if self.format == "integer":
            raise ConfigError(
                "--compute auto measures files of --format qdq; remove --format integer, or use --compute int8."
            )
        known = planned or self.plan_fields.get("activation_bits") is not None
        plan_fields = dict(self.plan_fields) if known else {**self.plan_fields, "activation_bits": 8}
        return replace(self, compute="int8", plan_fields=plan_fields)

    def check_compute(self, compute: Compute) -> None:
        """Reject options that would have no effect.

        Args:
            compute: what layers compute in.

        Raises:
            ConfigError: an option does not apply to it.
        """
        for name, computes in _COMPUTES.items():
            if name in self.on_command_line and compute not in computes:
                other = " or --compute dynamic8" if "dynamic8" in computes else ""
                raise ConfigError(
                    f"{option(name)} applies to compute {' or '.join(computes)} only, but this is compute {compute}; "
                    f"remove it, or add --activation-bits{other}."
                )
        if self.percentile is not None and self.calibration_method != "percentile":
            raise ConfigError(
                "--percentile applies to --calibration-method percentile only; add that option, or remove --percentile."
            )

    def check_for_float_model(self, *, calibrated: bool) -> None:
        """Reject options that have no effect where MODEL is not compressed yet.

        Args:
            calibrated: whether there is calibration data.

        Raises:
            ConfigError: such an option was given.
        """
        if self.offsets is not None:
            raise ConfigError(
                "--offsets applies to compressed folders only, which can hold learned offsets; remove it, or pass such "
                "a folder as MODEL."
            )
        if self.no_synthetic and calibrated:
            raise ConfigError("--no-synthetic has no effect with --calibration; remove one of the two.")

    def check_for_compressed(self, label: str, compute: Compute) -> None:
        """Reject options that have no effect where MODEL is compressed already.

        Args:
            label: what messages call MODEL.
            compute: what its layers compute in.

        Raises:
            ConfigError: such an option was given.
        """
        settled = [*self.plan_fields, *_FOR_FLOAT_MODELS, *(["calibration"] if self.offsets != "snap" else [])]
        given = [name for name in settled if name in self.on_command_line]
        if given:
            raise ConfigError(
                f"{label} is compressed already; remove {option(given[0])}, or pass the original model as MODEL."
            )
        if self.offsets is not None and compute != "int8":
            raise ConfigError(f"--offsets applies to compute int8 only, but this is compute {compute}; remove it.")


def option(name: str) -> str:
    """Return the option of a parameter.

    >>> option("save_plan")
    '--save-plan'
    """
    return "--" + name.replace("_", "-")


def plan_options(plan_fields: Fields) -> Callable[[options.F], options.F]:
    """Return a decorator that adds an option for each field of a plan."""
    return options.together(*(_plan_option(field) for field in plan_fields if field.has_option))


def export_options(plan_fields: Fields) -> Callable[[options.F], options.F]:
    """Return a decorator that adds the options of `export`."""
    return options.together(plan_options(plan_fields), _OWN)


def _plan_option(field: PlanField) -> Callable[[Any], Any]:
    default = f" Default: {field.unset}." if field.unset else ""
    kinds = f" Applies to {' and '.join(field.kinds)} weights." if field.kinds else ""
    if field.values == OneOf((True, False)):
        switch = f"{field.option}/--no-{field.option.removeprefix('--')}"
        return click.option(switch, default=None, help=field.meaning + kinds + default)
    return click.option(
        field.option,
        type=options.Parsed(field.name, lambda text: field.checked(field.values.parse(text))),
        metavar=field.values.metavar,
        help=field.meaning + kinds + default,
    )


def _known_format(text: str) -> str:
    formats.choose(text)
    return text


_OWN: Final = options.together(
    click.option("--plan", type=options.PATH, metavar="FILE", help="A plan in TOML; options replace its [default]."),
    click.option("--save-plan", type=options.PATH, metavar="FILE", help="Write the resolved plan to FILE."),
    click.option(
        "--compute",
        type=click.Choice([*get_args(Compute), AUTO]),
        help="What layers compute in. Default: int8 with --activation-bits, else float. dynamic8: matrix products in "
        "int8, with activation scales found at run time; needs no calibration data. auto: int8 (--activation-bits, "
        "8 by default) for the layers that it makes faster on this machine, if any; --save-plan writes which.",
    ),
    click.option(
        "--format",
        type=options.Parsed("format", _known_format),
        metavar="|".join(word for name, format in formats.FORMATS.items() for word in (name, *format.ways)),
        help="The deployment format (default: onnx), or how it writes int8 compute: quantizers around float operators, "
        "which runtimes fuse (qdq, the default), or integer operators (integer).",
    ),
    click.option(
        "--calibration-method",
        type=click.Choice(tuple(METHODS)),
        help=f"How ranges of activations are found. Default: {DEFAULTS.calibration_method}.",
    ),
    click.option(
        "--percentile",
        type=click.FloatRange(50, 100, min_open=True),
        help=f"For --calibration-method percentile. Default: {DEFAULTS.percentile}.",
    ),
    click.option(
        "--placement",
        type=click.Choice(["deploy", "paper"]),
        help="Which activations are quantized: all that onnxruntime fuses (deploy, the default), or inputs of layers "
        "only (paper).",
    ),
    click.option(
        "--reduce-range",
        is_flag=True,
        help="Keep 8-bit weights to 7 bits, for CPUs without VNNI, where sums of products can saturate.",
    ),
    click.option(
        "--offsets",
        type=click.Choice(["exact", "snap"]),
        help="For a compressed folder: what becomes of learned offsets that fit into no bias. exact (default) adds "
        "them in float, and the layer computes in float; snap moves them onto their grids and corrects biases on "
        "--calibration.",
    ),
    click.option(
        "--effort",
        type=click.Choice(get_args(Effort)),
        help="fast: each value goes to its nearest level. balanced (default): weights and biases are solved layer by "
        "layer on --calibration, or on inputs synthesised from BatchNorm statistics. best: all layers are then tuned "
        "together.",
    ),
    click.option(
        "--no-synthetic",
        is_flag=True,
        help="Without --calibration: synthesise no inputs; each value goes to its nearest level.",
    ),
    click.option(
        "--save-compressed", type=options.PATH, metavar="DIR", help="Save the compressed model, to export it again."
    ),
    click.option("--dry-run", is_flag=True, help="Show the resolved plan and the exact sizes; write nothing."),
    click.option(
        "--explain",
        is_flag=True,
        help="Show how each tensor is written and each layer computes, with reasons, and what the range of each "
        "activation clips.",
    ),
    click.option(
        "--float-leftovers",
        type=click.Choice(["float32", "float16"]),
        default="float32",
        show_default=True,
        help="Type on disk of tensors that stay float.",
    ),
    click.option("--strict", is_flag=True, help="Exit with 1 if no tensor got smaller."),
)
