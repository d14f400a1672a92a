"""Every code block of the README runs, and the Python in docs/ too.

`python` blocks are executed one after the other in one namespace. Of `console` and `sh` blocks the lines that begin
with `qcompress` (after an optional `$ `) are run; each must exit 0. All of it happens in a folder that holds what the
digits sample writes, and its `net.py`. The line above a fence may be a comment:
`<!-- skip: takes an hour -->` leaves the block out and says why; `<!-- file: mixed.toml -->` puts its text into the
folder under that name, before anything runs.
"""

import contextlib
import io
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qcompress_exporters.onnx_format import file as onnx_file
from qcompress_exporters.parity import validate as parity
from tests.helpers import small_models

README = Path(__file__).parents[1] / "README.md"
_FENCE = re.compile(
    r"(?:^<!-- (?P<note>skip|file): (?P<text>.+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
_SHELLS = ("console", "sh", "bash")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line it starts at, why it does not run, and the file that it is."""

    language: str
    code: str
    line: int
    skip: str | None = None
    file: str | None = None


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown text."""
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        notes = {match["note"]: match["text"]} if match["note"] else {}
        yield Block(match["language"], match["code"], line, **notes)


def commands(code: str) -> list[str]:
    """The qcompress commands of a shell block; a line that ends in a backslash goes on."""
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in (raw.strip().removeprefix("$ ") for raw in lines) if line.split()[:1] == ["qcompress"]]


BLOCKS = list(blocks(README.read_text(encoding="utf-8")))
RUNNABLE = [block for block in BLOCKS if block.language in ("python", *_SHELLS)]


@pytest.fixture(scope="module")
def session(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """One folder and one Python namespace for the whole README: a block may use what those before it made."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(digits, folder, dirs_exist_ok=True)
    shutil.copy(README.parent / "samples" / "digits" / "net.py", folder)
    for block in BLOCKS:
        if block.file is not None:
            (folder / block.file).write_text(block.code, encoding="utf-8")
    return folder, {"__name__": "__readme__"}


@pytest.mark.parametrize("block", RUNNABLE, ids=lambda block: f"line {block.line}")
def test_a_block_runs(block, session, monkeypatch):
    if block.skip is not None:
        pytest.skip(block.skip)
    folder, namespace = session
    monkeypatch.chdir(folder)
    monkeypatch.setattr("qcompress.posthoc.synthesis._STEPS", 2)  # that commands run is what counts here
    monkeypatch.setattr("qcompress_cli.commands.validate._TIMING_S", 0.1)
    for module in (onnx_file, parity):
        monkeypatch.setattr(module, "trace", small_models.trace_once)
    if block.language == "python":
        exec(compile(block.code, f"README.md:{block.line}", "exec"), namespace)
        return
    from qcompress_cli.main import run

    for command in commands(block.code):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = run(shlex.split(command, comments=True)[1:])
        assert code == 0, f"`{command}` exited {code}:\n{output.getvalue()}"


@pytest.mark.parametrize("page", sorted((README.parent / "docs").glob("*.md")), ids=lambda page: page.name)
def test_python_in_the_documents_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__docs__"}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "python":
            exec(compile(block.code, f"{page.name}:{block.line}", "exec"), namespace)


def test_blocks_are_found_with_their_language_line_and_reason():
    text = (
        "# A\n\n```python\nx = 1\n```\n\n<!-- skip: needs a GPU -->\n```sh\nqcompress analyze\n```\n"
        "<!-- file: plan.toml -->\n```toml\nversion = 1\n```\n"
    )
    assert list(blocks(text)) == [
        Block("python", "x = 1\n", 3),
        Block("sh", "qcompress analyze\n", 8, skip="needs a GPU"),
        Block("toml", "version = 1\n", 12, file="plan.toml"),
    ]


def test_only_qcompress_commands_are_taken_from_a_shell_block():
    code = (
        "$ qcompress analyze model.pt  # look\ntotal 3\npip install qcompress\nqcompress export m.pt \\\n  --bits 2\n\n"
    )
    assert commands(code) == ["qcompress analyze model.pt  # look", "qcompress export m.pt    --bits 2"]
