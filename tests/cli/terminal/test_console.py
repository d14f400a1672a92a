"""What goes to stdout: whole tables, JSON alone, and the truth where it cannot be written."""

import errno
import io
import json
import os
import re
import sys
from pathlib import Path

import click
import pytest
from rich.console import Console

from qcompress.errors import OutputError
from qcompress_cli.terminal.console import Ui, new_table


@pytest.mark.parametrize("width", [50, 60, 80])
def test_no_cell_is_cut_on_a_narrow_terminal(width):
    why = "native types (opset 21) save 35.8% of the file, and the target reads them all the same"
    table = new_table("tensor", ["shape", "bits", "bytes", "why"], left=["why"])
    table.add_row("a.very.long.name.of.a.layer.weight", "512x512x3x3", "4", "1,179,648", why)
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert max(map(len, lines)) <= width
    words = re.sub(r"\s+", "", "".join(lines))
    for cell in ("512x512x3x3", "1,179,648"):
        assert cell in words
    column = lines[0].index("why")
    assert " ".join(line[column:].strip() for line in lines[2:]) == why


class Full(io.StringIO):
    def flush(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_stdout_that_fails_tells_what_was_written(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Full())
    ui = Ui()
    with pytest.raises(OutputError, match=r"^stdout cannot be written: No space left on device\.$"):
        ui.show("a result")
    ui.wrote(Path("net.onnx"))
    with pytest.raises(OutputError, match=r"device\. These files were written: net\.onnx\.$"):
        ui.show("a result")


def test_a_full_device_is_told_once(shell, weights):
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = shell("inspect", weights, stdout=full)
    assert (done.returncode, done.stderr) == (2, "error: stdout cannot be written: No space left on device.\n")


@pytest.mark.parametrize("both", [False, True])
def test_an_error_that_cannot_be_told_keeps_its_exit_code(shell, both):
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = shell("analyze", "none.pt", stderr=full, **({"stdout": full} if both else {}))
    assert done.returncode == 2


def test_with_json_what_users_print_goes_to_stderr(capsys):
    with click.Context(click.Command("any")):
        ui = Ui(json=True)
        print("from the user's own code")
        ui.emit({"a": 1})
    print("after it")
    out, err = capsys.readouterr()
    assert json.loads(out.removesuffix("after it\n")) == {"a": 1}
    assert err == "from the user's own code\n"
