"""Reads files that torch.save wrote: a state dict, nested or not, or a pickled module.

The tensors are read without torch, and without the classes that the file names. Only a module that is to run goes
through `torch.load`: through its restricted unpickler, unless `--trust-pickle` is given.
"""

import io
import mmap
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np

from qcompress.errors import QCompressError, SourceError, UnsafeFileError, missing
from qcompress.graph.conversion import TORCH_DTYPES
from qcompress.graph.options import ProgramOptions
from qcompress.sources.arch import program_of_state_dict, with_kinds_of
from qcompress.sources.base import SourceOptions, SourceTensor
from qcompress.sources.file_source import AbstractFile
from qcompress.sources.pickles.allowed import allow_list, calls
from qcompress.sources.pickles.chosen import Named, choose
from qcompress.sources.pickles.machine import Unpickled, unpickle
from qcompress.sources.strided import check_view, lazy_view
from qcompress.user_code import first_on_path, one_line
from qcompress.zip_archive import Bytes, ZipArchive

if TYPE_CHECKING:
    import torch

    from qcompress.graph.program import FloatProgram

MAX_STORAGES: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Content:
    """The contents of a file that torch.save wrote.

    Args:
        pickled: its object.
        data: returns the bytes of a storage by its key.
    """

    pickled: Unpickled
    data: Callable[[str], Bytes]


@final
class CheckpointSource(AbstractFile):
    """The tensors of a torch checkpoint, and its program if it is a module or `--arch` is given.

    Args:
        path: the file.
        options: how it may be read.
        legacy: whether it has the format before torch 1.6, which is not a zip.

    Raises:
        SourceError: it is damaged, or holds no named tensor.
    """

    def __init__(self, path: Path, options: SourceOptions | None = None, *, legacy: bool = False) -> None:
        self.path = path
        self._options = options or SourceOptions()
        self._content = _read_legacy(path) if legacy else read_zip(ZipArchive(path))
        self._sizes: dict[str, int] = {}
        try:
            self._chosen = choose(self._content.pickled.value, str(path))
        except SourceError as e:
            if others := calls(self._content.pickled.names):
                named = ", ".join(map(str, others[:10]))
                raise UnsafeFileError(f"{e} Its pickle names {named}; none of its code was run.") from None
            raise
        self._check()

    @property
    def note(self) -> str | None:
        """Note on which of several models in the file was used; None if there is only one."""
        if not self._chosen.others:
            return None
        where, *others = [repr(key) if key else "the top level" for key in (self._chosen.where, *self._chosen.others)]
        return f"{self.label}: tensors taken from {where}; not read: {', '.join(others)}."

    @property
    def holds_module(self) -> bool:
        """Whether the file holds a pickled module, not a state dict."""
        return self._chosen.is_module

    def tensors(self) -> Iterator[SourceTensor]:
        """Yield every tensor in the file's order, tied ones once; unknown classes are skipped, and no code is run."""
        if self._chosen.is_module:
            return self._tensors(self._chosen.tensors)
        return with_kinds_of(self._tensors(self._chosen.tensors), self._options, self.label)

    def program(self, options: ProgramOptions) -> "FloatProgram":
        """Return the program of `--arch` with these tensors, or of the pickled module.

        Raises:
            UnsafeFileError: the module needs classes that are not allowed.
            SourceError: it is a state dict, and `--arch` is not given.
        """
        if self._options.arch is None and self._chosen.is_module:
            module = self.module()

            from qcompress.graph.tracing import from_module

            return from_module(module, options)
        state = [t for t in self._chosen.tensors if t.persistent]
        return program_of_state_dict(self._tensors(state), self._options, options, self.label)

    def module(self) -> "torch.nn.Module":
        """Return the pickled module.

        Raises:
            UnsafeFileError: it needs classes that are not allowed.
            SourceError: the file holds no module, or it cannot be loaded.
        """
        try:
            import torch
        except ImportError:
            raise missing("torch", "loading a pickled module") from None
        allowed: list[Any] = []
        if self._options.trust_pickle:
            first_on_path(Path.cwd())  # for classes of the user's own scripts
        else:
            allowed = self._allow_list()
        try:
            with torch.serialization.safe_globals(allowed):
                value = torch.load(self.path, map_location="cpu", weights_only=not self._options.trust_pickle)
        except QCompressError:
            raise
        except Exception as e:
            raise SourceError(
                f"{self.label}: the pickled module in it cannot be loaded ({_reason(e)}). Save a .pt2 "
                "(torch.export.save), or a state dict and pass its architecture with --arch."
            ) from e
        for key in self._chosen.where.split(".") if self._chosen.where else ():
            value = value[key]
        if not isinstance(value, torch.nn.Module):
            raise SourceError(
                f"{self.label} must hold a module, but it holds an object of type {type(value).__name__}."
            )
        return value

    def _tensors(self, named: list[Named]) -> Iterator[SourceTensor]:
        groups: dict[object, list[Named]] = {}
        for tensor in named:
            groups.setdefault(tensor.ref.view, []).append(tensor)
        for first, *rest in groups.values():
            view = first.ref.view
            array = lazy_view(view, partial(self._content.data, view.storage))
            yield SourceTensor(first.name, first.kind, array, tuple(t.name for t in rest))

    def _allow_list(self) -> list[Any]:
        """Return the classes that torch may build, after comparing every size in the file with the bytes that exist.

        torch itself does not compare: it reads beyond the data of a storage, and takes memory for a view of any size.
        """
        allowed = allow_list(self._content.pickled, self._options.allow_classes, self.label)
        for ref in self._content.pickled.tensors:
            check_view(ref.view, self._storage_nbytes(ref.view.storage), f"{self.label}: a tensor")
        for key, storage in self._content.pickled.storages.items():
            nbytes = self._storage_nbytes(key)
            if not 0 <= storage.count * TORCH_DTYPES[storage.dtype].itemsize <= nbytes:
                raise SourceError(f"{self.label} is damaged: storage {key!r} has {nbytes} bytes, fewer than it claims.")
        return allowed

    def _check(self) -> None:
        for tensor in self._chosen.tensors:
            view = tensor.ref.view
            check_view(view, self._storage_nbytes(view.storage), f"{self.label}: tensor {tensor.name!r}")

    def _storage_nbytes(self, key: str) -> int:
        if key not in self._sizes:
            self._sizes[key] = self._content.data(key).size
        return self._sizes[key]


