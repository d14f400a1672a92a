"""A new field of the plan is one row: no list of the package is edited for it.

The row alone makes the key of TOML, the option with its help, the accessor of each weight, the rules, the column of
--dry-run, the JSON and the documentation.
"""

import json
import runpy
from pathlib import Path

import pytest
from click.testing import CliRunner

from qcompress.errors import ConfigError
from qcompress.plan.fields import FIELDS, PlanField
from qcompress.plan.plan import Plan, load_plan, parse_plan
from qcompress.plan.resolve import resolve
from qcompress.plan.settings import Settings
from qcompress.plan.values import Integer
from qcompress_cli.commands.export import export_command
from qcompress_exporters.onnx_format import file as onnx_file
from tests.helpers import small_models

DOCS = Path(__file__).parents[2] / "docs"
ZEROS = PlanField(
    name="zeros_percent",
    values=Integer(0, 99),
    meaning="Share of weights that are set to zero, in percent.",
    unset="0",
    reads_as={None: 0},
    schemes=("palette",),
)


class Toy(Settings):
    fields = (*FIELDS, ZEROS)


NET = [("stem.weight", "conv"), ("fc.weight", "linear")]
TEXT = "version = 1\n[default]\nbits = 2\n[kind.linear]\nzeros_percent = 50\n"


def test_it_is_parsed_resolved_and_saved():
    resolved = resolve(parse_plan(TEXT, "p", Toy), NET)
    assert [t.zeros_percent for t in resolved.tensors] == [0, 50]
    assert resolved["fc.weight"].origins["zeros_percent"] == "p:5 [kind.linear]"
    again = resolve(parse_plan(resolved.to_toml(), "p", Toy), NET)
    assert again.digest == resolved.digest != resolve(Plan.from_flags(bits=2), NET).digest
    assert Plan(default=Toy()).with_flags(zeros_percent=5).default == Toy(zeros_percent=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zeros_percent = 100", r"^p:4 \[default\] zeros_percent must be an integer in \[0, 99\], got 100\.$"),
        (
            "zeros_per = 1",
            r"^p:4 \[default\] zeros_per: unknown key; known: .*, zeros_percent\. Did you mean zeros_",
        ),
        (
            'zeros_percent = 5\nscheme = "uniform"',
            r'^stem\.weight: zeros_percent = 5 \(p:4 \[default\]\) applies to scheme "palette" only, but scheme = '
            r'"uniform" \(p:5 \[default\]\); set scheme = "palette", or remove zeros_percent\.$',
        ),
    ],
)
def test_wrong_values_and_combinations_are_errors(text, message):
    with pytest.raises(ConfigError, match=message):
        resolve(parse_plan(f"version = 1\n[default]\nbits = 2\n{text}\n", "p", Toy), NET)


def test_without_its_row_it_is_unknown():
    with pytest.raises(ConfigError, match=r"zeros_percent: unknown key; known: bits, "):
        parse_plan(TEXT)
    with pytest.raises(ConfigError, match=r"^--zeros-percent: unknown key"):
        Plan.from_flags(zeros_percent=5)
    with pytest.raises(AttributeError, match="TensorPlan has no attribute 'zeros_percent'"):
        resolve(Plan.from_flags(bits=2), NET)["fc.weight"].zeros_percent  # noqa: B018


@pytest.fixture
def export(tmp_path, monkeypatch):
    """Run `export` with the toy field."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(onnx_file, "trace", small_models.trace_once)
    Path("model.pt").write_bytes(small_models.pt2())

    def run(*args):
        return CliRunner().invoke(export_command(Toy), [*args], obj=args)

    return run


def test_it_is_an_option_and_shown_before_anything_is_written(export):
    help_text = " ".join(export("--help").stdout.split())
    assert "--zeros-percent 0-99 Share of weights that are set to zero, in percent. Default: 0." in help_text
    args = ("model.pt", "--bits", "2", "--effort", "fast", "--zeros-percent", "50", "--dry-run")
    result = export(*args)
    assert result.exit_code == 0, result.output
    header, *rows = (line.split() for line in result.stdout.splitlines() if line.strip())
    assert header[:6] == ["tensor", "kind", "bits", "scheme", "rows_per_lut", "zeros_percent"]
    assert next(row for row in rows if row[0] == "stem.weight")[5] == "50"
    assert "zeros_percent: --zeros-percent" in result.stdout
    (stem,) = [t for t in json.loads(export(*args, "--json").stdout)["plan"] if t["name"] == "stem.weight"]
    assert (stem["settings"]["zeros_percent"], stem["set_by"]["zeros_percent"]) == (50, "--zeros-percent")
    assert [p.name for p in Path().iterdir()] == ["model.pt"]


def test_wrong_options_are_errors_before_any_work(export):
    assert "Invalid value for '--zeros-percent': must be an integer in [0, 99], got 100." in (
        export("model.pt", "--bits", "2", "--zeros-percent", "100").output
    )
    result = export("model.pt", "--bits", "2", "--scheme", "uniform", "--zeros-percent", "5")
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith("zeros_percent = 5 (--zeros-percent) applies to scheme")


def test_it_is_documented():
    page = runpy.run_path(str(DOCS / "make_plan.py"))["page"]
    assert (DOCS / "plan.md").read_text(encoding="utf-8") == page(), "run python docs/make_plan.py"
    added = [line for line in page(Toy.fields).splitlines() if line not in page().splitlines()]
    assert added == [
        "| `zeros_percent` | `--zeros-percent` | an integer in [0, 99] | 0 |",
        "### `zeros_percent`",
        'Share of weights that are set to zero, in percent. Applies to `scheme` = `"palette"` only.',
    ]


def test_a_plan_file_is_read_with_it(tmp_path):
    (tmp_path / "plan.toml").write_text(TEXT)
    assert load_plan(tmp_path / "plan.toml", Toy).kind["linear"] == Toy(zeros_percent=50)
