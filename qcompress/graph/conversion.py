"""Conversion between torch tensors and numpy arrays: every part of qcompress that converts calls these functions.

Both directions keep the shape, the dtype and every bit of every value (NaN payloads and signed zeros included):

| torch | numpy |
|---|---|
| bool, integers of 8 to 64 bits, float16, float32, float64, complex64, complex128 | the dtype of the same name |
| bfloat16, five kinds of float8 | the dtype of the same name in ml_dtypes, because numpy has no such dtype |
| complex32, quantized integers; sparse, nested and meta tensors | no array: `to_numpy` raises ConfigError |
| no tensor: `to_torch` raises ConfigError | text, objects, records, dates, float128, 4-bit types |

torch is imported by `to_torch` only when it is called, so that reading files does not need it.
"""

from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qcompress.errors import ConfigError

if TYPE_CHECKING:
    import torch

# The numpy dtype of each torch dtype, by torch's name for it without the "torch.".
TORCH_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
    "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint64": np.dtype(np.uint64),
    "uint32": np.dtype(np.uint32),
    "uint16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
# Integers that carry the bits of a dtype that the other library does not know, by itemsize.
_CARRIERS: Final = {1: "int8", 2: "int16"}


def numpy_dtype(dtype: "torch.dtype") -> np.dtype[Any]:
    """Return the numpy dtype that holds the values of a torch dtype.

    Raises:
        ConfigError: there is no such dtype.

    >>> import torch
    >>> numpy_dtype(torch.bfloat16)
    dtype(bfloat16)
    """
    found = TORCH_DTYPES.get(_name(dtype))
    if found is None:
        raise ConfigError(f"a dtype that numpy or ml_dtypes knows is needed, got {dtype}: convert the tensor.")
    return found


def has_array(tensor: "torch.Tensor") -> bool:
    """Return whether an array can hold a tensor's values: it is dense, has data, and its dtype is known to numpy.

    >>> import torch
    >>> has_array(torch.ones(2)), has_array(torch.eye(2).to_sparse()), has_array(torch.ones(2, device="meta"))
    (True, False, False)
    """
    is_dense = str(tensor.layout) == "torch.strided" and not tensor.is_nested
    return is_dense and not tensor.is_meta and _name(tensor.dtype) in TORCH_DTYPES


def to_numpy(tensor: "torch.Tensor") -> npt.NDArray[Any]:
    """Return a tensor's values as an array of the same shape, dtype and strides.

    Args:
        tensor: on any device, of any strides, with or without a gradient.

    Returns:
        The array. It shares the memory of a tensor on the CPU: copy it before you change it or train on.

    Raises:
        ConfigError: no array can hold its values: it is sparse, nested, quantized, on `meta`, or of an unknown dtype.

    >>> import torch
    >>> to_numpy(torch.ones(2, dtype=torch.bfloat16, requires_grad=True))
    array([1, 1], dtype=bfloat16)
    """
    if not has_array(tensor):
        raise ConfigError(
            f"a dense tensor of floats or integers is needed, got {tensor.dtype}, {tensor.layout}, on "
            f"{tensor.device}: convert it, with .to_dense() or .float() for example."
        )
    dtype = numpy_dtype(tensor.dtype)
    values = tensor.detach().cpu().resolve_conj().resolve_neg()
    if dtype.isbuiltin != 1:  # 2: added to numpy by ml_dtypes, unknown to torch
        import torch

        values = values.view(getattr(torch, _CARRIERS[dtype.itemsize]))
    array: npt.NDArray[Any] = values.numpy()
    return array if dtype.isbuiltin == 1 else array.view(dtype)


def to_torch(values: npt.ArrayLike) -> "torch.Tensor":
    """Return an array's values as a contiguous CPU tensor of the same shape and dtype, in its own memory.

    Args:
        values: an array of any strides and byte order, read-only or not, or a number or list that numpy understands.

    Raises:
        ConfigError: torch has no tensors of this dtype.

    >>> import ml_dtypes
    >>> to_torch(np.ones(2, ml_dtypes.bfloat16))
    tensor([1., 1.], dtype=torch.bfloat16)
    """
    import torch

    given = np.asarray(values)
    name = given.dtype.name
    dtype = TORCH_DTYPES.get(name)
    if dtype is None:
        raise ConfigError(f"an array of numbers that torch knows is needed, got {given.dtype}: convert it.")
    copied = np.array(given, dtype, order="C")
    if dtype.isbuiltin == 1:
        return torch.from_numpy(copied)
    return torch.from_numpy(copied.view(_CARRIERS[dtype.itemsize])).view(getattr(torch, name))


def _name(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")
