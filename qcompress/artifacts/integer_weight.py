"""Weights on even grids: integers times a scale.

Shape suffixes: O = output channels, K = elements of one output channel.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, final

import numpy as np
import numpy.typing as npt

from qcompress.artifacts import granularity
from qcompress.artifacts.base import (
    Arrays,
    Doubles,
    Floats,
    Integers,
    along,
    along_axis,
    cuts,
    in_steps,
    require,
    require_axis,
)
from qcompress.artifacts.integer_range import IntegerRange
from qcompress.artifacts.integer_step import raised_scale
from qcompress.artifacts.packing import check_bits, packed_nbytes


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerWeight:
    """A weight on an even grid: (codes - zero_point) * scale.

    Args:
        codes: int8 (signed) or uint8, in the weight's shape.
        scale: float32, 0-d, [O] along `axis`, or the weight's shape with ceil(size / block_size) blocks along `axis`.
        zero_point: same dtype as codes, same shape as scale; None: 0.
        bits: width of a code, 1 to 8.
        axis: axis of the scales; None: one scale.
        block_size: consecutive elements of `axis` that share a scale; None: one scale per element of `axis`.

    >>> w = IntegerWeight(codes=np.array([[-2, 1]], np.int8), scale=np.array(0.5, np.float32), bits=2)
    >>> w.dequantize().tolist(), w.nbytes
    ([[-1.0, 0.5]], 5)
    """

    kind: ClassVar[str] = "uniform"
    reason: ClassVar[str] = ""
    no_integers: ClassVar[str] = "its grid has blocks, a zero point, or codes above 127"
    decoded_dtype: ClassVar[np.dtype[Any]] = np.dtype(np.float32)
    codes: npt.NDArray[np.int8] | npt.NDArray[np.uint8]
    scale: Floats
    bits: int
    axis: int | None = None
    block_size: int | None = None
    zero_point: npt.NDArray[np.int8] | npt.NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        require(self.codes.dtype in (np.int8, np.uint8), "IntegerWeight.codes must be int8 or uint8", self.codes.dtype)
        require(self.scale.dtype == np.float32, "IntegerWeight.scale must be float32", self.scale.dtype)
        wanted = self._scale_shape
        require(self.scale.shape == wanted, f"IntegerWeight.scale must be {list(wanted)}", self.scale.shape)
        if self.zero_point is not None:
            require(
                self.zero_point.dtype == self.codes.dtype,
                f"IntegerWeight.zero_point must be {self.codes.dtype} like its codes",
                self.zero_point.dtype,
            )
            require(
                self.zero_point.shape == wanted,
                f"IntegerWeight.zero_point must be {list(wanted)}",
                self.zero_point.shape,
            )
        limits = IntegerRange(self.bits, self.signed)
        if self.codes.size:
            low, high = int(self.codes.min()), int(self.codes.max())
            require(
                limits.n <= low and high <= limits.p,
                f"IntegerWeight.codes must be in [{limits.n}, {limits.p}] at {self.bits} bits",
                (low, high),
            )

    @property
    def _scale_shape(self) -> tuple[int, ...]:
        if self.axis is None:
            require(self.block_size is None, "IntegerWeight.block_size must be None without an axis", self.block_size)
            return ()
        require_axis("IntegerWeight", self.axis, len(self.shape))
        count = self.shape[self.axis]
        if self.block_size is None:
            return (count,)
        require(self.block_size >= 1, "IntegerWeight.block_size must be at least 1", self.block_size)
        return (*self.shape[: self.axis], -(-count // self.block_size), *self.shape[self.axis + 1 :])

    @property
    def signed(self) -> bool:
        """Whether codes are signed."""
        return self.codes.dtype == np.int8

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes on disk: packed codes + scales + packed zero points."""
        zero = 0 if self.zero_point is None else packed_nbytes(self.zero_point.size, self.bits)
        return packed_nbytes(self.codes.size, self.bits) + self.scale.nbytes + zero

    def dequantize(self) -> Floats:
        """Return the float32 weight: (codes - zero_point) * scale."""
        codes = self.codes.astype(np.int32)
        if self.zero_point is not None:
            codes = codes - self._broadcast(self.zero_point.astype(np.int32))
        return np.array(codes.astype(np.float32) * self._broadcast(self.scale), np.float32, order="C")

    def _broadcast(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if self.axis is None:
            return values
        if self.block_size is None:
            return along_axis(values, self.codes.ndim, self.axis)
        wide = np.repeat(values, min(self.block_size, self.codes.shape[self.axis]), axis=self.axis)
        return np.take(wide, np.arange(self.codes.shape[self.axis]), axis=self.axis)

    def integers(self) -> Integers | None:
        """Return the codes as int8, and their scale.

        Returns:
            float32(codes) * scale equals `dequantize()` bit for bit. None with blocks, zero points other than 0, or
            unsigned codes above 127.
        """
        if self.block_size is not None or (self.zero_point is not None and self.zero_point.any()):
            return None
        if not self.signed and self.codes.max(initial=0) > 127:
            return None
        return Integers(self.codes.astype(np.int8), self.scale, self.axis)

    def rescaled(self, factor_O: Doubles, axis: int) -> Self:
        """Return the weight times a factor for each output channel, its codes kept; see `Artifact.rescaled`.

        >>> w = IntegerWeight(codes=np.array([[1], [-2]], np.int8), scale=np.array(0.5, np.float32), bits=2)
        >>> w.rescaled(np.array([-2.0, 3.0]), 0).dequantize().tolist()
        [[-1.0], [-3.0]]
        """
        scale_O = (self.scale * factor_O).astype(np.float32)
        codes = self.codes.copy()
        np.moveaxis(codes, axis, 0)[scale_O == 0] = 0
        return replace(self, codes=codes, scale=np.where(scale_O == 0, np.float32(1), scale_O), axis=axis)

    def raised(self, least_O: Floats) -> Self:
        """Return the weight with scales of at least the given size; see `Artifact.raised`.

        >>> w = IntegerWeight(codes=np.array([[4, -2], [7, 1]], np.int8), scale=np.ones(2, np.float32), bits=4, axis=0)
        >>> found = w.raised(np.array([2.0, 0.5], np.float32))
        >>> found.codes.tolist(), found.scale.tolist()
        ([[2, -1], [7, 1]], [2.0, 1.0])
        """
        scale, axis = raised_scale(self.scale, least_O), self.axis or 0
        values_OK = granularity.rows(self.dequantize().astype(np.float64), axis)
        codes_OK = np.array(granularity.rows(self.codes, axis))
        every_O = np.broadcast_to(scale, len(codes_OK))
        for channel in np.flatnonzero(every_O != np.broadcast_to(self.scale, len(codes_OK))):
            codes_OK[channel] = np.rint(values_OK[channel] / every_O[channel])
        codes = np.array(granularity.from_rows(codes_OK, self.shape, axis), order="C")
        return replace(self, codes=codes, scale=scale)

    def with_zeros(self, where: npt.NDArray[np.bool_]) -> Self:
        """Return the weight with exact zeros at some places.

        >>> w = IntegerWeight(codes=np.array([[-2, 1]], np.int8), scale=np.array(0.5, np.float32), bits=2)
        >>> w.with_zeros(np.array([[True, False]])).dequantize().tolist()
        [[0.0, 0.5]]
        """
        zero: Any = 0 if self.zero_point is None else self._broadcast(self.zero_point)
        codes: Any = np.where(where, zero, self.codes).astype(self.codes.dtype)
        return replace(self, codes=codes)

    def halved(self) -> Self:
        """Return the weight itself: only tensors left in float are halved."""
        return self

    def parts(self, axis: int, elements: int) -> list[Self]:
        """Return the weight in parts, whole blocks each; see `Artifact.parts`.

        >>> scale_O = np.array([1.0, 0.5], np.float32)
        >>> w = IntegerWeight(codes=np.array([[1], [-2]], np.int8), scale=scale_O, bits=2, axis=0)
        >>> [part.dequantize().tolist() for part in w.parts(0, 1)]
        [[[1.0]], [[-1.0]]]
        """
        step = self.block_size if self.block_size is not None and axis == self.axis else 1
        return [
            replace(
                self,
                codes=self.codes[along(axis, piece)],
                scale=self._of_part(self.scale, axis, piece, step),
                zero_point=None if self.zero_point is None else self._of_part(self.zero_point, axis, piece, step),
            )
            for piece in cuts(self.shape, axis, elements, step)
        ]

    def _of_part(self, values: npt.NDArray[Any], axis: int, piece: slice, step: int) -> npt.NDArray[Any]:
        """Return the scales or zero points of a range of an axis, of which `step` indices have one."""
        if self.axis is None or (self.block_size is None and axis != self.axis):
            return values
        return values[along(0 if self.block_size is None else axis, in_steps(piece, step))]

    def to_arrays(self) -> tuple[Arrays, dict[str, Any]]:
        """Return the stored form: codes (as uint8, counted from the lowest), scale and zero point by suffix."""
        low = IntegerRange(self.bits, self.signed).n
        arrays: Arrays = {"codes": (self.codes.astype(np.int16) - low).astype(np.uint8), "scale": self.scale}
        if self.zero_point is not None:
            arrays["zero_point"] = self.zero_point
        fields = {"bits": self.bits, "signed": bool(self.signed), "axis": self.axis, "block_size": self.block_size}
        return arrays, fields

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], fields: Mapping[str, Any]) -> Self:
        """Return the artifact of a stored form; the exact inverse of `to_arrays`."""
        low = IntegerRange(fields["bits"], fields["signed"]).n
        codes: npt.NDArray[Any] = arrays["codes"].astype(np.int16) + low
        return cls(
            codes=codes.astype(np.int8) if fields["signed"] else codes.astype(np.uint8),
            scale=arrays["scale"],
            zero_point=arrays.get("zero_point"),
            bits=fields["bits"],
            axis=fields["axis"],
            block_size=fields["block_size"],
        )
