"""What every artifact of a weight answers, and the helpers that all of them share.

An artifact is frozen and holds numpy arrays only. It answers all questions of exporters, reports and parity, so that no
caller asks for its class.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Final, NamedTuple, Protocol, Self, runtime_checkable

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qcompress.errors import ConfigError

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Halves = npt.NDArray[np.float16]
Int8s = npt.NDArray[np.int8]
Arrays = dict[str, npt.NDArray[Any]]

FLOAT_DTYPES: Final = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


class Integers(NamedTuple):
    """A weight as int8 codes times a scale, for kernels that compute with integers.

    Args:
        codes: int8 in the weight's shape.
        scale: float32, 0-d, or [O] along `axis`.
        axis: the axis whose indices have a scale each; None: the scale is 0-d.
    """

    codes: Int8s
    scale: Floats
    axis: int | None


@runtime_checkable
class Artifact(Protocol):
    """A frozen weight, with all that exporters, the size report and parity need."""

    kind: ClassVar[str]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""

    @property
    def bits(self) -> int:
        """Bits per code, or of the float type."""

    @property
    def reason(self) -> str:
        """Why the tensor is left in float; empty for one that has codes."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk: packed codes, tables and scales, without any container."""

    @property
    def decoded_dtype(self) -> "np.dtype[Any]":
        """Type that the graph computes with: float32 except for integer buffers."""

    def dequantize(self) -> npt.NDArray[Any]:
        """Return what the graph computes with, in the weight's own shape; the reference for parity."""

    def integers(self) -> Integers | None:
        """Return the int8 codes and scale whose product equals `dequantize()` bit for bit; None if there are none."""

    @property
    def no_integers(self) -> str:
        """Why `integers()` may be None, for messages."""

    def rescaled(self, factor_O: Doubles, axis: int) -> Self:
        """Return the weight times a factor for each output channel, its codes kept.

        Args:
            factor_O: [O], any sign; a channel whose factor is 0 becomes 0.
            axis: the weight's axis that counts output channels.
        """

    def raised(self, least_O: Floats) -> Self:
        """Return the weight with scales of at least the given size.

        Args:
            least_O: [O]; the largest counts where one scale serves all channels. Channels whose scale was smaller get
                the codes nearest to their old values; all others stay as they are.
        """

    def with_zeros(self, where: npt.NDArray[np.bool_]) -> Self:
        """Return the weight with exact zeros at some places. Codes of vectors cannot do that: they stay as they are.

        Args:
            where: in the weight's shape.
        """

    def halved(self) -> Self:
        """Return the artifact with float32 values as float16 where that loses nothing that counts and saves bytes."""

    def parts(self, axis: int, elements: int) -> list[Self]:
        """Return the weight cut along an axis into parts of at most so many elements.

        Returns:
            Artifacts whose values are those of the whole, bit for bit, if they are joined along the axis; none where
            codes, tables or blocks allow no such cut.
        """

    def to_arrays(self) -> tuple[Arrays, dict[str, Any]]:
        """Return the stored form: arrays by suffix (codes unpacked), and the other fields as JSON values."""

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], fields: Mapping[str, Any]) -> Self:
        """Return the artifact of a stored form; the exact inverse of `to_arrays`."""


def bits_per_weight(artifact: Artifact) -> float:
    """Return an artifact's bytes on disk per weight, in bits.

    >>> from qcompress.artifacts import FloatWeight
    >>> bits_per_weight(FloatWeight(values=np.zeros(4, np.float32), reason="not a weight"))
    32.0
    """
    return 8 * artifact.nbytes / max(1, int(np.prod(artifact.shape)))


def broadcast_scale(scale: Floats, shape: tuple[int, ...], axis: int | None) -> Floats:
    """Return a scale, 0-d or one per index of `axis`, shaped to broadcast against a weight.

    >>> broadcast_scale(np.zeros(3, np.float32), (2, 3), 1).shape, broadcast_scale(np.float32(2), (2, 3), 1).shape
    ((1, 3), ())
    """
    return along_axis(scale, len(shape), axis) if axis is not None and scale.ndim else scale


def along_axis(values: npt.NDArray[Any], ndim: int, axis: int) -> npt.NDArray[Any]:
    """Return a vector shaped to broadcast along one axis of an `ndim`-dimensional array.

    >>> along_axis(np.zeros(8), 4, 0).shape
    (8, 1, 1, 1)
    """
    return values.reshape([-1 if i == axis else 1 for i in range(ndim)])


def cuts(shape: tuple[int, ...], axis: int, elements: int, step: int = 1) -> list[slice]:
    """Return the fewest ranges of an axis, as equal as can be, that hold at most so many elements of a tensor each.

    Args:
        shape: of the tensor.
        axis: is cut.
        elements: that a range may hold.
        step: ranges begin at multiples of it.

    Returns:
        None at all if `step` indices hold more elements.

    >>> cuts((10, 3), 0, 12, step=2), cuts((10, 3), 0, 2)
    ([slice(0, 4, None), slice(4, 8, None), slice(8, 10, None)], [])
    """
    size = shape[axis]
    steps = -(-size // step)
    most = elements // max(1, math.prod(shape) // max(1, size) * step)
    if not most:
        return []
    length = -(-steps // -(-steps // most)) * step
    return [slice(start, min(start + length, size)) for start in range(0, size, length)]


def along(axis: int, piece: slice) -> tuple[slice, ...]:
    """Return the index that takes a range of one axis.

    >>> along(1, slice(2, 4))
    (slice(None, None, None), slice(2, 4, None))
    """
    return (*[slice(None)] * axis, piece)


def in_steps(piece: slice, step: int) -> slice:
    """Return the range of steps that a range of indices needs.

    >>> in_steps(slice(4, 9), 4)
    slice(1, 3, None)
    """
    return slice(piece.start // step, -(-piece.stop // step))


def require(condition: bool, requirement: str, got: object) -> None:
    """Raise a ConfigError that gives the requirement and what came, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{requirement}, got {got}.")


def require_axis(who: str, axis: int, ndim: int) -> None:
    """Raise a ConfigError unless `axis` is an axis of an `ndim`-dimensional array, counted from 0."""
    require(0 <= axis < ndim, f"{who}.axis must be in [0, {ndim})", axis)
