"""docs/json.md and what the commands write are held together, key by key."""

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "json.md"
TYPES = {
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "table": lambda v: isinstance(v, dict),
    "list": lambda v: isinstance(v, list),
}


def documented(command):
    section = re.search(rf"^## {command}$(.*?)(?=^## |\Z)", DOCS.read_text(encoding="utf-8"), re.M | re.S)
    return dict(re.findall(r"^\| `([^`]+)` \| (\S+) \|", section[1], re.M))


def written(value, keys, path=""):
    """Every value of a document with its path in the notation of the docs."""
    if isinstance(value, list):
        if path in keys:
            yield path, value
        for item in value:
            yield from written(item, keys, f"{path}[]")
    elif isinstance(value, dict):
        if path in keys or path.endswith("[]"):
            yield path, value
        by_name = any(key.startswith(f"{path}{{}}") for key in keys)
        for key, item in value.items():
            inner = f"{path}{{}}" if by_name else f"{path}.{key}".lstrip(".")
            yield from written(item, keys, inner)
    else:
        yield path, value


def check(command, stdout):
    keys = documented(command)
    found = list(written(json.loads(stdout), keys))
    for path, value in found:
        assert path in keys, f"{path} is not in docs/json.md"
        kinds = keys[path]
        null = value is None and kinds.endswith("?")
        assert null or any(TYPES[kind](value) for kind in kinds.rstrip("?").split("/")), (path, value, kinds)
    return set(keys) - {path for path, _ in found}


@pytest.mark.parametrize("command", ["analyze", "inspect"])
def test_a_model(command, qcompress, weights):
    result = qcompress(command, weights, "--json")
    assert result.exit_code == 0
    # No tensor of a .safetensors file is tied.
    assert check(command, result.stdout) == {"tensors[].aliases[]"}


def test_gate(qcompress, onnx_file, validated):
    path = validated(onnx_file(original_bytes=100_000))
    limits = ("--max-size", "1MB", "--min-ratio", "8", "--max-drop", "1%", "--min-agreement", "0.9")
    result = qcompress("gate", path, *limits, "--json")
    assert result.exit_code == 0
    assert check("gate", result.stdout) == set()
    assert [v["limit"] for v in json.loads(result.stdout)["verdicts"]] == [
        "max_size",
        "min_ratio",
        "max_drop",
        "min_agreement",
    ]


@pytest.fixture
def model(folder, monkeypatch):
    from qcompress_exporters.onnx_format import file as onnx_file
    from qcompress_exporters.parity import validate as parity
    from tests.helpers import small_models

    for module in (onnx_file, parity):
        monkeypatch.setattr(module, "trace", small_models.trace_once)
    (folder / "model.pt").write_bytes(small_models.pt2())
    (folder / "test.npz").write_bytes(small_models.npz())
    return folder / "model.pt"


def test_export_and_validate(qcompress, model):
    result = qcompress(
        "export", model, "--bits", "2", "--rows-per-lut", "4", "--vector-dim", "1", "--lut-dtype", "float16", "--json"
    )
    assert result.exit_code == 0
    # Of integer compute and of calibration data.
    integer = (
        "layers[]", "activations[]", "auto.", "float_operators{}", "solved[]", "plan[].settings.activation_bits",
        "plan[].settings.block_size",
    )  # fmt: skip
    assert {k for k in check("export", result.stdout) if not k.startswith(integer)} == {"notes[]"}
    assert json.loads(result.stdout)["file"] == "model.w2.onnx"
    result = qcompress("validate", model, "model.w2.onnx", "--data", "test.npz", "--json")
    assert result.exit_code == 0
    assert check("validate", result.stdout) == {"activation_bits{}", "notes[]"}
    assert Path("model.w2.onnx.validation.json").read_text() == result.stdout


