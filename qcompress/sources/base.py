"""The protocol of sources: named tensors that are read one at a time, and a float program if there is one."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from qcompress.graph.options import ProgramOptions

if TYPE_CHECKING:
    from qcompress.graph.program import FloatProgram


@dataclass(frozen=True, slots=True)
class LazyArray:
    """An array that is read on demand, by `np.asarray(lazy)`.

    Args:
        shape: its shape.
        dtype: name of its dtype in numpy or ml_dtypes, `bfloat16` for example.
        read: returns the array.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], npt.NDArray[Any]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        values = self.read()
        return values if dtype is None else values.astype(dtype)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor of a source.

    Args:
        name: qualified name, as in `named_parameters`.
        kind: the kind of the layer that uses it as its weight, one of `kinds.KINDS` (`other`: a bias, for example), or
            `unknown`.
        array: its values, read on demand.
        aliases: further names of the same (tied) tensor.
    """

    name: str
    kind: str
    array: LazyArray
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    """The options for reading a file that allow more than is safe for any file.

    Args:
        arch: `package.module:factory` or `path/file.py:factory`; runs the user's code.
        arch_kwargs: arguments of the factory.
        allow_classes: classes that a pickled module may consist of, as `package.module:Class`; they are imported.
        trust_pickle: unpickle the file without restriction.
    """

    arch: str | None = None
    arch_kwargs: Mapping[str, Any] = field(default_factory=dict)
    allow_classes: tuple[str, ...] = ()
    trust_pickle: bool = False


@runtime_checkable
class Source(Protocol):
    """A model of any kind."""

    @property
    def label(self) -> str:
        """Its name in messages: the path as given, or the class of a module."""

    @property
    def path(self) -> Path | None:
        """Its path; None for a model in memory."""

    @property
    def original_bytes(self) -> int:
        """Size of the file, or of a module's parameters and buffers, in bytes."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the file, or of the names and bytes of a module's tensors."""

    def tensors(self) -> Iterator[SourceTensor]:
        """Yield every tensor once, in a fixed order."""

    def program(self, options: ProgramOptions) -> "FloatProgram":
        """Return the float program.

        Raises:
            SourceError: the source has no program; the message says why.
        """
