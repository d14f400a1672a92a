"""Strided views of raw bytes, and the bounds that a file's views must keep."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompress.errors import SourceError
from qcompress.sources.base import LazyArray
from qcompress.zip_archive import Bytes

MAX_AXES: Final = 32
_LARGEST: Final = (1 << 63) - 1  # bytes, where axes of length 0 are counted as 1
# A view may have more elements than its storage (an expanded tensor), but only so many: otherwise a few bytes of a
# hostile file could become terabytes.
MAX_EXPANDED: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class Strided:
    """A view of a storage, as a file describes it.

    Args:
        storage: the key of the storage. Two equal views are one tied tensor.
        dtype: numpy dtype of the elements.
        offset: first element, counted in elements.
        shape: the view's shape.
        stride: the view's strides, counted in elements.
    """

    storage: str
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def check_view(view: Strided, storage_nbytes: int, what: str) -> None:
    """Refuse a view that reaches outside its storage.

    Args:
        view: the view as the file describes it.
        storage_nbytes: size of the storage in bytes.
        what: the tensor's name in messages.

    Raises:
        SourceError: a number is negative, there are over 32 axes, an element lies outside, or no array has this shape.

    >>> check_view(Strided("0", np.dtype(np.float32), 0, (2, 3), (3, 1)), 24, "w")
    """
    numbers = (view.offset, *view.shape, *view.stride)
    if len(view.shape) != len(view.stride) or len(view.shape) > MAX_AXES or any(n < 0 for n in numbers):
        raise SourceError(
            f"{what} is damaged: shape {list(view.shape)}, strides {list(view.stride)} and offset {view.offset} cannot "
            "describe a tensor. Save the file again."
        )
    if math.prod(max(n, 1) for n in view.shape) * view.dtype.itemsize > _LARGEST:
        raise SourceError(f"{what} is damaged: no array can have the shape {list(view.shape)}. Save the file again.")
    count = math.prod(view.shape)
    if not count:
        return
    last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.stride, strict=True))
    if (last + 1) * view.dtype.itemsize > storage_nbytes:
        raise SourceError(
            f"{what} is damaged: shape {list(view.shape)} of {view.dtype} needs {(last + 1) * view.dtype.itemsize} "
            f"bytes, but its data has {storage_nbytes}. Save the file again."
        )
    if count > max(storage_nbytes // view.dtype.itemsize, MAX_EXPANDED):
        raise SourceError(f"{what} is refused: {storage_nbytes} bytes of data claim to be {count} elements.")


def lazy_view(view: Strided, read: Callable[[], Bytes]) -> LazyArray:
    """Return the array of a checked view; `read` returns the bytes of its storage.

    >>> data = np.arange(6, dtype=np.float32).view(np.uint8)
    >>> np.asarray(lazy_view(Strided("0", np.dtype(np.float32), 0, (3, 2), (1, 3)), lambda: data)).tolist()
    [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    """

    def load() -> npt.NDArray[Any]:
        if not math.prod(view.shape):
            return np.zeros(view.shape, view.dtype)
        data = read()
        size = view.dtype.itemsize
        strides = [s * size for s in view.stride]
        strided: npt.NDArray[Any] = np.ndarray(view.shape, view.dtype, data.data, view.offset * size, strides)
        return np.ascontiguousarray(strided).reshape(view.shape)

    return LazyArray(view.shape, str(view.dtype), load)
