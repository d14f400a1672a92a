import click
import pytest
from click.testing import CliRunner

from qcompress_cli.inputs import options
from qcompress_cli.inputs.shapes import Dynamic, InputShape


def parse(*args):
    """What a command with all shared flags gets from a command line."""
    got = {}

    @options.command("all")
    @options.model_argument
    @options.source_options
    @options.input_options
    @options.metric_options
    @options.output_options
    @options.common_options
    def command(**flags):
        got.update(flags)

    result = CliRunner().invoke(command, args)
    return got if result.exit_code == 0 else result.output


def test_a_flag_that_was_not_given_is_none_or_empty():
    for name, value in parse().items():
        assert value in (None, (), {}) or name in ("json", "quiet", "seed", "debug"), name


def test_arch_kwargs_take_every_pair_that_follows():
    got = parse("--arch-kwargs", "num_classes=10", "width=0.75", "model.pt", "--arch-kwargs", "bias=False")
    assert got["arch_kwargs"] == {"num_classes": 10, "width": 0.75, "bias": False}
    assert str(got["model"]) == "model.pt"
    assert parse("a=1.pt", "--arch-kwargs", "k=v", "--force")["arch_kwargs"] == {"k": "v"}
    assert "must read key=value, got 'k'." in parse("--arch-kwargs", "k")


def test_shapes_names_and_axes():
    got = parse(
        "--input-shape", "ids=1,8:int64", "--input-shape", "x=1,3", "--input-names", "a, b", "--dynamic", "a:1=length"
    )
    assert got["input_shape"] == (
        InputShape(shape=(1, 8), name="ids", dtype="int64"),
        InputShape(shape=(1, 3), name="x"),
    )
    assert got["input_names"] == ("a", "b")
    assert got["dynamic"] == (Dynamic(name="a", axis=1, label="length"),)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--input-shape", "a,b"), "An input shape must read like"),
        (("--input-shape", "2,99999999999999999999999"), "An input shape must hold at most 268,435,456 elements, got"),
        (("--input-shape", "2,134217729"), "An input shape must hold at most 268,435,456 elements, got"),
        (("--dynamic", "x"), "A dynamic axis must read like"),
        (("--input-names", "a,a"), "must be distinct names"),
        (("--device", "tpu"), "'tpu' is not one of"),
    ],
)
def test_wrong_values_are_usage_errors(args, message):
    assert message in parse(*args)


def test_help_says_what_runs_the_users_code():
    @options.command("all")
    @options.source_options
    @options.input_options
    @options.metric_options
    def command(**flags): ...

    text = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    assert isinstance(command, click.Command)
    for phrase in ("path/file.py:factory. Runs your code.", "Runs whatever code it carries.", "which runs your code."):
        assert phrase in text
