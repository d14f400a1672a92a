"""The checks that every array of samples must pass, whatever it comes from. The caller adds the file to messages."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import numpy.typing as npt

from qcompress.errors import DataError
from qcompress.graph.conversion import TORCH_DTYPES, to_numpy
from qcompress.user_code import one_line

if TYPE_CHECKING:
    import torch

Arrays = dict[str, npt.NDArray[Any]]

# bfloat16 and float8: numpy cannot compute with them, and float32 holds each of their values exactly.
_WIDENED: Final = frozenset(dtype for dtype in TORCH_DTYPES.values() if dtype.isbuiltin != 1)
_BLOCK: Final = 1 << 22  # elements that are processed together


def as_array(value: object) -> npt.NDArray[Any]:
    """An array of samples from an array, a torch tensor, a number or a list; bfloat16 and float8 become float32.

    Raises:
        DataError: it has no regular shape, or cannot become an array.

    >>> as_array([1.0, 2.0])
    array([1., 2.])
    """
    try:
        array = to_numpy(cast("torch.Tensor", value)) if hasattr(value, "detach") else np.asarray(value)
        return array.astype(np.float32) if array.dtype in _WIDENED else array
    except Exception as e:
        raise DataError(f"an array or a tensor is needed, got {type(value).__name__} ({one_line(e)}).") from None


def check_layout(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Refuse an array that cannot be a batch of samples.

    Raises:
        DataError: its elements are not real numbers, it has no axis for the samples, or it is empty.

    >>> check_layout("x", np.dtype("f4"), (5, 3))
    """
    if dtype.kind == "O":
        raise DataError(
            f"array {name!r} must hold numbers, but it holds Python objects, which are never unpickled: "
            "save it again with a numeric dtype."
        )
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise DataError(
            f"array {name!r} must hold numbers (bool, integer or float of at most 64 bits), got {dtype}: convert it."
        )
    if not shape:
        raise DataError(
            f"array {name!r} must have the samples along its first axis, got a single number: save a batch of samples."
        )
    if shape[0] == 0:
        raise DataError(f"array {name!r} must hold at least one sample, got shape {list(shape)}.")
    if 0 in shape:
        raise DataError(f"array {name!r} must not be empty, got shape {list(shape)}.")


def check_lengths(lengths: Mapping[str, int], hint: str = "") -> None:
    """Refuse arrays of different lengths.

    Args:
        lengths: numbers of samples by array name.
        hint: what to do about it, for the message.

    Raises:
        DataError: the lengths differ.
    """
    if len(set(lengths.values())) > 1:
        text = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"all arrays must have the same number of samples, got {text}.{hint}")


def check_finite(name: str, values: npt.NDArray[Any]) -> None:
    """Refuse NaN and Inf.

    Raises:
        DataError: some samples hold one; the message counts them.
    """
    if values.dtype.kind != "f":
        return
    bad = sum(int((~np.isfinite(block)).reshape(len(block), -1).any(axis=1).sum()) for block in blocks(values))
    if bad:
        raise DataError(
            f"array {name!r} must be finite, but {bad} of {len(values)} samples hold NaN or Inf: drop them."
        )


def hash_bytes(values: npt.NDArray[Any]) -> bytes:
    """The SHA-256 of the elements in row-major order."""
    state = hashlib.sha256()
    for block in blocks(values):
        state.update(block.tobytes())
    return state.digest()


def blocks(values: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """Split an array into pieces of whole samples, so that a mapped file is never in memory as a whole."""
    step = max(1, _BLOCK * len(values) // max(1, values.size))
    return (values[start : start + step] for start in range(0, len(values), step))
