"""A tensor that is left in float, with the reason."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Self, final

import numpy as np
import numpy.typing as npt

from qcompress.artifacts.base import (
    FLOAT_DTYPES,
    Arrays,
    Doubles,
    Floats,
    along,
    along_axis,
    cuts,
)

_HALF_MAX: Final = float(np.finfo(np.float16).max)
_HALF_STEP: Final = float(np.finfo(np.float16).eps)
_HALF_MIN_SIZE: Final = 32  # elements; in smaller tensors, the Cast takes what the narrower type saves


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FloatWeight:
    """A tensor that is left in float, and the reason.

    Args:
        values: the tensor, of any dtype; integer and bool buffers are left as they are.
        reason: for the user, such as "by plan".
    """

    kind: ClassVar[str] = "float"
    values: npt.NDArray[Any]
    reason: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.values.shape

    @property
    def bits(self) -> int:
        """Bits of the type."""
        return 8 * self.values.itemsize

    @property
    def decoded_dtype(self) -> "np.dtype[Any]":
        """Type that the graph computes with: 16-bit floats are widened to float32."""
        return np.dtype(np.float32) if self.values.dtype in FLOAT_DTYPES else self.values.dtype

    @property
    def no_integers(self) -> str:
        """The reason why the tensor is left in float."""
        return self.reason

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.values.nbytes

    def dequantize(self) -> npt.NDArray[Any]:
        """Return the value that the graph computes with: 16-bit floats widened to float32, anything else unchanged."""
        if self.values.dtype in FLOAT_DTYPES:
            return np.array(self.values, np.float32, order="C")
        return self.values

    def integers(self) -> None:
        """Return None: there are no codes."""

    def rescaled(self, factor_O: Doubles, axis: int) -> Self:
        """Return the values times a factor for each output channel; see `Artifact.rescaled`."""
        factor = along_axis(factor_O, self.values.ndim, axis)
        return replace(self, values=(self.values * factor).astype(self.values.dtype))

    def raised(self, least_O: Floats) -> Self:
        """Return the tensor itself: it has no scales."""
        return self

    def with_zeros(self, where: npt.NDArray[np.bool_]) -> Self:
        """Return the tensor with exact zeros at some places."""
        return replace(self, values=np.where(where, 0, self.values).astype(self.values.dtype))

    def halved(self) -> Self:
        """Return float32 values as float16 where these hold them to within rounding and take fewer bytes in a file."""
        if self.values.dtype != np.float32:
            return self
        largest = float(np.abs(self.values).max(initial=0.0))
        if self.values.size < _HALF_MIN_SIZE or largest > _HALF_MAX:
            return self
        halved = self.values.astype(np.float16)
        if float(np.abs(halved - self.values).max()) > _HALF_STEP * largest:  # too small for float16
            return self
        return replace(self, values=halved)

    def parts(self, axis: int, elements: int) -> list[Self]:
        """Return the tensor in parts; see `Artifact.parts`."""
        return [replace(self, values=self.values[along(axis, piece)]) for piece in cuts(self.shape, axis, elements)]

    def to_arrays(self) -> tuple[Arrays, dict[str, Any]]:
        """Return the stored form: the values, with an empty suffix."""
        return {"": self.values}, {"reason": self.reason}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], fields: Mapping[str, Any]) -> Self:
        """Return the artifact of a stored form; the exact inverse of `to_arrays`."""
        return cls(values=arrays[""], reason=fields["reason"])
