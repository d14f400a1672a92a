from pathlib import Path

import pytest

from qcompress.errors import ConfigError
from qcompress_cli.inputs.project import RunOptions, load_project, require_model, run_options
from qcompress_cli.inputs.shapes import Dynamic, InputShape, parse_dynamic, parse_input_shape


def write(text, name="qcompress.toml"):
    Path(name).write_text(text)


def test_no_config_gives_defaults():
    assert run_options({}) == RunOptions()
    write("[tool.other]\nx = 1", "pyproject.toml")
    assert run_options({}) == RunOptions()


EVERYTHING = """
model = "model.pt"
arch = "net.py:Net"
arch_kwargs = {num_classes = 10, width = 0.75}
calibration = "c.npz"
data = "d.npz:x,y"
input_shape = [1, 3, 32, 32]
transform = "t:f"
metric = "top1"
lower_is_better = true
target = "onnxruntime==1.24"
output = "out.onnx"
plan = "plan.toml"
bits = 2
"""


@pytest.mark.parametrize("name", ["qcompress.toml", "pyproject.toml"])
def test_every_key_is_read_from_both_files(name):
    write(EVERYTHING if name == "qcompress.toml" else "[tool.qcompress]\n" + EVERYTHING, name)
    assert run_options({}) == RunOptions(
        model=Path("model.pt"),
        arch="net.py:Net",
        arch_kwargs={"num_classes": 10, "width": 0.75},
        calibration="c.npz",
        data="d.npz:x,y",
        input_shape=(InputShape(shape=(1, 3, 32, 32)),),
        transform="t:f",
        metric="top1",
        lower_is_better=True,
        target="onnxruntime==1.24",
        output=Path("out.onnx"),
        plan=Path("plan.toml"),
        bits=2,
    )


def test_flags_win_key_by_key():
    write(EVERYTHING)
    merged = run_options({"model": Path("other.pt"), "bits": 4, "metric": None, "arch_kwargs": {"width": 1}, "own": 3})
    assert (merged.model, merged.bits, merged.metric) == (Path("other.pt"), 4, "top1")
    assert merged.arch_kwargs == {"num_classes": 10, "width": 1}


def test_another_arch_does_not_get_this_ones_arguments():
    write(EVERYTHING)
    assert run_options({"arch": "other:Net", "arch_kwargs": {"depth": 3}}).arch_kwargs == {"depth": 3}
    assert run_options({"arch": "other:Net", "arch_kwargs": {}}).arch_kwargs == {}


@pytest.mark.parametrize(
    ("shape", "parsed"),
    [
        ('"1,8"', (InputShape(shape=(1, 8)),)),
        (
            '["ids=1,8:int64", "x=1,3"]',
            (InputShape(shape=(1, 8), name="ids", dtype="int64"), parse_input_shape("x=1,3")),
        ),
        ("[1, 8]", (InputShape(shape=(1, 8)),)),
        ("[]", ()),
    ],
)
def test_input_shapes(shape, parsed):
    write(f"input_shape = {shape}")
    assert run_options({}).input_shape == parsed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle = 'x'", r"^qcompress\.toml: unknown key 'modle'\. Did you mean model\?$"),
        ("arch-kwargs = 1", r"^qcompress\.toml: unknown key 'arch-kwargs'\. Did you mean arch_kwargs\?$"),
        ("trust_pickle = true", r"^qcompress\.toml: unknown key 'trust_pickle'\."),
        ("bits = 9", r"^qcompress\.toml: bits: must be an integer in \[1, 8\], got 9\.$"),
        ("bits = true", r"^qcompress\.toml: bits: must be an integer in \[1, 8\], got True\.$"),
        ("bits = '2'", r"^qcompress\.toml: bits: must be an integer in \[1, 8\], got '2'\.$"),
        ("model = 3", r"^qcompress\.toml: model must be a valid string, got 3\.$"),
        ("input_shape = 'a,b'", r"^qcompress\.toml: input_shape: An input shape must read like"),
        ("model = ", r"^qcompress\.toml is not valid TOML: Invalid value"),
        ("bits = " + "9" * 5000, r"^qcompress\.toml is not valid TOML: an integer has too many digits\.$"),
    ],
)
def test_wrong_configs(text, message):
    write(text)
    with pytest.raises(ConfigError, match=message):
        run_options({})


def test_wrong_encoding_and_a_tool_that_is_no_table():
    Path("qcompress.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"^qcompress\.toml is not valid TOML"):
        run_options({})
    Path("qcompress.toml").unlink()
    write("tool.qcompress = 3", "pyproject.toml")
    with pytest.raises(ConfigError, match=r"^pyproject\.toml: tool\.qcompress must be a table, got 3\.$"):
        run_options({})


def test_two_configs_say_which_to_keep():
    write("bits = 2")
    write("[tool.qcompress]\nbits = 2", "pyproject.toml")
    with pytest.raises(ConfigError, match=r"^Both qcompress\.toml and .* configure this folder: keep qcompress\.toml"):
        load_project()


def test_require_model_names_the_files_and_the_command():
    for name in ("net.pt", "a b.safetensors", "notes.txt"):
        Path(name).touch()
    Path("folder.pt").mkdir()
    with pytest.raises(ConfigError) as caught:
        require_model(RunOptions(), ("export", "--bits", "2"))
    assert str(caught.value) == (
        "MODEL is missing, from the command line and from the config; model files here: a b.safetensors, net.pt.\n"
        "Type: qcompress export 'a b.safetensors' --bits 2\n"
        'or write model = "…" into qcompress.toml once.'
    )
    assert require_model(RunOptions(model=Path("x")), ()) == Path("x")


def test_require_model_in_an_empty_folder():
    with pytest.raises(ConfigError, match=r"no model file here \(\.pt, .*\)\.\nType: qcompress analyze MODEL\n"):
        require_model(RunOptions(), ("analyze",))


@pytest.mark.parametrize("text", ["", "1,,2", "a", "x=", "1,0", "1,2:float8", "=1,2", "1,-2", "1.5"])
def test_wrong_shapes(text):
    with pytest.raises(ConfigError):
        parse_input_shape(text)


@pytest.mark.parametrize("text", ["x", "x:0", "x=batch", ":0=b", "x:a=b", "x:0=1"])
def test_wrong_dynamic_axes(text):
    with pytest.raises(ConfigError, match=r"^A dynamic axis must read like NAME:0=batch, got"):
        parse_dynamic(text)


def test_parsed_forms():
    assert parse_input_shape("x=2,3:int64") == InputShape(shape=(2, 3), name="x", dtype="int64")
    assert parse_dynamic("x:0=batch") == Dynamic(name="x", axis=0, label="batch")
