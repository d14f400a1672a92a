"""The options that commands share, as decorators, and what they are built from.

An option that was not given is None or empty, so that `project.run_options` can fall back on the project's config.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from qcompress.errors import ConfigError
from qcompress_cli.inputs.shapes import parse_dynamic, parse_input_shape
from qcompress_exporters.formats import FORMATS

F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # generic from click 8.4 on only

_KEY_VALUE: Final = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)
_CONSTANTS: Final = {"True": True, "False": False, "None": None}


class Parsed(_ParamType):
    """The value of an option, parsed by one of our functions, whose ConfigError becomes a usage error.

    Args:
        name: what help calls the value.
        parse: returns the value of a text.
    """

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse text; return a value that is parsed already as it is."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ConfigError as e:
            self.fail(str(e), param, ctx)


class Command(click.Command):
    """A command on which `--arch-kwargs a=1 b=2` takes every `key=value` that follows it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the option before each further pair, then parse as usual."""
        spread: list[str] = []
        inside = False
        for position, arg in enumerate(args):
            if inside and _KEY_VALUE.fullmatch(arg) and args[position - 1] != "--arch-kwargs":
                spread.append("--arch-kwargs")
            elif inside and not _KEY_VALUE.fullmatch(arg):
                inside = False
            inside = inside or arg == "--arch-kwargs"
            spread.append(arg)
        return super().parse_args(ctx, spread)


def command(name: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Return the decorator that makes a command: `@command("analyze")`."""
    return click.command(name, cls=Command, context_settings={"help_option_names": ["-h", "--help"]})


def together(*decorators: Callable[[Any], Any]) -> Callable[[F], F]:
    """Return several decorators as one, in the order in which help lists their options."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def key_value(text: str) -> tuple[str, Any]:
    """Return key and value of `key=value`; the value is a Python constant, JSON, or else text.

    >>> key_value("num_classes=10"), key_value("name=resnet"), key_value("bias=False"), key_value("sizes=[1,2]")
    (('num_classes', 10), ('name', 'resnet'), ('bias', False), ('sizes', [1, 2]))
    """
    if not _KEY_VALUE.fullmatch(text):
        raise ConfigError(f"must read key=value, got {text!r}.")
    key, _, value = text.partition("=")
    if value in _CONSTANTS:
        return key, _CONSTANTS[value]
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def names(text: str) -> tuple[str, ...]:
    """Return names that are separated by commas.

    >>> names("ids, mask")
    ('ids', 'mask')
    """
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"must be distinct names separated by commas, got {text!r}.")
    return parts


def _switch(*declaration: str, text: str) -> Callable[[F], F]:
    """Return an option that is True where given, else None."""
    return click.option(*declaration, is_flag=True, flag_value=True, default=None, type=bool, help=text)


def _to_dict(ctx: click.Context, param: click.Parameter, pairs: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return dict(pairs)


PATH: Final = click.Path(path_type=Path)

model_argument: Final = click.argument("model", required=False, type=PATH)

arch_options: Final = together(
    click.option(
        "--arch",
        metavar="MODULE:FN",
        help="The factory of the float module for a bare state dict: package.module:factory or path/file.py:factory. "
        "Runs your code.",
    ),
    click.option(
        "--arch-kwargs",
        metavar="K=V…",
        multiple=True,
        type=Parsed("k=v", key_value),
        callback=_to_dict,
        help="Arguments of the factory: --arch-kwargs num_classes=10 width=0.75",
    ),
)

# For the commands that run the model.
source_options: Final = together(
    arch_options,
    click.option(
        "--allow-class",
        metavar="PKG.MOD:CLS",
        multiple=True,
        help="A class that may occur in a pickled module. Imports that class. Repeatable.",
    ),
    _switch("--trust-pickle", text="Unpickle the file without checks. Runs whatever code it carries."),
)

input_options: Final = together(
    click.option(
        "--calibration",
        metavar="FILE",
        help="Unlabelled inputs: .npz, .npy, a folder of .npy or of images, or module:fn.",
    ),
    click.option(
        "--data",
        metavar="FILE",
        help="Inputs with labels where there are any: X.npz, X.npz:x_key,y_key, a folder of images with one sub-folder "
        "per class, or module:fn, which returns a torch Dataset.",
    ),
    click.option(
        "--input-shape",
        metavar="[NAME=]1,3,32,32[:DTYPE]",
        multiple=True,
        type=Parsed("shape", parse_input_shape),
        help="Shape of an example input, for use without data; the first number is the batch. Repeatable.",
    ),
    click.option(
        "--transform",
        metavar="MODULE:FN",
        help="A function from a batch of the data file to a batch of the model's inputs. Runs your code.",
    ),
    click.option("--input-names", metavar="A,B", type=Parsed("names", names), help="Names of the graph's inputs."),
    click.option("--output-names", metavar="A,B", type=Parsed("names", names), help="Names of the graph's outputs."),
    click.option(
        "--dynamic",
        metavar="NAME:0=batch",
        multiple=True,
        type=Parsed("axis", parse_dynamic),
        help="A dynamic axis beside the batch. Default: the lengths of token sequences, where the model allows other "
        "ones. Repeatable.",
    ),
    _switch(
        "--fixed-batch",
        text="Trace the model with the example's own shape, so that the file takes no other: that of --input-shape, "
        "else two samples of the data.",
    ),
    click.option("--device", type=click.Choice(["cpu", "cuda", "auto"]), help="Where the model runs. Default: cpu."),
)

metric_options: Final = together(
    click.option("--metric", metavar="NAME", help="top1, top5, auc, mse, cosine, or module:fn, which runs your code."),
    _switch("--lower-is-better", text="A lower value of the metric is better, as for a loss."),
)

output_options: Final = together(
    click.option(
        "--target",
        metavar="NAME",
        help="Where the file must run; default: portable, which all runtimes read. onnxruntime==1.24 is the oldest "
        "onnxruntime that must run it. "
        + "; ".join(f"{name}: {', '.join(format.targets)}" for name, format in FORMATS.items())
        + ".",
    ),
    click.option("-o", "--output", metavar="FILE", type=PATH, help="The file to write."),
    _switch("--force", text="Replace FILE if it exists; inputs of the command are never replaced."),
)

common_options: Final = together(
    click.option("--json", is_flag=True, help="Write JSON and nothing else to stdout."),
    click.option("--quiet", is_flag=True, help="Show neither progress nor notes."),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)
