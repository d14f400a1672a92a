"""Raw bytes as arrays: strided views, and the bounds that a file must keep."""

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
# A view may hold more elements than its storage (an expanded tensor), but not without limit: a few bytes of a hostile
# file would become terabytes.
MAX_EXPANDED: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class Strided:
    """A view of a storage, as a file describes it.

    Args:
        storage: which storage, compared by value: two views of the same elements are one tied tensor.
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
        view: what the file says.
        storage_nbytes: bytes that are really there.
        what: who is told about in the message.

    Raises:
        SourceError: a negative number, more than 32 axes, or an element outside.

    >>> check_view(Strided("0", np.dtype(np.float32), 0, (2, 3), (3, 1)), 24, "w")
    """
    numbers = (view.offset, *view.shape, *view.stride)
    if len(view.shape) != len(view.stride) or len(view.shape) > MAX_AXES or any(n < 0 for n in numbers):
        raise SourceError(
            f"{what} is damaged: shape {list(view.shape)}, strides {list(view.stride)} and offset {view.offset} are no "
            "view of a tensor. Save the file again."
        )
    count = math.prod(view.shape)
    if not count:
        return
    last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.stride, strict=True))
    if (last + 1) * view.dtype.itemsize > storage_nbytes:
        raise SourceError(
            f"{what} is damaged: shape {list(view.shape)} of {view.dtype} needs {(last + 1) * view.dtype.itemsize} "
            f"bytes, its data holds {storage_nbytes}. Save the file again."
        )
    if count > max(storage_nbytes // view.dtype.itemsize, MAX_EXPANDED):
        raise SourceError(f"{what} is refused: {storage_nbytes} bytes of data claim to be {count} elements.")


def lazy_view(view: Strided, read: Callable[[], Bytes]) -> LazyArray:
    """The array of a checked view; `read` gives the bytes of its storage.

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
