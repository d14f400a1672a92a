"""The sample inputs of an exported program, rebuilt from tensors and plain values only.

torch would unpickle them without restriction, and writes the keys of dicts in them into Python source.
"""

import io
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, final

from qcompress.errors import UnsafeFileError
from qcompress.graph.conversion import TORCH_DTYPES, to_torch
from qcompress.sources.pickles.checkpoint import Content, read_zip
from qcompress.sources.pickles.standins import Name, StandIn, TensorRef
from qcompress.sources.pt2.forms import is_key
from qcompress.sources.strided import Strided, check_view
from qcompress.zip_archive import ZipArchive

if TYPE_CHECKING:
    import torch

MAX_VALUES: Final = 100_000
MAX_DEPTH: Final = 100


def checked_samples(raw: bytes, label: str) -> bytes:
    """Return sample inputs as bytes in torch.save's format, read without running code and written anew.

    Args:
        raw: the member of the archive, which torch.save wrote.
        label: the file's name in messages.

    Raises:
        UnsafeFileError: they hold more than tensors and plain values.
        SourceError: they are damaged.
    """
    import torch

    content = read_zip(ZipArchive(raw, label=f"{label}: the archive of its sample inputs"))
    buffer = io.BytesIO()
    torch.save(_Rebuilder(content, label).value(content.pickled.value, 0), buffer)
    return buffer.getvalue()


@final
class _Rebuilder:
    def __init__(self, content: Content, label: str) -> None:
        self._content = content
        self._label = label
        self._storages: dict[str, torch.Tensor] = {}
        self._values = 0

    def value(self, value: Any, depth: int) -> Any:
        """Return a copy of a value; a value that is referenced twice is copied, and counted, twice."""
        self._values += 1
        if self._values > MAX_VALUES or depth > MAX_DEPTH:
            raise self._refused(f"over {MAX_VALUES} values, or are nested over {MAX_DEPTH} deep")
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, TensorRef):
            return self._tensor(value.view)
        if isinstance(value, list | tuple):
            return type(value)(self.value(inner, depth + 1) for inner in value)
        if isinstance(value, dict):
            for key in value:
                if not is_key(key):
                    raise self._refused(f"a dict with the key {str(key)[:80]!r}")
            pairs = ((key, self.value(inner, depth + 1)) for key, inner in value.items())
            return OrderedDict(pairs) if isinstance(value, OrderedDict) else dict(pairs)
        return self._of_torch(value)

    def _of_torch(self, value: Any) -> Any:
        """Return a dtype, a device or a size."""
        import torch

        if isinstance(value, Name) and value.module == "torch" and value.name in TORCH_DTYPES:
            return getattr(torch, value.name)
        if isinstance(value, StandIn) and str(value.made_by) == "torch.device" and all(map(is_key, value.args)):
            return torch.device(*value.args)
        if isinstance(value, StandIn) and str(value.made_by) == "torch.Size" and len(value.args) == 1:
            return torch.Size(value.args[0])
        found = str(value.made_by) if isinstance(value, StandIn) else str(value)[:80] if isinstance(value, Name) else ""
        raise self._refused(f"an object made by {found}" if found else f"an object of type {type(value).__name__}")

    def _tensor(self, view: Strided) -> "torch.Tensor":
        """Return a view of a storage, which is read only once."""
        import torch

        if view.storage not in self._storages:
            self._storages[view.storage] = to_torch(self._content.data(view.storage))
        data, dtype = self._storages[view.storage], getattr(torch, view.dtype.name)
        check_view(view, len(data), f"{self._label}: a sample input")
        if 0 in view.shape:
            return torch.zeros(view.shape, dtype=dtype)
        whole = data[: len(data) // view.dtype.itemsize * view.dtype.itemsize].view(dtype)
        return whole.as_strided(view.shape, view.stride, view.offset)

    def _refused(self, what: str) -> UnsafeFileError:
        return UnsafeFileError(
            f"{self._label} is refused: its sample inputs are a pickle of more than tensors and plain values: they "
            f"hold {what}. torch.export.load would unpickle it without restriction. None of its code was run. Export "
            "the model with plain tensors as inputs."
        )
