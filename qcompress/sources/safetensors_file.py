"""Reads .safetensors files: the header is checked, the tensors are mapped, and torch is not imported.

Source: https://huggingface.co/docs/safetensors (format: 8 bytes length N, N bytes of JSON, the data).
"""

import json
import math
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import ml_dtypes
import numpy as np

from qcompress.errors import SourceError
from qcompress.graph.options import ProgramOptions
from qcompress.kinds import UNKNOWN
from qcompress.sources.arch import program_of_state_dict, with_kinds_of
from qcompress.sources.base import SourceOptions, SourceTensor
from qcompress.sources.file_source import AbstractFile
from qcompress.sources.strided import MAX_AXES, Strided, check_view, lazy_view
from qcompress.zip_archive import Bytes

if TYPE_CHECKING:
    from qcompress.graph.program import FloatProgram

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "C64": np.dtype(np.complex64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
MAX_HEADER: Final = 100_000_000  # the format's own limit


@final
class SafetensorsSource(AbstractFile):
    """The tensors of a .safetensors file, and its program if `--arch` is given.

    Raises:
        SourceError: the file does not agree with its header.
    """

    def __init__(self, path: Path, options: SourceOptions | None = None) -> None:
        self.path = path
        self._options = options or SourceOptions()
        self._views, self._start = _read_header(path)
        if not self._views:
            raise SourceError(f"no tensor found in {path}: the safetensors file is empty.")

    def tensors(self) -> Iterator[SourceTensor]:
        """Yield every tensor in the order of its data; the kinds are those of `--arch`, else unknown."""
        return with_kinds_of(self._state(), self._options, self.label)

    def program(self, options: ProgramOptions) -> "FloatProgram":
        """Return the program of `--arch`, with these tensors loaded into it."""
        return program_of_state_dict(self._state(), self._options, options, self.label)

    def _state(self) -> Iterator[SourceTensor]:
        for name, (start, stop, view) in self._views.items():
            yield SourceTensor(name, UNKNOWN, lazy_view(view, partial(self._read, start, stop)))

    def _read(self, start: int, stop: int) -> Bytes:
        return np.memmap(self.path, np.uint8, "r", self._start + start, (stop - start,))


def _read_header(path: Path) -> tuple[dict[str, tuple[int, int, Strided]], int]:
    def damaged(why: str) -> SourceError:
        return SourceError(f"{path} is a damaged safetensors file: {why}. Copy or save it again.")

    nbytes = path.stat().st_size
    with path.open("rb") as f:
        (length,) = struct.unpack("<Q", f.read(8).ljust(8, b"\0"))
        if length > min(MAX_HEADER, max(nbytes - 8, 0)):
            raise damaged(f"its header claims {length} bytes, the file has {nbytes}")
        text = f.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise damaged(f"its header is not JSON ({e})") from None
    if not isinstance(header, dict):
        raise damaged("its header is not an object")
    header.pop("__metadata__", None)
    data = nbytes - 8 - length
    views: dict[str, tuple[int, int, Strided]] = {}
    for name, entry in header.items():
        if not _is_entry(entry):
            raise damaged(f"the entry of {name!r} needs dtype, shape and data_offsets, got {str(entry)[:80]}")
        if entry["dtype"] not in DTYPES:
            known = ", ".join(DTYPES)
            raise SourceError(f"{path}: tensor {name!r} has dtype {entry['dtype']!r}; readable: {known}.")
        dtype, shape, (start, stop) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if not 0 <= start <= stop <= data:
            raise damaged(f"{name!r} lies at bytes {start} to {stop} of {data}")
        if len(shape) > MAX_AXES or any(n >= 1 << 63 for n in shape):
            raise damaged(f"no array can have the shape of {name!r}")
        if math.prod(shape) * dtype.itemsize != stop - start:
            raise damaged(f"{name!r} of shape {list(shape)} and {entry['dtype']} cannot take {stop - start} bytes")
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        views[name] = start, stop, Strided(name, dtype, 0, shape, stride)
        check_view(views[name][2], stop - start, f"{path}: tensor {name!r}")
    in_order = dict(sorted(views.items(), key=lambda item: (item[1][0], item[1][1])))
    end = 0
    for name, (start, stop, _) in in_order.items():
        if start != end:
            raise damaged(f"{name!r} starts at byte {start}, the tensor before it ends at {end}")
        end = stop
    if end != data:
        raise damaged(f"its tensors take {end} bytes, but it holds {data}")
    return in_order, 8 + length


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return False
    shape, offsets = entry["shape"], entry["data_offsets"]
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    return lists and isinstance(entry["dtype"], str) and all(type(n) is int and n >= 0 for n in [*shape, *offsets])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} occurs twice")
    return dict(pairs)