def test_export_in_blocks(qcompress, model):
    flags = ("--bits", "4", "--scheme", "uniform", "--block-size", "4", "--json")
    dry = qcompress("export", model, *flags, "--dry-run")
    result = qcompress("export", model, *flags)
    assert result.exit_code == 0
    assert json.loads(dry.stdout)["bytes"] == json.loads(result.stdout)["bytes"]
    assert "plan[].settings.block_size" not in check("export", result.stdout)
    document = json.loads(result.stdout)
    assert [t["name"] for t in document["plan"] if "block_size" in t["set_by"]] == ["head.weight"]
    assert document["bytes"]["file"] == Path(document["file"]).stat().st_size


def test_export_for_integer_compute(qcompress, model):
    flags = ("--bits", "4", "--vector-dim", "1", "--activation-bits", "4", "--calibration", "test.npz")
    result = qcompress("export", model, *flags, "--json")
    assert result.exit_code == 0
    others = {"notes[]", "plan[].settings.block_size", "plan[].settings.lut_dtype", "float_operators{}"}
    assert {k for k in check("export", result.stdout) if not k.startswith("auto.")} == others
    document = json.loads(result.stdout)
    assert (document["compute"], document["format"]) == ("int8", "qdq")
    assert {layer["compute"] for layer in document["layers"]} == {"int8"}
    assert document["file"] == "model.w4a4.onnx"
    result = qcompress("validate", model, "model.w4a4.onnx", "--data", "test.npz", "--no-timing", "--json")
    assert result.exit_code == 0
    assert all(key.startswith(("notes", "timing.")) for key in check("validate", result.stdout))
    validated = json.loads(result.stdout)
    assert len(validated["layers"]) == len(document["activations"])
    widths = {layer["weight"]: layer["activation_bits"] for layer in document["layers"]}
    assert validated["activation_bits"] == widths
    assert all(layer["activation_bits"] == widths.get(layer["layer"]) for layer in validated["layers"])
    assert set(widths.values()) == {4}
    said = qcompress("validate", model, "model.w4a4.onnx", "--data", "test.npz", "--no-timing").stdout
    assert re.search(r"^(\d) of \1 layers take activations at 4 bits$", said, re.M)


def test_what_auto_measured(qcompress, model, monkeypatch):
    from qcompress_exporters import auto_compute

    monkeypatch.setattr(auto_compute, "_SECONDS", 0.2)
    flags = ("--bits", "8", "--calibration", "test.npz", "--effort", "fast", "--dry-run", "--json")
    result = qcompress("export", model, *flags, "--compute", "auto")
    assert result.exit_code == 0
    missing = {key for key in check("export", result.stdout) if key.startswith("auto.")}
    auto = json.loads(result.stdout)["auto"]
    assert missing == (set() if auto["float_layers"] else {"auto.float_layers[]"})
    assert auto["picked"] in {candidate["name"] for candidate in auto["candidates"]}


def test_what_may_be_null(qcompress, model):
    import numpy as np

    from tests.helpers import small_models

    assert qcompress("export", model, "--bits", "8", "--save-compressed", "small", "--quiet").exit_code == 0
    result = qcompress("export", "small", "--dry-run", "--json")
    missing = check("export", result.stdout)
    assert {"plan[]", "plan[].name", "plan[].settings"} <= missing
    absent = ("plan", "notes", "layers[]", "activations[]", "solved[]", "auto.", "float_operators{}")
    assert all(key.startswith(absent) for key in missing)
    document = json.loads(result.stdout)
    assert (document["file"], document["plan"]) == (None, None)

    np.savez("unlabelled.npz", x=small_models.images(4))
    result = qcompress("validate", "small", "model.w8.onnx", "--data", "unlabelled.npz", "--no-timing", "--json")
    assert result.exit_code == 0
    assert all(
        key.startswith(("activation_bits", "metric.", "notes", "timing.")) for key in check("validate", result.stdout)
    )
    assert json.loads(result.stdout)["metric"] is None
    assert json.loads(result.stdout)["timing"] is None
    assert json.loads(result.stdout)["same_source"] is True
