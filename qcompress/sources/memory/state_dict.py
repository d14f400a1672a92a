"""The Source of a state dict in memory: names to torch tensors or numpy arrays."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from qcompress.errors import SourceError
from qcompress.graph.options import ProgramOptions
from qcompress.kinds import UNKNOWN
from qcompress.sources.arch import program_of_state_dict, with_kinds_of
from qcompress.sources.base import LazyArray, SourceOptions, SourceTensor
from qcompress.sources.memory.module import digest_of, lazy_tensor

if TYPE_CHECKING:
    from qcompress.graph.program import FloatProgram


@final
class StateDictSource:
    """Named tensors in memory, and their program if an architecture is given.

    Args:
        state: names to torch tensors or numpy arrays; it is not changed.
        options: `arch` names the architecture.

    Raises:
        SourceError: it is empty, or a value is not a tensor.

    >>> source = StateDictSource({"fc.weight": np.zeros((2, 3), np.float32)})
    >>> [(t.name, t.kind, t.array.shape) for t in source.tensors()]
    [('fc.weight', 'unknown', (2, 3))]
    """

    path: Path | None = None
    label = "state dict"

    def __init__(self, state: Mapping[str, Any], options: SourceOptions | None = None) -> None:
        self._options = options or SourceOptions()
        self._tensors: list[SourceTensor] = []
        names: dict[object, list[str]] = {}
        for name, value in state.items():
            if not isinstance(name, str) or not (isinstance(value, np.ndarray) or hasattr(value, "untyped_storage")):
                raise SourceError(
                    f"a state dict must map names to tensors, got {type(value).__name__} at {str(name)!r}: pass "
                    "the dictionary that holds the tensors themselves."
                )
            names.setdefault(_identity(value), []).append(name)
        for first, *rest in names.values():
            value = state[first]
            array = _lazy_array(value) if isinstance(value, np.ndarray) else lazy_tensor(value, first)
            self._tensors.append(SourceTensor(first, UNKNOWN, array, tuple(rest)))
        if not self._tensors:
            raise SourceError("no tensor found in the state dict: it is empty.")

    @property
    def original_bytes(self) -> int:
        """Size of its tensors in bytes, tied ones once."""
        return sum(math.prod(t.array.shape) * np.dtype(t.array.dtype).itemsize for t in self._tensors)

    @property
    def sha256(self) -> str:
        """SHA-256 of the tensors' names, dtypes, shapes and bytes."""
        return digest_of(iter(self._tensors))

    def tensors(self) -> Iterator[SourceTensor]:
        """Yield every tensor in the dictionary's order; the kinds are those of the architecture, else unknown."""
        return with_kinds_of(self._tensors, self._options, self.label)

    def program(self, options: ProgramOptions) -> "FloatProgram":
        """Return the program of the architecture, with these tensors loaded into it."""
        return program_of_state_dict(self._tensors, self._options, options, self.label)


def _lazy_array(values: np.ndarray[Any, Any]) -> LazyArray:
    return LazyArray(values.shape, str(values.dtype), lambda: values)


def _identity(value: Any) -> object:
    if isinstance(value, np.ndarray):
        return id(value)
    where = value.untyped_storage().data_ptr() if value.numel() else id(value)
    return where, value.storage_offset(), tuple(value.shape), tuple(value.stride()), str(value.dtype)
