import errno
import importlib
import os
import subprocess
import sys
import threading
import types

import click
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from qcompress.errors import ConfigError
from qcompress_cli import app, main
from qcompress_cli.terminal import exits

HEAVY = {"torch", "onnx_ir", "onnxscript", "onnxruntime", "scipy", "sklearn"}


@pytest.fixture
def fails_with(monkeypatch, qcompress):
    """Run a command that raises what it is told to."""

    def run(error, *args):
        def callback(debug):
            raise error

        module = types.ModuleType("tests_fake_command")
        module.command = click.Command("boom", callback=callback, params=[click.Option(["--debug"], is_flag=True)])
        monkeypatch.setitem(sys.modules, "tests_fake_command", module)
        monkeypatch.setattr(app, "COMMANDS", {"boom": ("tests_fake_command", "Fails.")})
        return qcompress("boom", *args)

    return run


@pytest.mark.parametrize(
    ("error", "code", "stderr"),
    [
        (ConfigError("bits must be 1."), 2, "error: bits must be 1.\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (click.Abort(), 130, "interrupted\n"),
        (BrokenPipeError(), 141, ""),
        (click.UsageError("no"), 2, "error: no\nTry 'qcompress boom --help'.\n"),
        (ModuleNotFoundError("No module", name="torch.export"), 2, None),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device.\n"),
        (PermissionError(errno.EACCES, "Permission denied", "x.onnx"), 2, "error: x.onnx: Permission denied.\n"),
        (ModuleNotFoundError("No module named 'qcompress.x'", name="qcompress.x"), 70, None),
        (ZeroDivisionError("a\nb"), 70, None),
        (MemoryError("no 9 TiB"), 2, "error: This machine has too little memory for this: no 9 TiB.\n"),
    ],
)
def test_every_ending_has_its_exit_code(fails_with, error, code, stderr):
    result = fails_with(error)
    assert result.exit_code == code
    assert result.stdout == ""
    if stderr is not None:
        assert result.stderr == stderr


def test_a_missing_package_names_its_pip_line(fails_with):
    result = fails_with(ModuleNotFoundError("No module", name="torch.export"))
    assert result.stderr == (
        "error: qcompress boom needs the package torch, which is not installed: pip install 'qcompress[all]'\n"
    )


def test_a_bug_says_how_to_report_it_and_debug_shows_it(fails_with, shell):
    first, second = fails_with(ZeroDivisionError("a\nb")).stderr.splitlines()
    assert first == "error: ZeroDivisionError: a b"
    assert second.startswith("This is a bug in qcompress ")
    assert second.endswith("please report it with the output of the same command with --debug.")
    code = "import qcompress_cli.commands.gate as g; g.load_project = lambda: 1 / 0\n"
    code += "from qcompress_cli.main import main; main()"
    done = shell("gate", "x", "--debug", code=code)
    assert done.returncode == 70
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_what_a_terminal_would_act_on_is_written_out(fails_with):
    assert fails_with(ConfigError("bad \x1b[31mname")).stderr == "error: bad \\x1b[31mname\n"


def test_version_and_help(qcompress):
    version = qcompress("--version")
    assert (version.exit_code, version.stderr) == (0, "")
    assert version.stdout.startswith("qcompress ")
    help_text = qcompress("--help")
    assert help_text.exit_code == 0
    for name, (_, short) in app.COMMANDS.items():
        assert f"{name} " in help_text.stdout
        assert short in help_text.stdout


def test_no_arguments_show_help_and_exit_2(qcompress):
    result = qcompress()
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Commands:" in result.stderr


def test_an_unknown_command_and_flag_name_the_nearest(refused):
    assert refused("analyse") == "There is no command 'analyse'. Did you mean analyze?\nTry 'qcompress --help'.\n"
    assert refused("zzz").startswith("There is no command 'zzz'. Commands: analyze, inspect,")
    assert "--max-size" in refused("gate", "--max-sise", "3")
    assert refused("--frobnicate").startswith("No such option")


@pytest.mark.parametrize("name", app.COMMANDS)
def test_every_command_has_help(name, qcompress):
    module = app.COMMANDS[name][0]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not there yet")
    result = qcompress(name, "--help")
    assert result.exit_code == 0
    for flag in ("--json", "--quiet", "--seed", "--debug"):
        assert flag in result.stdout
    if "--arch" in result.stdout:
        assert "Runs your code" in " ".join(result.stdout.split())


@pytest.mark.parametrize("args", ["--help", "--version", "gate --help", "gate net.onnx --max-size 1MB"])
def test_light_commands_import_nothing_heavy(args, shell, onnx_file):
    onnx_file()
    code = (
        "import sys, qcompress_cli.main as m\n"
        "code = m.run(sys.argv[1:])\n"
        f"sys.exit(code or ', '.join({HEAVY!r} & set(sys.modules)) or 0)"
    )
    done = shell(*args.split(), code=code)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_and_version_need_neither_onnx_nor_numpy(shell):
    code = "import sys, qcompress_cli.main as m; m.run(['--help']); m.run(['--version'])\n"
    code += "sys.exit(', '.join({'onnx', 'numpy', 'pydantic', 'rich'} & set(sys.modules)) or 0)"
    done = shell(code=code)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_script_exits_with_the_code_and_without_a_traceback(shell):
    done = shell("gate", "none.onnx", "--max-size", "1kB")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: none.onnx cannot be read: No such file or directory.\n"


@pytest.mark.parametrize("flags", ["--json", "--quiet"])
def test_a_reader_that_goes_away_ends_it_quietly(flags, shell, folder):
    save_file({f"layer{i}.weight": np.zeros((2, 2), np.float32) for i in range(1000)}, folder / "big.safetensors")
    reading, writing = os.pipe()
    threading.Timer(0.5, os.close, [reading]).start()  # when it has written as much as a pipe holds, or before
    with os.fdopen(writing, "wb") as stdout:
        done = shell("analyze", "big.safetensors", flags, stdout=stdout, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, "")


def test_closed_streams_are_bad_usage_and_no_bug(shell, weights):
    def close(*numbers):
        return {"preexec_fn": lambda: [os.close(number) for number in numbers]}

    done = shell("inspect", weights, stdout=None, **close(0, 1))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: stdout is closed, ")
    assert shell("inspect", weights, stdout=None, stderr=None, **close(0, 1, 2)).returncode == 2
    without_notes = shell("inspect", weights, stderr=None, **close(0, 2))
    assert without_notes.returncode == 0
    assert without_notes.stdout.endswith("add --arch.\n")


_TERMINATED_AT = """
import os, signal, sys
event = sys.argv.pop()

def hook(name, args):
    if name == event and any("o.onnx" in str(arg) or "weights" in str(arg) for arg in args):
        os.kill(os.getpid(), signal.SIGTERM)

sys.addaudithook(hook)
from qcompress_cli.main import main
main()
"""


@pytest.mark.parametrize("event", ["tempfile.mkstemp", "os.rename", pytest.param("os.remove", marks=pytest.mark.slow)])
def test_sigterm_leaves_nothing_half_written(event, shell, folder):
    torch.save(torch.nn.Linear(8, 8), folder / "m.pt")
    args = ("m.pt", "--input-shape", "1,8", "--bits", "4", "--effort", "fast", "-o", "o.onnx")
    done = shell("export", *args, event, code=_TERMINATED_AT)
    assert done.returncode == (0 if event == "os.remove" else 130), done.stderr
    assert "Traceback" not in done.stderr
    assert {p.name for p in folder.iterdir()} - {"o.onnx"} == {"m.pt"}


@pytest.mark.parametrize("package", ["click", "numpy"])
def test_ctrl_c_while_it_starts(package, shell, weights):
    """An import that is broken off made a traceback, or another error, which then was called a bug."""
    code = (
        "import os, signal, sys, qcompress_cli.main as m\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {package!r}:\n"
        "            try:\n"
        "                os.kill(os.getpid(), signal.SIGINT)\n"
        "            except KeyboardInterrupt:\n"
        "                raise RuntimeError('half imported') from None\n"
        "sys.meta_path.insert(0, Finder())\n"
        "m.main()"
    )
    done = shell("inspect", weights, code=code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_outside_of_imports_unwinds(shell, weights):
    code = (
        "import os, signal, qcompress_cli.main as m, qcompress_cli.app as app\n"
        "def run(args):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    finally:\n"
        "        print('cleaned up')\n"
        "app.run = run\n"
        "m.main()"
    )
    done = shell("inspect", weights, code=code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "cleaned up\n", "interrupted\n")


def test_a_terminal_without_greek_letters_is_no_bug(shell, weights, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = shell("analyze", weights)
    assert done.returncode == 0
    assert ">3? %" in done.stdout


def test_the_start_knows_the_exit_codes():
    """It imports nothing before it has looked after Ctrl-C, not even the module that holds them."""
    assert (main._BAD_INPUT, main._INTERRUPTED) == (exits.BAD_INPUT, exits.INTERRUPTED)
