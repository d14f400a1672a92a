"""Tensors and arrays turn into each other without losing a bit, whatever the dtype, strides and device."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompress.data.arrays import as_array
from qcompress.errors import ConfigError, SourceError
from qcompress.graph.conversion import TORCH_DTYPES, has_array, numpy_dtype, to_numpy, to_torch
from qcompress.sources.memory.module import lazy_tensor

NAMES = sorted(TORCH_DTYPES)
SHAPES = st.lists(st.integers(0, 4), max_size=3)


def bits(array: np.ndarray) -> bytes:
    return np.asarray(array, order="C").tobytes()


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """An array of any dtype, shape, strides and bits: NaN with a payload, infinities and negative zeros too."""
    dtype, shape = TORCH_DTYPES[draw(st.sampled_from(NAMES))], draw(SHAPES)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    data = np.frombuffer(draw(st.binary(min_size=nbytes, max_size=nbytes)), np.uint8)
    values = (data & 1 if dtype == np.bool_ else data).view(dtype).reshape(shape)
    values = values.transpose(draw(st.permutations(range(values.ndim))))
    return values[..., ::2] if values.ndim and draw(st.booleans()) else values


@given(arrays(), st.booleans())
def test_every_bit_comes_back(values, swapped):
    given = values.astype(values.dtype.newbyteorder()) if swapped and values.dtype.isbuiltin == 1 else values
    tensor = to_torch(given)
    assert str(tensor.dtype) == f"torch.{values.dtype.name}"
    assert tuple(tensor.shape) == values.shape
    assert tensor.is_contiguous()
    assert raw(tensor) == bits(values)
    back = to_numpy(tensor)
    assert (back.dtype, back.shape) == (values.dtype, values.shape)
    assert bits(back) == bits(values)


@given(arrays())
def test_a_tensor_of_any_strides_keeps_them(values):
    tensor = to_torch(values)
    turned = tensor.permute(list(reversed(range(tensor.ndim))))
    array = to_numpy(turned)
    assert bits(array) == raw(turned)
    assert array.size == 0 or [s // array.itemsize for s in array.strides] == list(turned.stride())


def test_the_table_is_complete():
    """A dtype that a newer torch adds is either in the table or known to have no array."""
    dtypes = {str(v).removeprefix("torch.") for v in vars(torch).values() if isinstance(v, torch.dtype)}
    without = {n for n in dtypes if n.startswith(("q", "bits")) or (n[-1] in "1234567" and n not in TORCH_DTYPES)}
    assert dtypes - without - {"complex32", "float4_e2m1fn_x2"} == set(TORCH_DTYPES)
    for name, dtype in TORCH_DTYPES.items():
        assert numpy_dtype(getattr(torch, name)) == dtype
        assert dtype.itemsize == getattr(torch, name).itemsize


@pytest.mark.parametrize("name", NAMES)
def test_what_a_tensor_carries_beside_its_values(name):
    """A gradient, a lazy conjugate or sign, and an expanded axis change nothing but the values that they stand for."""
    tensor = torch.ones(2, 3).to(getattr(torch, name))
    if tensor.is_floating_point() and tensor.element_size() > 1:
        assert bits(to_numpy(tensor.clone().requires_grad_())) == raw(tensor)
    if tensor.is_complex():
        turned = (tensor * (1 + 2j)).conj()
        assert turned.is_conj()
        np.testing.assert_array_equal(to_numpy(turned), np.full((2, 3), 1 - 2j, TORCH_DTYPES[name]))
        np.testing.assert_array_equal(to_numpy(turned.imag), np.full((2, 3), -2.0))
        assert turned.imag.is_neg()
    expanded = tensor[:, :1].expand(2, 5)
    assert to_numpy(expanded).shape == (2, 5)
    assert bits(to_numpy(expanded)) == raw(expanded)


def test_memory_is_shared_one_way_only():
    tensor = torch.zeros(3)
    to_numpy(tensor)[0] = 5
    assert tensor[0] == 5
    array = np.zeros(3, np.float32)
    to_torch(array)[0] = 5
    assert array[0] == 0
    array.flags.writeable = False
    to_torch(array)[0] = 5


def without_an_array() -> list[torch.Tensor]:
    return [
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        torch.ones(3, device="meta"),
        torch.ones(3, dtype=torch.complex32),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    ]


@pytest.mark.filterwarnings("ignore")  # torch warns that these are prototypes or deprecated
@pytest.mark.parametrize("index", range(7))
def test_tensors_without_an_array(index):
    tensor = without_an_array()[index]
    assert not has_array(tensor)
    with pytest.raises(ConfigError, match=r"^a dense tensor of floats or integers is needed, got torch\..*convert it"):
        to_numpy(tensor)
    with pytest.raises(SourceError, match=r"^tensor 'w' is torch\..*: it has no values to read\.$"):
        lazy_tensor(tensor, "w")


def test_a_dtype_without_an_array():
    with pytest.raises(ConfigError, match=r"dtype that numpy or ml_dtypes knows is needed, got torch\.complex32: conv"):
        numpy_dtype(torch.complex32)


@pytest.mark.parametrize(
    "values",
    [np.array(["a"]), np.array([{}], object), np.zeros(2, "i4,i4"), np.zeros(2, "M8[s]"), np.zeros(2, np.longdouble),
     np.zeros(2, ml_dtypes.int4), np.zeros(2, ml_dtypes.float8_e3m4)],
    ids=lambda v: v.dtype.name,
)  # fmt: skip
def test_arrays_without_a_tensor(values):
    with pytest.raises(ConfigError, match=r"^an array of numbers that torch knows is needed, got .*: convert it\.$"):
        to_torch(values)


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_small_floats_are_widened(name):
    """bfloat16 and float8 become float32 exactly, from a tensor and from an array; any other dtype stays."""
    tensor = torch.tensor([0.5, 2.0]).to(getattr(torch, name))
    expected = np.dtype(np.float32) if TORCH_DTYPES[name].isbuiltin != 1 else TORCH_DTYPES[name]
    for values in (tensor, to_numpy(tensor)):
        array = as_array(values)
        assert array.dtype == expected
        np.testing.assert_array_equal(array, to_numpy(tensor).astype(expected))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_from_a_cuda_device(name):
    tensor = torch.ones(2, 3).to(getattr(torch, name))
    assert bits(to_numpy(tensor.cuda().t())) == raw(tensor.t())


def test_reading_arrays_needs_no_torch():
    code = "import sys, qcompress.graph.conversion; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
