"""Reads the tables of tensors in an exported program's archive: the member, dtype, shape and strides of each one."""

import json
import re
from dataclasses import dataclass
from typing import Any, Final

from qcompress.errors import SourceError, UnsafeFileError
from qcompress.graph.conversion import TORCH_DTYPES
from qcompress.sources.pt2.graph import checked_record
from qcompress.sources.strided import Strided, check_view
from qcompress.zip_archive import ZipArchive

# torch._export.serde.schema.ScalarType
_SCALAR_TYPES: Final = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float64",
    10: "complex64",
    11: "complex128",
    12: "bool",
    13: "bfloat16",
    28: "uint16",
    29: "float8_e4m3fn",
    30: "float8_e5m2",
    31: "float8_e4m3fnuz",
    32: "float8_e5m2fnuz",
    33: "float8_e8m0fnu",
    34: "uint32",
    35: "uint64",
}
_STRIDED: Final = 7
_MEMBERS: Final = {"weights": re.compile(r"weight_\d{1,9}\Z"), "constants": re.compile(r"tensor_\d{1,9}\Z")}


@dataclass(frozen=True, slots=True)
class Payload:
    """The tensors under `data/weights` or `data/constants`.

    Args:
        views: the tensors by qualified name; the storage of each is the full name of its member.
        config: the table for torch, which holds checked values only.
    """

    views: dict[str, Strided]
    config: dict[str, Any]


def read_payload(archive: ZipArchive, which: str) -> Payload:
    """Read and check one table of tensors.

    Args:
        archive: the exported program.
        which: `weights` or `constants`.

    Raises:
        UnsafeFileError: an entry is a pickle or a custom object.
        SourceError: an entry does not fit its data.
    """
    label, member = archive.label, f"data/{which}/model_{which}_config.json"
    try:
        parsed = json.loads(archive.read(member).decode())
        entries = checked_record(parsed, "PayloadConfig", label, member)["config"]
        views = {str(name): _view(archive, str(name), entry, which) for name, entry in entries.items()}
        config = {name: _entry(entry, views[name]) for name, entry in entries.items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as e:
        if isinstance(e, SourceError):
            raise
        raise SourceError(f"{label} is damaged: {member} is not what torch writes ({type(e).__name__}: {e}).") from None
    return Payload(views, {"config": config})


def _view(archive: ZipArchive, name: str, entry: dict[str, Any], which: str) -> Strided:
    label, member = archive.label, entry["path_name"]
    if entry["use_pickle"] is not False or not isinstance(member, str) or not _MEMBERS[which].match(member):
        raise UnsafeFileError(
            f"{label} is refused: {name!r} among its {which} is a pickle or a custom object ({str(member)[:40]!r}), "
            "which torch would unpickle without restriction. None of its code was run. Export a model of plain tensors."
        )
    meta = entry["tensor_meta"]
    dtype = _SCALAR_TYPES.get(meta["dtype"])
    if dtype is None or meta["layout"] != _STRIDED:
        raise SourceError(f"{label}: {name!r} has a dtype or layout that is not readable ({meta['dtype']!r}).")
    offset, *rest = (_integer(n) for n in (meta["storage_offset"], *meta["sizes"], *meta["strides"]))
    ndim = len(meta["sizes"])
    path = f"data/{which}/{member}"
    view = Strided(path, TORCH_DTYPES[dtype], offset, tuple(rest[:ndim]), tuple(rest[ndim:]))
    check_view(view, archive.nbytes(path), f"{label}: tensor {name!r}")
    return view


def _entry(entry: dict[str, Any], view: Strided) -> dict[str, Any]:
    meta = entry["tensor_meta"]
    return {
        "path_name": view.storage.rpartition("/")[2],
        "is_param": entry["is_param"] is True,
        "use_pickle": False,
        "tensor_meta": {
            "dtype": meta["dtype"],
            "sizes": [{"as_int": n} for n in view.shape],
            "requires_grad": meta["requires_grad"] is True,
            # whatever device it was exported on, it is first read into memory
            "device": {"type": "cpu", "index": None},
            "strides": [{"as_int": n} for n in view.stride],
            "storage_offset": {"as_int": view.offset},
            "layout": _STRIDED,
        },
    }


def _integer(size: Any) -> int:
    value = size["as_int"]
    if type(value) is not int:
        raise TypeError(f"a size is {value!r}")
    return value