def _reason(e: Exception) -> str:
    """Return the reason for an error of torch.load, without torch's advice to turn its safety off."""
    _, _, detail = " ".join(str(e).split()).partition("WeightsUnpickler error: ")
    return detail.partition(" Please ")[0].partition(" Check the ")[0][:200] if detail else one_line(e)


def read_zip(archive: ZipArchive) -> Content:
    """Read a file in the format of torch.save since torch 1.6.

    Raises:
        SourceError: the pickle in it is damaged, or refused.
    """
    archive = archive.without_top_folder()
    label = archive.label
    order = archive.read("byteorder", limit=16) if "byteorder" in archive else b"little"
    if order != b"little":
        raise SourceError(
            f"{label}: only numbers in little byte order are read, got {order!r}. Save the file on a usual machine."
        )
    found = unpickle(io.BytesIO(archive.read("data.pkl")), label)
    return Content(found, lambda key: archive.data(f"data/{key}"))


def _read_legacy(path: Path) -> Content:
    """Read the format before torch 1.6: magic, version, system, the object, the keys of storages, the storages."""
    with path.open("rb") as f:
        mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    for _ in range(3):
        head = unpickle(mapped, str(path))
    if not isinstance(head.value, dict) or head.value.get("little_endian") is not True:
        raise SourceError(f"{path} must be in little byte order. Save it on a machine of that order.")
    found = unpickle(mapped, str(path))
    keys = unpickle(mapped, str(path)).value
    if not isinstance(keys, list) or len(keys) > MAX_STORAGES or not all(isinstance(k, str) for k in keys):
        raise SourceError(f"{path} is damaged: the list of its storages cannot be read.")
    sizes = {key: TORCH_DTYPES[ref.dtype].itemsize for key, ref in found.storages.items()}
    places: dict[str, tuple[int, int]] = {}
    position = mapped.tell()
    for key in keys:
        if position + 8 > len(mapped):
            raise SourceError(f"{path} is truncated: storage {key!r} is missing. Copy or save the file again.")
        (count,) = struct.unpack("<q", mapped[position : position + 8])
        nbytes = count * sizes.get(key, 0)
        if count < 0 or key not in sizes or position + 8 + nbytes > len(mapped):
            raise SourceError(f"{path} is truncated: storage {key!r} is cut off. Copy or save the file again.")
        places[key] = position + 8, nbytes
        position += 8 + nbytes

    def data(key: str) -> Bytes:
        if key not in places:
            raise SourceError(f"{path} is damaged: its storage {key!r} is missing. Save the file again.")
        start, nbytes = places[key]
        return np.memmap(path, np.uint8, "r", start, (nbytes,)) if nbytes else np.zeros(0, np.uint8)

    return Content(found, data)
