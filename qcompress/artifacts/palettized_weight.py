"""Weights as codes into tables of values.

Shape suffixes: O = output channels, R = elements of one output channel, G = LUT groups, K = LUT entries,
D = vector_dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Self, final

import numpy as np
import numpy.typing as npt

from qcompress.artifacts import granularity
from qcompress.artifacts.base import (
    Arrays,
    Doubles,
    Floats,
    Halves,
    Int8s,
    Integers,
    along,
    along_axis,
    broadcast_scale,
    cuts,
    in_steps,
    require,
    require_axis,
)
from qcompress.artifacts.integer_step import common_step, raised_scale
from qcompress.artifacts.packing import check_bits, packed_nbytes

_CHUNK: Final = 1 << 18  # values that are looked up together


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PalettizedWeight:
    """A weight as codes into tables of values, one table per group of output channels.

    Args:
        codes: uint8 in the weight's shape, or [ceil(N / vector_dim)] if entries are vectors.
        lut: float32, float16 or int8 [G, K], or [G, K, D] for vectors; int8 needs a scale.
        bits: width of a code, 1 to 8; K <= 2**bits.
        axis: the weight's axis that counts output channels.
        rows_per_lut: output channels that share a table; None: all of them (G = 1).
        scale: float32 that multiplies the entries, 0-d, or [O] with one per output channel; None: 1.
        weight_shape: the weight's shape; used with vectors only.

    >>> lut_GK = np.array([[-1.0, 2.0]], np.float32)
    >>> w = PalettizedWeight(codes=np.array([[0, 1], [1, 1]], np.uint8), lut=lut_GK, bits=1)
    >>> w.dequantize().tolist(), w.nbytes
    ([[-1.0, 2.0], [2.0, 2.0]], 9)
    """

    kind: ClassVar[str] = "palette"
    reason: ClassVar[str] = ""
    no_integers: ClassVar[str] = "its palette is not on an int8 grid"
    decoded_dtype: ClassVar[np.dtype[Any]] = np.dtype(np.float32)
    codes: npt.NDArray[np.uint8]
    lut: Floats | Halves | Int8s
    bits: int
    axis: int = 0
    rows_per_lut: int | None = None
    scale: Floats | None = None
    weight_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        require(self.codes.dtype == np.uint8, "PalettizedWeight.codes must be uint8", self.codes.dtype)
        require(
            self.lut.dtype in (np.float32, np.float16, np.int8),
            "PalettizedWeight.lut must be float32, float16 or int8",
            self.lut.dtype,
        )
        require(
            self.lut.ndim == 2 or (self.lut.ndim == 3 and self.lut.shape[2] > 1),
            "PalettizedWeight.lut must be [G, K], or [G, K, D] with D of at least 2",
            self.lut.shape,
        )
        require_axis("PalettizedWeight", self.axis, max(1, len(self.shape)))
        wanted_shape = self._codes_shape
        require(
            self.codes.shape == wanted_shape, f"PalettizedWeight.codes must be {list(wanted_shape)}", self.codes.shape
        )
        groups, entries = self.lut.shape[:2]
        require(entries <= 1 << self.bits, f"PalettizedWeight.lut must have at most 2**{self.bits} entries", entries)
        wanted = granularity.lut_groups(self._channels, self.rows_per_lut)
        require(groups == wanted, f"PalettizedWeight.lut must hold {wanted} tables for its rows_per_lut", groups)
        highest = int(self.codes.max()) if self.codes.size else -1
        require(highest < entries, f"PalettizedWeight.codes must be below the LUT's {entries} entries", highest)
        require(self.vector_dim == 1 or groups == 1, "A vector LUT must be one for the whole tensor", groups)
        if self.scale is None:
            require(self.lut.dtype != np.int8, "PalettizedWeight.scale must be given for an int8 lut", None)
        else:
            require(self.scale.dtype == np.float32, "PalettizedWeight.scale must be float32", self.scale.dtype)
            require(
                self.scale.shape in ((), (self._channels,)),
                f"PalettizedWeight.scale must be 0-d or one value for each of the {self._channels} output channels",
                self.scale.shape,
            )

    @property
    def vector_dim(self) -> int:
        """Weights per code."""
        return self.lut.shape[2] if self.lut.ndim == 3 else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.codes.shape if self.weight_shape is None else self.weight_shape

    @property
    def _channels(self) -> int:
        shape = self.shape
        return shape[self.axis] if shape else 1

    @property
    def _codes_shape(self) -> tuple[int, ...]:
        if self.vector_dim == 1:
            return self.shape
        require(self.weight_shape is not None, "PalettizedWeight.weight_shape must be given for vectors", None)
        return (-(-int(np.prod(self.shape)) // self.vector_dim),)

    @property
    def nbytes(self) -> int:
        """Bytes on disk: packed codes + tables + scales."""
        scale = 0 if self.scale is None else self.scale.nbytes
        return packed_nbytes(self.codes.size, self.bits) + self.lut.nbytes + scale

    def dequantize(self) -> Floats:
        """Return the float32 weight: lut[group of the output channel, code] * scale."""
        values = self.looked_up(self.lut.astype(np.float32))
        if self.scale is not None:
            values *= broadcast_scale(self.scale, self.shape, self.axis)
        return np.ascontiguousarray(values).reshape(self.shape)

    def looked_up(self, lut: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the entries of a table that the codes point to, in the weight's shape.

        Args:
            lut: any dtype, in the shape of the weight's own table.
        """
        if self.vector_dim > 1:
            return granularity.from_vectors(lut[0][self.codes], self.shape)
        codes_OR = granularity.rows(self.codes, self.axis)
        group_O = granularity.group_of_row(self._channels, self.rows_per_lut)
        found_OR = np.empty(codes_OR.shape, lut.dtype)
        step = max(1, _CHUNK // max(1, codes_OR.shape[1]))  # numpy converts indices to int64 first
        for start in range(0, len(codes_OR), step):
            piece = slice(start, start + step)
            found_OR[piece] = lut[group_O[piece, None], codes_OR[piece]]
        return granularity.from_rows(found_OR, self.shape, self.axis)

    def integers(self) -> Integers | None:
        """Return the int8 codes and scale whose product equals `dequantize()` bit for bit; None off any int8 grid.

        >>> lut_GK = np.array([[-0.5, 0, 1.5]], np.float32)
        >>> found = PalettizedWeight(codes=np.array([[0, 1, 2]], np.uint8), lut=lut_GK, bits=2).integers()
        >>> found.codes.tolist(), float(found.scale), found.axis
        ([[-1, 0, 3]], 0.5, None)
        """
        found = self.integer_lut()
        if found is None:
            return None
        lut, scale = found
        codes = np.array(self.looked_up(lut), np.int8, order="C")
        return Integers(codes, scale, self.axis if scale.ndim else None)

    def integer_lut(self) -> tuple[Int8s, Floats] | None:
        """Return the tables as integers times a scale.

        Returns:
            int8 in the shape of `lut`, and float32 scale, 0-d or [O]: float32(entry) * scale equals what the weight's
            own table and scale give, bit for bit, for every entry and output channel. None if there is no such scale.

        >>> lut_GK = np.array([[-0.75, -0.25, 0.25, 0.75]], np.float32)
        >>> integers, scale = PalettizedWeight(codes=np.zeros((1, 4), np.uint8), lut=lut_GK, bits=2).integer_lut()
        >>> integers.tolist(), float(scale)
        ([[-3, -1, 1, 3]], 0.25)
        """
        if self.lut.dtype == np.int8:
            assert self.scale is not None
            return self.lut.astype(np.int8), self.scale
        tables = np.asarray(self.lut, np.float32)
        together = common_step(tables)
        steps = [together] if together is not None else [common_step(table) for table in tables]
        if None in steps:
            return None
        steps_G = np.broadcast_to(np.array(steps, np.float32), len(tables))
        integers = np.rint(tables / along_axis(steps_G, tables.ndim, 0)).astype(np.int8)
        group_O = granularity.group_of_row(self._channels, self.rows_per_lut)
        scale = np.asarray(steps_G[group_O] if together is None else together)
        wanted_O = tables[group_O]
        with np.errstate(over="ignore", invalid="ignore"):
            if self.scale is not None:
                scale = np.asarray(scale * self.scale)
                wanted_O = wanted_O * broadcast_scale(self.scale, wanted_O.shape, 0)
            got_O = integers[group_O].astype(np.float32) * broadcast_scale(scale, wanted_O.shape, 0)
        return (integers, scale) if got_O.tobytes() == wanted_O.tobytes() else None

    def rescaled(self, factor_O: Doubles, axis: int) -> Self:
        """Return the weight times a factor for each output channel, its codes kept; see `Artifact.rescaled`."""
        scale = np.ones((), np.float32) if self.scale is None else self.scale
        return replace(self, scale=(scale * factor_O).astype(np.float32), axis=axis)

    def raised(self, least_O: Floats) -> Self:
        """Return the weight with scales of at least the given size; see `Artifact.raised`."""
        assert self.scale is not None
        scale = raised_scale(self.scale, least_O)
        values_OK = granularity.rows(self.dequantize().astype(np.float64), self.axis)
        codes_OK = np.array(granularity.rows(self.codes, self.axis))
        group_O = granularity.group_of_row(self._channels, self.rows_per_lut)
        every_O = np.broadcast_to(scale, len(codes_OK))
        for channel in np.flatnonzero(every_O != np.broadcast_to(self.scale, len(codes_OK))):
            steps_K = values_OK[channel] / every_O[channel]
            lut = self.lut[group_O[channel]].astype(np.float64)
            codes_OK[channel] = np.abs(steps_K[:, None] - lut).argmin(axis=1)
        codes = np.array(granularity.from_rows(codes_OK, self.shape, self.axis), order="C")
        return replace(self, codes=codes, scale=scale)

    def with_zeros(self, where: npt.NDArray[np.bool_]) -> Self:
        """Return the weight with exact zeros at some places: the entry nearest to 0 of their tables becomes 0.

        >>> lut_GK = np.array([[-1.0, 0.1]], np.float32)
        >>> w = PalettizedWeight(codes=np.array([[0, 1, 0]], np.uint8), lut=lut_GK, bits=1)
        >>> w.with_zeros(np.array([[True, False, False]])).dequantize().tolist()
        [[0.0, 0.0, -1.0]]
        """
        if self.vector_dim > 1 or not where.any():
            return self
        where_OR = granularity.rows(where, self.axis)
        group_O = granularity.group_of_row(self._channels, self.rows_per_lut)
        nearest_G = np.abs(self.lut.astype(np.float32)).argmin(axis=1)
        lut, codes_OR = self.lut.copy(), np.array(granularity.rows(self.codes, self.axis))
        groups = np.unique(group_O[where_OR.any(axis=1)])
        lut[groups, nearest_G[groups]] = 0
        codes_OR[where_OR] = np.broadcast_to(nearest_G[group_O][:, None], where_OR.shape)[where_OR]
        codes = np.array(granularity.from_rows(codes_OR, self.shape, self.axis), np.uint8, order="C")
        return replace(self, codes=codes, lut=lut)

    def halved(self) -> Self:
        """Return the weight itself: only tensors left in float are halved."""
        return self

    def parts(self, axis: int, elements: int) -> list[Self]:
        """Return the weight in parts, whole tables or vectors each; see `Artifact.parts`.

        >>> lut_GK = np.array([[0.0, 1.0], [2.0, 3.0]], np.float32)
        >>> w = PalettizedWeight(codes=np.array([[0], [1], [1]], np.uint8), lut=lut_GK, bits=1, rows_per_lut=2)
        >>> [part.dequantize().tolist() for part in w.parts(0, 2)]
        [[[0.0], [1.0]], [[3.0]]]
        """
        if self.vector_dim > 1:
            return self._parts_of_vectors(axis, elements)
        step = self.rows_per_lut or 1 if axis == self.axis else 1
        return [
            replace(
                self,
                codes=self.codes[along(axis, piece)],
                lut=self.lut if self.rows_per_lut is None or axis != self.axis else self.lut[in_steps(piece, step)],
                scale=self._scale_of(axis, piece),
            )
            for piece in cuts(self.shape, axis, elements, step)
        ]

    def _parts_of_vectors(self, axis: int, elements: int) -> list[Self]:
        *outer, inner = self.shape
        if inner % self.vector_dim:  # vectors reach from row to row
            return []
        codes = self.codes.reshape(*outer, inner // self.vector_dim)
        step = self.vector_dim if axis == len(outer) else 1
        return [
            replace(
                self,
                codes=codes[along(axis, in_steps(piece, step))].ravel(),
                scale=self._scale_of(axis, piece),
                weight_shape=(*self.shape[:axis], piece.stop - piece.start, *self.shape[axis + 1 :]),
            )
            for piece in cuts(self.shape, axis, elements, step)
        ]

    def _scale_of(self, axis: int, piece: slice) -> Floats | None:
        """Return the scale of a range of an axis."""
        if self.scale is None or not self.scale.ndim or axis != self.axis:
            return self.scale
        return self.scale[piece]

    def to_arrays(self) -> tuple[Arrays, dict[str, Any]]:
        """Return the stored form: codes, lut and scale by suffix."""
        arrays: Arrays = {"codes": self.codes, "lut": self.lut}
        if self.scale is not None:
            arrays["scale"] = self.scale
        return arrays, {
            "bits": self.bits,
            "axis": self.axis,
            "rows_per_lut": self.rows_per_lut,
            "weight_shape": None if self.weight_shape is None else list(self.weight_shape),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], fields: Mapping[str, Any]) -> Self:
        """Return the artifact of a stored form; the exact inverse of `to_arrays`."""
        shape = fields["weight_shape"]
        return cls(
            codes=arrays["codes"],
            lut=arrays["lut"],
            scale=arrays.get("scale"),
            bits=fields["bits"],
            axis=fields["axis"],
            rows_per_lut=fields["rows_per_lut"],
            weight_shape=None if shape is None else tuple(shape),
        )
