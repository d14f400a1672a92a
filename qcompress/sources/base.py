"""What every kind of input becomes: named tensors, read one at a time, and a float program where there is one."""

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
    """An array that is read when it is asked for: `np.asarray(lazy)`.

    Args:
        shape: its shape.
        dtype: numpy name of its dtype, `bfloat16` included.
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
        kind: of the layer that uses it as its weight, one of `kinds.KINDS` (`other`: a bias, say), or `unknown`.
        array: its values, read on demand.
        aliases: further names of the same (tied) tensor.
    """

    name: str
    kind: str
    array: LazyArray
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    """How a file may be read, beyond what is safe for any file.

    Args:
        arch: `package.module:factory` or `path/file.py:factory`; runs the user's code.
        arch_kwargs: arguments of the factory.
        allow_classes: `package.module:Class` that a pickled module may be made of; imports those classes.
        trust_pickle: unpickle whatever is there.
    """

    arch: str | None = None
    arch_kwargs: Mapping[str, Any] = field(default_factory=dict)
    allow_classes: tuple[str, ...] = ()
    trust_pickle: bool = False


@runtime_checkable
class Source(Protocol):
    """A model that came in, whatever its kind."""

    @property
    def label(self) -> str:
        """What a user calls it: the path as given, or the class of a module."""

    @property
    def path(self) -> Path | None:
        """Where it lies; None for a module in memory."""

    @property
    def original_bytes(self) -> int:
        """Bytes of the file, or of a module's parameters and buffers."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the file, or over the names and bytes of a module's tensors."""

    def tensors(self) -> Iterator[SourceTensor]:
        """Every tensor once, in a fixed order."""

    def program(self, options: ProgramOptions) -> "FloatProgram":
        """The float program; SourceError says why there is none."""
