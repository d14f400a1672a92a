"""Safetensors: the same values as the reference reader, every broken header refused, torch never imported."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompress.errors import SourceError
from qcompress.openers import load_source
from tests.helpers.examples import examples


def write(path, header: object, data: bytes, length: int | None = None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_values(tmp_path):
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(3, dtype=np.int64),
        "scalar": np.array(2.5, np.float16),
        "empty": np.zeros((0, 4), np.float32),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "model.bin", {"format": "np"})
    read = {t.name: np.asarray(t.array) for t in load_source(tmp_path / "model.bin").tensors()}
    assert read.keys() == arrays.keys()
    for name, values in arrays.items():
        assert read[name].dtype == values.dtype
        np.testing.assert_array_equal(read[name], values)


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_small_floats(tmp_path, name):
    values = torch.linspace(-4, 4, 10).to(getattr(torch, name))
    safetensors.torch.save_file({"w": values}, tmp_path / "m.safetensors")
    (tensor,) = load_source(tmp_path / "m.safetensors").tensors()
    assert tensor.array.dtype == name
    assert np.asarray(tensor.array).dtype == getattr(ml_dtypes, name)
    np.testing.assert_array_equal(np.asarray(tensor.array).astype(np.float32), values.float().numpy())


@pytest.mark.parametrize(
    ("header", "data", "match"),
    [
        ({"a": entry(offsets=(0, 80))}, bytes(8), r"'a' lies at bytes 0 to 80 of 8"),
        ({"a": entry(offsets=(8, 0))}, bytes(8), r"'a' lies at bytes 8 to 0 of 8"),
        (
            {"a": entry(), "b": entry(offsets=(4, 12))},
            bytes(12),
            r"'b' starts at byte 4, the tensor before it ends at 8",
        ),
        (
            {"a": entry(), "b": entry(offsets=(12, 20))},
            bytes(20),
            r"'b' starts at byte 12, the tensor before it ends at 8",
        ),
        ({"a": entry()}, bytes(9), r"its tensors take 8 bytes, but it holds 9"),
        (
            {"a": entry(shape=(1 << 62, 4))},
            bytes(8),
            r"'a' of shape \[4611686018427387904, 4\] and F32 cannot take 8 bytes",
        ),
        ({"a": entry(shape=(-2,))}, bytes(8), r"the entry of 'a' needs dtype, shape and data_offsets"),
        ({"a": entry(shape=(2.0,))}, bytes(8), r"the entry of 'a' needs dtype, shape and data_offsets"),
        ({"a": 3}, bytes(8), r"the entry of 'a' needs dtype, shape and data_offsets, got 3"),
        ({"a": entry("F4")}, bytes(8), r"tensor 'a' has dtype 'F4'; readable: F64, F32"),
        (b'{"a": 1, "a": 2}', b"", r"its header is not JSON \('a' occurs twice\)"),
        (b'{"a": ' + b"[" * 100_000, b"", r"its header is not JSON"),
        (b'{"a"', b"", r"its header is not JSON"),
        ({"__metadata__": {"format": "pt"}}, b"", r"no tensor found in .*: the safetensors file is empty"),
    ],
)
def test_broken_headers(tmp_path, header, data, match):
    with pytest.raises(SourceError, match=match):
        load_source(write(tmp_path / "m.safetensors", header, data))


def test_huge_header_length(tmp_path):
    with pytest.raises(SourceError, match=r"its header claims 9223372036854775807 bytes, the file has \d+"):
        load_source(write(tmp_path / "m.safetensors", {"a": entry()}, bytes(8), length=(1 << 63) - 1))


def test_truncated(tmp_path):
    path = write(tmp_path / "m.safetensors", {"a": entry()}, bytes(4))
    with pytest.raises(
        SourceError, match=r"damaged safetensors file: 'a' lies at bytes 0 to 8 of 4\. Copy or save it again"
    ):
        load_source(path)


@examples(200)
@given(st.data())
def test_a_changed_byte_is_read_or_refused(tmp_path_factory, data):
    path = write(
        tmp_path_factory.mktemp("f") / "m.safetensors", {"a": entry(), "b": entry("U8", (3,), (8, 11))}, bytes(11)
    )
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        for tensor in load_source(path).tensors():
            np.asarray(tensor.array)
    except SourceError:
        pass


@pytest.mark.parametrize("shape", [[0, 2**63], [0, 10**30], [0, 2**62], [0] + [2] * 32, [0, 2**31, 2**31]])
def test_shapes_that_no_array_can_have(tmp_path, shape):
    path = write(tmp_path / "m.safetensors", {"a": entry("F32", shape, (0, 0))}, b"")
    with pytest.raises(SourceError, match=r"is (a )?damaged.*no array can have the shape (of 'a'|\[0, )"):
        load_source(path)


def test_an_empty_tensor_of_a_large_shape(tmp_path):
    path = write(tmp_path / "m.safetensors", {"a": entry("F32", [0, 2**31], (0, 0))}, b"")
    (tensor,) = load_source(path).tensors()
    assert np.asarray(tensor.array).shape == (0, 2**31)


def test_torch_is_never_imported(tmp_path):
    safetensors.numpy.save_file({"w": np.zeros((2, 2), np.float32)}, tmp_path / "m.safetensors")
    code = (
        "import sys; from qcompress.openers import load_source\n"
        f"s = load_source({str(tmp_path / 'm.safetensors')!r}); list(s.tensors()); s.sha256; s.original_bytes\n"
        "assert 'torch' not in sys.modules and 'onnx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
