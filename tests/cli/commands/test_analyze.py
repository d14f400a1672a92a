import contextlib
import json
import os
import pty
import re
import threading

import pytest

LONG = "a.very.long.name.of.a.layer.that.nobody.would.want.to.see.cut.weight"


def test_a_pipe_gets_one_table_with_nothing_cut(qcompress, weights):
    result = qcompress("analyze", weights)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert " ".join(lines[0].split()) == (
        "tensor shape count min max mean std range kurtosis >3σ % >6σ % NaN/Inf now 2 bits 3 bits 4 bits 8 bits"
    )
    (row,) = [line.split() for line in lines if line.startswith(LONG)]
    assert row[1:3] == ["32x32", "1,024"]
    assert row[-10:] == ["2.0", "kB", "272", "B", "416", "B", "576", "B", "2.0", "kB"]
    assert "3 weights to compress; the other 2 tensors stay as they are (not weights, or too small)." in lines
    assert result.stderr == (
        "warning: NaN or infinite values in features.0.bias; other commands reject such a model.\n"
    )
    assert qcompress("analyze", weights, "--quiet").stderr == ""


def test_hostile_names_are_written_out(qcompress, weights):
    for command in ("analyze", "inspect"):
        result = qcompress(command, weights)
        assert "\x1b" not in result.output
        assert "[red]evil\\x1b[31m" in result.stdout


def test_json_is_all_of_stdout(qcompress, weights):
    result = qcompress("analyze", weights, "--json")
    document = json.loads(result.stdout)
    assert document["model"] == str(weights)
    assert document["totals"]["non_finite"] == 16
    assert {t["name"] for t in document["tensors"]} >= {LONG, "features.0.weight"}


def test_the_model_may_stand_in_the_config(qcompress, weights, folder):
    (folder / "qcompress.toml").write_text('model = "model.safetensors"\narch = "no_such_module:Net"\n')
    assert qcompress("analyze").exit_code == 0  # a config's arch is code, and analyze runs none


@pytest.mark.parametrize("command", ["analyze", "inspect"])
def test_bad_models(command, refused, folder):
    (folder / "model.pt").write_text("hello")
    assert "model.pt must be a model, but it is a text file." in refused(command, "model.pt")
    assert "none.pt does not exist" in refused(command, "none.pt")
    (folder / "empty.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert "no tensor found in" in refused(command, "empty.safetensors").lower()
    (folder / "cut.safetensors").write_bytes((200).to_bytes(8, "little") + b'{"w": ')
    assert "damaged" in refused(command, "cut.safetensors")
    assert refused(command).endswith(
        "model files here: cut.safetensors, empty.safetensors, model.pt.\n"
        f"Type: qcompress {command} cut.safetensors\n"
        'or write model = "…" into qcompress.toml once.\n'
    )


def test_inspect_lists_names_kinds_and_shapes(qcompress, weights):
    result = qcompress("inspect", weights)
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["features.0.weight", "unknown", "16x3x3x3", "float32", "432"] in rows
    assert [LONG, "unknown", "32x32", "float16", "1,024"] in rows
    assert "5 tensors; a bare state dict does not tell all kinds; add --arch." in result.stdout


def test_inspect_shows_tied_names_and_kinds(qcompress, folder):
    import torch

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    module[1].weight = module[0].weight
    torch.save(module, folder / "model.pt")
    result = qcompress("inspect", "model.pt")
    assert result.exit_code == 0, result.output
    assert "1.weight (tied to 0.weight)" in result.stdout
    assert "3 tensors, 1 of them weights that a plan can compress." in result.stdout
    assert "Tied names, counted once: 1." in qcompress("analyze", "model.pt").stdout


@pytest.fixture
def terminal(monkeypatch, shell):
    """Run on a terminal so many columns wide and return the lines that it was sent, without styles."""

    def run(columns, *args):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm")
        ours, theirs = pty.openpty()
        sent = []
        reader = threading.Thread(target=lambda: sent.extend(_until_closed(ours)))
        reader.start()
        done = shell(*args, stdout=theirs)
        os.close(theirs)
        reader.join()
        os.close(ours)
        assert (done.returncode, done.stderr) == (0, "")
        return re.sub(r"\x1b\[[0-9;]*m", "", b"".join(sent).decode()).splitlines()

    return run


def _until_closed(terminal):
    with contextlib.suppress(OSError):
        while piece := os.read(terminal, 1 << 16):
            yield piece


@pytest.mark.parametrize(("columns", "tables"), [(80, 3), (120, 3), (250, 1)])
def test_on_a_terminal_nothing_is_wider_and_no_name_is_cut(columns, tables, terminal, weights):
    lines = terminal(columns, "analyze", weights, "--quiet")
    assert max(map(len, lines)) <= columns
    parts = "\n".join(lines).split("\ntensor ")
    assert len(parts) == tables
    for part in parts:  # names fold, and their pieces add up to the whole name
        assert LONG in "".join(line.split(" ")[0] for line in part.splitlines())
        assert "…" not in part
