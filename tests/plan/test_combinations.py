"""docs/combinations.md, cell by cell: what it says to work is exported, loaded and run, all else is refused."""

import functools
import itertools
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qcompress.data.dataset import as_dataset
from qcompress.errors import ConfigError
from qcompress.plan import combinations
from qcompress.plan.fields import FIELDS
from qcompress.plan.plan import Plan
from qcompress.plan.settings import Settings
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.settings import PosthocSettings
from qcompress_exporters import build
from qcompress_exporters.onnx_format import file as onnx_file
from qcompress_exporters.onnx_format.lower import FORMATS
from qcompress_exporters.onnx_format.targets import find
from qcompress_exporters.parity.sessions import run, session
from tests.helpers import nets, small_models

DOCS = Path(__file__).parents[2] / "docs" / "combinations.md"
NOWHERE = "-"
VALUES = {
    "compute": ["float", "int8", "dynamic8"],
    "format": [NOWHERE, "qdq", "integer"],
    "scheme": ["palette", "uniform", "auto"],
    "bits": [str(n) for n in range(1, 9)],
    "activation_bits": [NOWHERE, *(str(n) for n in range(1, 9))],
    "target": ["1.15", "1.16", "1.22", "1.24"],
}
WORDS = tuple(VALUES)


def table():
    """The rows: for each word the set of values that it fits, and the verdict."""
    rows = []
    for line in re.findall(r"^\| (.+) \|$", DOCS.read_text(encoding="utf-8"), re.M):
        *cells, verdict = line.split(" | ")
        if cells[0] == "compute":
            assert tuple(cells) == WORDS
            continue
        rows.append(({word: fits(word, cell) for word, cell in zip(WORDS, cells, strict=True)}, verdict))
    return rows


def fits(word, cell):
    if cell == "any":
        return set(VALUES[word])
    if cell in ("below 1.16", "1.16 and later"):
        return {v for v in VALUES[word] if (v < "1.16") == cell.startswith("below")}
    found = set()
    for part in cell.split(", "):
        low, _, high = part.partition("-")
        found |= {part} if part == NOWHERE or not high else {str(n) for n in range(int(low), int(high) + 1)}
    assert found <= set(VALUES[word]), cell
    return found


ROWS = table()
CELLS = [dict(zip(WORDS, values, strict=True)) for values in itertools.product(*VALUES.values())]


def verdict_of(cell):
    return next(verdict for row, verdict in ROWS if all(cell[word] in row[word] for word in WORDS))


REFUSED = {v: [c for c in CELLS if verdict_of(c) == v] for v in dict.fromkeys(v for _, v in ROWS) if v != "works"}
WORKS = [c for c in CELLS if verdict_of(c) == "works"]


def typed(cell):
    """A cell as the words of Python."""
    given = {word: value for word, value in cell.items() if value != NOWHERE}
    return given | {word: int(given[word]) for word in ("bits", "activation_bits") if word in given}


def test_the_table_and_the_code_have_the_same_words():
    assert len(ROWS) == 8
    assert {NOWHERE, *FORMATS} == set(VALUES["format"])
    assert all(REFUSED.values())
    assert len(WORKS) == 3 * (23 + 23 + 3 * 23 * 8)


def check(cell):
    """What the command line does before any work."""
    given = typed(cell)
    find(f"onnxruntime=={given.pop('target')}")
    settings = Settings(**{field.name: given.pop(field.name) for field in FIELDS if field.name in given})
    combinations.check(settings, **given)


@pytest.mark.parametrize("verdict", REFUSED)
def test_a_cell_that_does_not_work_names_the_word_to_change(verdict):
    words = verdict.removeprefix("change ").partition(":")[0].split(" or ")
    for cell in REFUSED[verdict]:
        with pytest.raises(ConfigError) as error:
            check(cell)
        assert all(word in str(error.value) for word in words), (cell, str(error.value))


@pytest.mark.parametrize("verdict", REFUSED)
def test_the_command_line_exits_2_and_writes_nothing(verdict, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from qcompress_cli.app import cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").write_bytes(small_models.pt2())
    (tmp_path / "x.npz").write_bytes(small_models.npz())
    cell = next(c for c in REFUSED[verdict] if len(set(map(verdict_of, neighbours(c)))) > 1)
    flags = [f"--{word.replace('_', '-')}={v}" for word, v in cell.items() if v != NOWHERE and word != "target"]
    args = ["export", "model.pt", *flags, f"--target=onnxruntime=={cell['target']}", "--calibration=x.npz"]
    result = CliRunner().invoke(cli, args)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert all(word in result.stderr for word in verdict.removeprefix("change ").partition(":")[0].split(" or "))
    assert {p.name for p in tmp_path.iterdir()} == {"model.pt", "x.npz"}


def neighbours(cell):
    return [cell | {word: value} for word in WORDS for value in VALUES[word]]


class Tiny(nn.Module):
    """A padded convolution, pooling and a linear head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.head = nn.Linear(8, 24)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))


IMAGES = nets.image(4, shape=(2, 5, 5))


@functools.cache
def program():
    torch.manual_seed(0)
    return nets.traced(Tiny().eval(), x=IMAGES)


@functools.cache
def tiny(compute, scheme, bits, activation_bits):
    plan = Plan.from_flags(bits=bits, scheme=scheme, activation_bits=activation_bits)
    settings = PosthocSettings(compute=compute, calibration_method="minmax")
    calibration = as_dataset({"x": IMAGES}) if compute == "int8" else None
    return compress_program(program(), plan, settings, calibration=calibration)


SLOW = [("int8", "uniform")]
CHOSEN = [
    # "auto" takes one of the other two, weight by weight.
    pytest.param(compute, scheme, marks=[pytest.mark.slow] if (compute, scheme) in SLOW or scheme == "auto" else [])
    for compute, scheme in itertools.product(VALUES["compute"], VALUES["scheme"])
]


@pytest.mark.parametrize(("compute", "scheme"), CHOSEN)
def test_a_cell_that_works_loads_and_runs(compute, scheme, monkeypatch):
    monkeypatch.setattr(onnx_file, "trace", small_models.trace_once)
    files, wanted = set(), {}
    for cell in WORKS:
        if (cell["compute"], cell["scheme"]) != (compute, scheme):
            continue
        given = typed(cell)
        if compute == "int8" and given["activation_bits"] not in (1, 4, 8):  # grids alone differ
            continue
        check(cell)
        small = tiny(compute, scheme, given["bits"], given.get("activation_bits"))
        target = find(f"onnxruntime=={cell['target']}")
        built = build(small, target=target.name, format=given.get("format"))
        if built.data in files:
            continue
        files.add(built.data)
        model = onnx.load_from_string(built.data)
        assert [entry.domain for entry in model.opset_import] == [""]  # no operators of ours
        assert model.opset_import[0].version in target.opsets
        assert built.report.compute == compute
        assert any(layer.compute == compute for layer in built.report.layers) == (compute != "float")
        (output,) = run(session(built.data, "deployed"), {"x": IMAGES}).values()
        assert np.isfinite(output).all()
        same = wanted.setdefault((cell["format"], cell["bits"], cell["activation_bits"]), output)
        np.testing.assert_array_equal(output, same)  # whatever the target
