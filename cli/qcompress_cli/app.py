"""The command `qcompress`: finds the subcommand, runs it, and turns every outcome into an exit code of `exits`."""

import contextlib
import importlib
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn, TextIO

import click

from qcompress.errors import QCompressError, did_you_mean, missing
from qcompress_cli.terminal.exits import BAD_INPUT, BROKEN_PIPE, INTERRUPTED, OUR_BUG
from qcompress_cli.terminal.text import printable

# Every command: the module that holds it as `command`, and its line in `qcompress --help`. A module is imported when
# its command runs, so that help, version and the gate start at once.
COMMANDS: Final[Mapping[str, tuple[str, str]]] = {
    "analyze": ("qcompress_cli.commands.analyze", "Show what is in a model, and its bytes at each width."),
    "inspect": ("qcompress_cli.commands.inspect", "List names, kinds and shapes of all tensors."),
    "finetune": ("qcompress_cli.commands.finetune", "Train a model with quantized weights."),
    "export": ("qcompress_cli.commands.export", "Compress a model and write it as ONNX."),
    "validate": ("qcompress_cli.commands.validate", "Compare a compressed file with its original."),
    "gate": ("qcompress_cli.commands.gate", "Fail when a file breaks a limit on size or accuracy."),
}

# Packages outside the base installation; the error for a missing one names the pip command.
_OPTIONAL: Final = ("torch", "onnxruntime", "onnx_ir", "onnxscript", "scipy", "sklearn")


class LazyGroup(click.Group):
    """A group that imports a command when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of the table, which is the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command; the error for an unknown one names the nearest."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            hint = did_you_mean(name, COMMANDS) or f" Commands: {', '.join(COMMANDS)}."
            raise click.UsageError(f"There is no command {name!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, short) for name, (_, short) in COMMANDS.items()])

    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> NoReturn:
        """Run and exit; this is where click's test runner enters too."""
        sys.exit(run(sys.argv[1:] if args is None else args))


@click.group("qcompress", cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=lambda c, p, v: _version(c, v))
def cli() -> None:
    """Compress the weights of a trained model to 1 to 8 bits, write an ONNX file that is really that small and that
    stock onnxruntime runs, and prove it.
    """


def run(args: Sequence[str]) -> int:
    """Run the command line and return its exit code; this never raises."""
    if not args:
        click.echo(cli.get_help(click.Context(cli, info_name="qcompress")), err=True)
        return BAD_INPUT
    try:
        with cli.make_context("qcompress", list(args), obj=tuple(args)) as ctx:
            cli.invoke(ctx)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as e:
        return e.exit_code
    except BrokenPipeError:
        return _reader_gone()
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except click.ClickException as e:
        _say(e.format_message() + _where_help_is(e))
        return BAD_INPUT
    except Exception as e:
        if "--debug" in args:
            traceback.print_exc()
        return _explain(e, args)


def _explain(error: Exception, args: Sequence[str]) -> int:
    if isinstance(error, QCompressError):
        _say(str(error))
        return error.exit_code
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        if package in _OPTIONAL:
            _say(str(missing(package, f"qcompress {args[0]}")))
            return BAD_INPUT
    if isinstance(error, MemoryError):
        _say(f"This machine has too little memory for this: {error or 'out of memory'}.")
        return BAD_INPUT
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        _say(f"{where}{error.strerror}.")
        return BAD_INPUT
    what = " ".join(f"{type(error).__name__}: {error}".split())
    how = "" if "--debug" in args else " with the output of the same command with --debug"
    _say(f"{what}\nThis is a bug in qcompress {_installed()}; please report it{how}.")
    return OUR_BUG


def _say(message: str) -> None:
    """Write an error to stderr; where that cannot be written either, the exit code alone tells."""
    try:
        click.echo(f"error: {printable(message)}", err=True)
    except OSError:
        _discard(sys.stderr)


def _where_help_is(error: click.ClickException) -> str:
    ctx = getattr(error, "ctx", None)
    return f"\nTry '{ctx.command_path} --help'." if isinstance(ctx, click.Context) else ""


def _reader_gone() -> int:
    """End silently when nobody reads stdout any more, also at the last flush of the interpreter."""
    _discard(sys.stdout)
    return BROKEN_PIPE


def _discard(stream: TextIO) -> None:
    """Let what a stream still holds go nowhere: the interpreter writes it when it ends, and that would fail again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _installed() -> str:
    try:
        return importlib.metadata.version("qcompress")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _version(ctx: click.Context, wanted: bool) -> None:
    if wanted:
        click.echo(f"qcompress {_installed()}")
        ctx.exit()
