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
}


def documented(command):
    section = re.search(rf"^## {command}$(.*?)(?=^## |\Z)", DOCS.read_text(encoding="utf-8"), re.M | re.S)
    return dict(re.findall(r"^\| `([^`]+)` \| (\S+) \|", section[1], re.M))


def written(value, path=""):
    """Every value of a document with its path in the notation of the docs."""
    if isinstance(value, list):
        for item in value:
            yield from written(item, f"{path}[]")
    elif isinstance(value, dict):
        if path.endswith("[]"):
            yield path, value
        for key, item in value.items():
            inner = f"{path}{{}}" if key.isdecimal() else f"{path}.{key}".lstrip(".")
            yield from written(item, inner)
    else:
        yield path, value


def check(command, stdout):
    keys = documented(command)
    found = list(written(json.loads(stdout)))
    for path, value in found:
        assert path in keys, f"{path} is not in docs/json.md"
        kind = keys[path]
        assert (value is None and kind.endswith("?")) or TYPES[kind.rstrip("?")](value), (path, value, kind)
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
