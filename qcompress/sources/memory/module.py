"""The source of a torch module in memory."""

import hashlib
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import numpy.typing as npt

from qcompress.errors import SourceError
from qcompress.graph.conversion import has_array, numpy_dtype, to_numpy
from qcompress.graph.options import ProgramOptions
from qcompress.sources.base import LazyArray, SourceTensor

if TYPE_CHECKING:
    import torch

    from qcompress.graph.program import FloatProgram


@final
class ModuleSource:
    """A module in memory.

    Args:
        module: only read.
    """

    path: Path | None = None

    def __init__(self, module: "torch.nn.Module") -> None:
        self._module = module
        if not self._tensors():
            raise SourceError(f"no tensor found in {self.label}: a module with parameters or buffers is needed.")

    @property
    def label(self) -> str:
        """Return the name of the module's class."""
        return type(self._module).__name__

    @property
    def original_bytes(self) -> int:
        """Return the bytes of its parameters and buffers, tied ones once."""
        return sum(math.prod(t.array.shape) * np.dtype(t.array.dtype).itemsize for t in self.tensors())

    @property
    def sha256(self) -> str:
        """Return the SHA-256 over names, dtypes, shapes and bytes."""
        return digest_of(self.tensors())

    def tensors(self) -> Iterator[SourceTensor]:
        """Yield every parameter, then every buffer, in the module's order; tied ones once, under their first name."""
        for tensor, (first, *rest) in self._tensors():
            yield SourceTensor(first, self._kinds[first], lazy_tensor(tensor, first), tuple(rest))

    def _tensors(self) -> "list[tuple[torch.Tensor, list[str]]]":
        """Return each tensor with its names."""
        found: dict[int, tuple[torch.Tensor, list[str]]] = {}
        for listing in (self._module.named_parameters, self._module.named_buffers):
            for name, tensor in listing(remove_duplicate=False):
                found.setdefault(id(tensor), (tensor, []))[1].append(name)
        return list(found.values())

    @cached_property
    def _kinds(self) -> dict[str, str]:
        from qcompress.graph.symbolic import kinds_of

        return kinds_of(self._module)

    def program(self, options: ProgramOptions) -> "FloatProgram":
        """Trace the module."""
        from qcompress.graph.tracing import from_module

        return from_module(self._module, options)


def lazy_tensor(tensor: "torch.Tensor", name: str) -> LazyArray:
    """Return a torch tensor as an array that is copied to the CPU when it is read.

    Raises:
        SourceError: numpy has no such dtype (a quantized one, for example).

    >>> import torch
    >>> lazy_tensor(torch.zeros(2, dtype=torch.bfloat16), "w").dtype
    'bfloat16'
    """
    if not has_array(tensor):
        raise SourceError(
            f"tensor {name!r} is {tensor.dtype}, {tensor.layout}, on {tensor.device}: it has no values to read."
        )

    def read() -> npt.NDArray[Any]:
        return np.asarray(to_numpy(tensor), order="C")

    return LazyArray(tuple(tensor.shape), str(numpy_dtype(tensor.dtype)), read)


def digest_of(tensors: Iterator[SourceTensor]) -> str:
    """Return the SHA-256 over the names, dtypes, shapes and bytes of tensors."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(f"{tensor.name}\0{tensor.array.dtype}\0{list(tensor.array.shape)}\0".encode())
        state.update(np.ascontiguousarray(tensor.array).reshape(-1).view(np.uint8).tobytes())
    return state.hexdigest()
