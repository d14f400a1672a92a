"""The hinge: what every method ends in and every exporter starts from.

An artifact is frozen, holds numpy arrays only, and knows three things about itself: the float32 weight that it stands
for (`dequantize`, the reference for parity), the bytes that it takes on disk (`nbytes`), and bits per weight.

Shape suffixes: O = output channels, R = elements of one output channel, G = LUT groups, K = LUT entries,
D = vector_dim.
"""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Protocol, Self, final, runtime_checkable

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qcompress import granularity, grid
from qcompress.errors import ConfigError
from qcompress.packing import check_bits, packed_nbytes

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Int8s = npt.NDArray[np.int8]
Arrays = dict[str, npt.NDArray[Any]]


@runtime_checkable
class Artifact(Protocol):
    """What the exporters, the size report and parity ask of a weight."""

    kind: ClassVar[str]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk: packed codes, tables and scales, without any container."""

    def dequantize(self) -> npt.NDArray[Any]:
        """What the graph computes with, in the weight's own shape: float32, but for integer buffers."""

    def to_arrays(self) -> tuple[Arrays, dict[str, Any]]:
        """Stored form: arrays by suffix (codes unpacked), and what JSON holds of the rest."""


def bits_per_weight(artifact: Artifact) -> float:
    """Bytes on disk per weight, in bits.

    >>> bits_per_weight(FloatWeight(values=np.zeros(4, np.float32), reason="not a weight"))
    32.0
    """
    return 8 * artifact.nbytes / max(1, int(np.prod(artifact.shape)))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PalettizedWeight:
    """Codes into a table of values, one table per group of output channels.

    Args:
        codes: uint8 in the weight's shape, or [ceil(N / vector_dim)] where an entry is a vector.
        lut: float32, float16 or int8 [G, K], or [G, K, D] for vectors; int8 needs a scale.
        bits: width of a code, 1 to 8; K <= 2**bits.
        axis: the weight's axis that counts output channels.
        rows_per_lut: output channels that share a table; None: all of them (G = 1).
        scale: float32 that multiplies the entries, 0-d or [O] for each output channel its own; None: nothing.
        weight_shape: the weight's shape; needed for vectors only.

    >>> lut_GK = np.array([[-1.0, 2.0]], np.float32)
    >>> w = PalettizedWeight(codes=np.array([[0, 1], [1, 1]], np.uint8), lut=lut_GK, bits=1)
    >>> w.dequantize().tolist(), w.nbytes
    ([[-1.0, 2.0], [2.0, 2.0]], 9)
    """

    kind: ClassVar[str] = "palette"
    codes: npt.NDArray[np.uint8]
    lut: Floats | Halves | Int8s
    bits: int
    axis: int = 0
    rows_per_lut: int | None = None
    scale: Floats | None = None
    weight_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        _require(self.codes.dtype == np.uint8, "PalettizedWeight.codes must be uint8", self.codes.dtype)
        _require(
            self.lut.dtype in (np.float32, np.float16, np.int8),
            "PalettizedWeight.lut must be float32, float16 or int8",
            self.lut.dtype,
        )
        _require(
            self.lut.ndim == 2 or (self.lut.ndim == 3 and self.lut.shape[2] > 1),
            "PalettizedWeight.lut must be [G, K], or [G, K, D] with D of at least 2",
            self.lut.shape,
        )
        _require_axis("PalettizedWeight", self.axis, max(1, len(self.shape)))
        wanted_shape = self._codes_shape
        _require(
            self.codes.shape == wanted_shape, f"PalettizedWeight.codes must be {list(wanted_shape)}", self.codes.shape
        )
        groups, entries = self.lut.shape[:2]
        _require(entries <= 1 << self.bits, f"PalettizedWeight.lut must have at most 2**{self.bits} entries", entries)
        wanted = granularity.lut_groups(self._channels, self.rows_per_lut)
        _require(groups == wanted, f"PalettizedWeight.lut must hold {wanted} tables for its rows_per_lut", groups)
        highest = int(self.codes.max()) if self.codes.size else -1
        _require(highest < entries, f"PalettizedWeight.codes must be below the LUT's {entries} entries", highest)
        _require(self.vector_dim == 1 or groups == 1, "A vector LUT must be one for the whole tensor", groups)
        if self.scale is None:
            _require(self.lut.dtype != np.int8, "PalettizedWeight.scale must be given for an int8 lut", None)
        else:
            _require(self.scale.dtype == np.float32, "PalettizedWeight.scale must be float32", self.scale.dtype)
            _require(
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
        _require(self.weight_shape is not None, "PalettizedWeight.weight_shape must be given for vectors", None)
        return (-(-int(np.prod(self.shape)) // self.vector_dim),)

    @property
    def nbytes(self) -> int:
        """Bytes on disk: packed codes + tables + scales."""
        scale = 0 if self.scale is None else self.scale.nbytes
        return packed_nbytes(self.codes.size, self.bits) + self.lut.nbytes + scale

    def dequantize(self) -> Floats:
        """The float32 weight: lut[group of the output channel, code] * scale."""
        values = self.looked_up(self.lut.astype(np.float32))
        if self.scale is not None:
            values *= spread(self.scale, self.shape, self.axis)
        return np.ascontiguousarray(values).reshape(self.shape)

    def looked_up(self, lut: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What the codes point to in a table, in the weight's shape.

        Args:
            lut: [G, K] or [G, K, D], any dtype, in the shape of the weight's own.
        """
        if self.vector_dim > 1:
            return granularity.from_vectors(lut[0][self.codes], self.shape)
        codes_OR = granularity.rows(self.codes, self.axis)
        group_O = granularity.group_of_row(self._channels, self.rows_per_lut)
        found_OR = np.empty(codes_OR.shape, lut.dtype)
        step = max(1, _CHUNK // max(1, codes_OR.shape[1]))  # what numpy looks up by becomes int64 first
        for start in range(0, len(codes_OR), step):
            piece = slice(start, start + step)
            found_OR[piece] = lut[group_O[piece, None], codes_OR[piece]]
        return granularity.from_rows(found_OR, self.shape, self.axis)

    def to_arrays(self) -> tuple[Arrays, dict[str, Any]]:
        """Stored form: codes, lut and scale by suffix."""
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
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], fields: Mapping[str, Any]) -> "PalettizedWeight":
        """The exact inverse of `to_arrays`."""
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


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerWeight:
    """Codes on a uniform grid: (codes - zero_point) * scale.

    Args:
        codes: int8 (signed) or uint8, in the weight's shape.
        scale: float32, 0-d, [O] along `axis`, or [ceil(size / block_size)] blocks in place of `axis`.
        zero_point: same dtype as codes, same shape as scale; None: 0.
        bits: width of a code, 1 to 8.
        axis: axis of the scales; None: one scale.
        block_size: consecutive elements of `axis` that share a scale; None: one scale per element of `axis`.

    >>> w = IntegerWeight(codes=np.array([[-2, 1]], np.int8), scale=np.array(0.5, np.float32), bits=2)
    >>> w.dequantize().tolist(), w.nbytes
    ([[-1.0, 0.5]], 5)
    """

    kind: ClassVar[str] = "uniform"
    codes: npt.NDArray[np.int8] | npt.NDArray[np.uint8]
    scale: Floats
    bits: int
    axis: int | None = None
    block_size: int | None = None
    zero_point: npt.NDArray[np.int8] | npt.NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        _require(self.codes.dtype in (np.int8, np.uint8), "IntegerWeight.codes must be int8 or uint8", self.codes.dtype)
        _require(self.scale.dtype == np.float32, "IntegerWeight.scale must be float32", self.scale.dtype)
        wanted = self._scale_shape
        _require(self.scale.shape == wanted, f"IntegerWeight.scale must be {list(wanted)}", self.scale.shape)
        if self.zero_point is not None:
            _require(
                self.zero_point.dtype == self.codes.dtype,
                f"IntegerWeight.zero_point must be {self.codes.dtype} as its codes are",
                self.zero_point.dtype,
            )
            _require(
                self.zero_point.shape == wanted,
                f"IntegerWeight.zero_point must be {list(wanted)}",
                self.zero_point.shape,
            )
        limits = grid.IntegerRange(self.bits, self.signed)
        if self.codes.size:
            low, high = int(self.codes.min()), int(self.codes.max())
            _require(
                limits.n <= low and high <= limits.p,
                f"IntegerWeight.codes must be in [{limits.n}, {limits.p}] at {self.bits} bits",
                (low, high),
            )

    @property
    def _scale_shape(self) -> tuple[int, ...]:
        if self.axis is None:
            _require(self.block_size is None, "IntegerWeight.block_size must be None without an axis", self.block_size)
            return ()
        _require_axis("IntegerWeight", self.axis, len(self.shape))
        count = self.shape[self.axis]
        if self.block_size is None:
            return (count,)
        _require(self.block_size >= 1, "IntegerWeight.block_size must be at least 1", self.block_size)
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
        """The float32 weight: (codes - zero_point) * scale."""
        codes = self.codes.astype(np.int32)
        if self.zero_point is not None:
            codes = codes - self._spread(self.zero_point.astype(np.int32))
        return np.array(codes.astype(np.float32) * self._spread(self.scale), np.float32, order="C")

    def _spread(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if self.axis is None:
            return values
        if self.block_size is None:
            return along_axis(values, self.codes.ndim, self.axis)
        wide = np.repeat(values, min(self.block_size, self.codes.shape[self.axis]), axis=self.axis)
        return np.take(wide, np.arange(self.codes.shape[self.axis]), axis=self.axis)

    def to_arrays(self) -> tuple[Arrays, dict[str, Any]]:
        """Stored form: codes (as uint8 from the lowest code up), scale and zero point by suffix."""
        low = grid.IntegerRange(self.bits, self.signed).n
        arrays: Arrays = {"codes": (self.codes.astype(np.int16) - low).astype(np.uint8), "scale": self.scale}
        if self.zero_point is not None:
            arrays["zero_point"] = self.zero_point
        fields = {"bits": self.bits, "signed": bool(self.signed), "axis": self.axis, "block_size": self.block_size}
        return arrays, fields

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], fields: Mapping[str, Any]) -> "IntegerWeight":
        """The exact inverse of `to_arrays`."""
        low = grid.IntegerRange(fields["bits"], fields["signed"]).n
        codes: npt.NDArray[Any] = arrays["codes"].astype(np.int16) + low
        return cls(
            codes=codes.astype(np.int8) if fields["signed"] else codes.astype(np.uint8),
            scale=arrays["scale"],
            zero_point=arrays.get("zero_point"),
            bits=fields["bits"],
            axis=fields["axis"],
            block_size=fields["block_size"],
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class FloatWeight:
    """A tensor left as it is, and why.

    Args:
        values: the tensor; float32, float16 or bfloat16 are written as such, other dtypes (buffers) unchanged.
        reason: what a user is told, "by plan" for one.
    """

    kind: ClassVar[str] = "float"
    values: npt.NDArray[Any]
    reason: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.values.nbytes

    def dequantize(self) -> npt.NDArray[Any]:
        """The value that the graph computes with: 16-bit floats widened to float32, anything else as it is."""
        if self.values.dtype in FLOAT_DTYPES:
            return np.array(self.values, np.float32, order="C")
        return self.values

    def to_arrays(self) -> tuple[Arrays, dict[str, Any]]:
        """Stored form: the values under no suffix."""
        return {"": self.values}, {"reason": self.reason}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], fields: Mapping[str, Any]) -> "FloatWeight":
        """The exact inverse of `to_arrays`."""
        return cls(values=arrays[""], reason=fields["reason"])


# The table of artifacts: a new one is a class above and a line here.
ARTIFACTS: Final[Mapping[str, type[PalettizedWeight] | type[IntegerWeight] | type[FloatWeight]]] = {
    "palette": PalettizedWeight,
    "uniform": IntegerWeight,
    "float": FloatWeight,
}

_CHUNK: Final = 1 << 18  # values that are looked up at once
FLOAT_DTYPES: Final = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationGrid:
    """The grid that one activation is quantized to: x_hat = codes * scale + offset, codes in [n, p].

    What is stored and computed with is unsigned: u = code - n, uint8 in [0, levels].

    Args:
        site: (qualified name of the consumer, argument index), or (name of a value, -1): what gives that value.
        scale: float32 0-d, finite, > 0.
        offset: float32 0-d, finite; the beta of LSQ+.
        bits: width of a code, 1 to 8.
        signed: whether codes are signed: which [n, p] of `IntegerRange` they have.

    Raises:
        ConfigError: one of them is not that.

    >>> grid = ActivationGrid.from_zero_point(("fc.weight", 0), scale=0.5, zero_point=2, bits=4)
    >>> u = grid.quantize(np.array([-9.0, -0.5, 0.0, 0.8, 99.0], np.float32))
    >>> u.tolist(), grid.dequantize(u).tolist()
    ([0, 1, 2, 4, 15], [-1.0, -0.5, 0.0, 1.0, 6.5])
    """

    site: tuple[str, int]
    scale: Floats
    offset: Floats
    bits: int
    signed: bool

    def __post_init__(self) -> None:
        check_bits(self.bits)
        _require_site("ActivationGrid", self.site)
        for name, value in (("scale", self.scale), ("offset", self.offset)):
            _require_scalar(f"ActivationGrid.{name}", value)
        _require(bool(0 < self.scale < np.inf), "ActivationGrid.scale must be finite and above 0", self.scale)
        _require(bool(np.isfinite(self.offset)), "ActivationGrid.offset must be finite", self.offset)

    @classmethod
    def from_zero_point(cls, site: tuple[str, int], scale: float | Floats, zero_point: int, bits: int) -> Self:
        """The unsigned grid x_hat = (u - zero_point) * scale.

        Args:
            site: as in the class.
            scale: finite, > 0; rounded to float32.
            zero_point: the code of 0.0, in [0, 255].
            bits: width of a code, 1 to 8.
        """
        _require(0 <= zero_point <= 255, "ActivationGrid.zero_point must be in [0, 255]", zero_point)
        narrow = _float32(scale)
        return cls(site=site, scale=narrow, offset=_multiple(-zero_point, narrow), bits=bits, signed=False)

    @property
    def levels(self) -> int:
        """The largest code as it is stored."""
        limits = grid.IntegerRange(self.bits, self.signed)
        return limits.p - limits.n

    @property
    def zero_point(self) -> int | None:
        """The z in [0, 255] with which x_hat = (u - z) * scale is exactly this grid; None: there is none.

        >>> one, half = np.float32(1), np.float32(0.5)
        >>> ActivationGrid(site=("x", -1), scale=one, offset=-one, bits=8, signed=True).zero_point
        129
        >>> ActivationGrid(site=("x", -1), scale=one, offset=half, bits=8, signed=True).zero_point is None
        True
        """
        n = grid.IntegerRange(self.bits, self.signed).n
        z = self._nearest_zero_point()
        return z if 0 <= z <= 255 and self.offset == _multiple(-(z + n), self.scale) else None

    def _nearest_zero_point(self) -> int:
        return round(-float(self.offset) / float(self.scale)) - grid.IntegerRange(self.bits, self.signed).n

    @property
    def nbytes(self) -> int:
        """Bytes on disk: float32 scale, uint8 zero point, and where there is none of those a float32 offset beside."""
        return 5 if self.zero_point is not None else 9

    def quantize(self, x: Floats) -> npt.NDArray[np.uint8]:
        """Codes as they are stored, what does not fit clipped.

        With a zero point this is what onnxruntime's QuantizeLinear does: divide, round half to even, then add it.

        Args:
            x: float32, any shape; Inf is clipped, NaN is not allowed.

        Returns:
            uint8 in [0, levels], in the shape of `x`.
        """
        z = self.zero_point
        with np.errstate(over="ignore"):
            if z is not None:
                codes = np.rint(x / self.scale) + np.float32(z)
            else:
                n = grid.IntegerRange(self.bits, self.signed).n
                codes = np.rint((x - self.offset) / self.scale) - np.float32(n)
        return np.asarray(np.clip(codes, 0, self.levels), np.uint8)

    def dequantize(self, u: npt.NDArray[np.uint8]) -> Floats:
        """The values of stored codes.

        Args:
            u: uint8 in [0, levels], any shape.

        Returns:
            float32 in the shape of `u`.
        """
        z = self.zero_point
        if z is not None:
            return np.asarray((u.astype(np.float32) - np.float32(z)) * self.scale)
        n = grid.IntegerRange(self.bits, self.signed).n
        return np.asarray((u.astype(np.float32) + np.float32(n)) * self.scale + self.offset)

    def snapped(self) -> Self:
        """This grid with its offset moved to the nearest one that has a zero point."""
        z = min(max(self._nearest_zero_point(), 0), 255)
        offset = _multiple(-(z + grid.IntegerRange(self.bits, self.signed).n), self.scale)
        return replace(self, offset=offset)

    def as_dict(self) -> dict[str, Any]:
        """What JSON holds of it; every float32 is a Python float of the same value."""
        return {
            "site": list(self.site),
            "scale": float(self.scale),
            "offset": float(self.offset),
            "bits": self.bits,
            "signed": self.signed,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The exact inverse of `as_dict`.

        Raises:
            ConfigError: a field is missing, of another type, or has a value that it cannot have.
        """
        for name, kind in (("site", list), ("scale", float), ("offset", float), ("bits", int), ("signed", bool)):
            got = fields.get(name)
            _require(type(got) is kind, f"ActivationGrid.{name} must be stored as {kind.__name__}", repr(got))
        return cls(
            site=tuple(fields["site"]),
            scale=_float32(fields["scale"]),
            offset=_float32(fields["offset"]),
            bits=fields["bits"],
            signed=fields["signed"],
        )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdGrid:
    """The grid of an activation with learned thresholds: x_hat = codes * scale, codes counting thresholds up to x.

    Args:
        site: as in `ActivationGrid`.
        thresholds: float32 [2**bits - 1] on x itself, finite, none below the one before it.
        scale: float32 0-d, finite, > 0: what neighbouring output levels differ by.
        bits: width of a code, 1 to 8.

    Raises:
        ConfigError: one of them is not that.

    >>> thresholds = np.array([0.25, 1.0, 4.0], np.float32)
    >>> grid = ThresholdGrid(site=("fc.weight", 0), thresholds=thresholds, scale=np.asarray(np.float32(0.5)), bits=2)
    >>> u = grid.quantize(np.array([-9.0, 0.25, 0.8, 99.0], np.float32))
    >>> u.tolist(), grid.dequantize(u).tolist(), grid.nbytes
    ([0, 1, 1, 3], [0.0, 0.5, 0.5, 1.5], 16)
    """

    site: tuple[str, int]
    thresholds: Floats
    scale: Floats
    bits: int

    def __post_init__(self) -> None:
        check_bits(self.bits)
        _require_site("ThresholdGrid", self.site)
        _require(
            self.thresholds.dtype == np.float32 and self.thresholds.shape == (self.levels,),
            f"ThresholdGrid.thresholds must be float32 [{self.levels}] at {self.bits} bits",
            f"{self.thresholds.dtype} {list(self.thresholds.shape)}",
        )
        _require(
            bool(np.isfinite(self.thresholds).all() and (np.diff(self.thresholds) >= 0).all()),
            "ThresholdGrid.thresholds must be finite and ascend",
            self.thresholds.tolist(),
        )
        _require_scalar("ThresholdGrid.scale", self.scale)
        _require(bool(0 < self.scale < np.inf), "ThresholdGrid.scale must be finite and above 0", self.scale)

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def zero_point(self) -> int:
        """The code that stands for 0.0: layers take the codes of an even, unsigned grid."""
        return 0

    @property
    def offset(self) -> Floats:
        """What is added to scaled codes: nothing."""
        return np.zeros((), np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes on disk: thresholds and scale."""
        return self.thresholds.nbytes + self.scale.nbytes

    def quantize(self, x: Floats) -> npt.NDArray[np.uint8]:
        """How many thresholds each value reaches.

        Args:
            x: float32, any shape; NaN is not allowed.

        Returns:
            uint8 in [0, levels], in the shape of `x`.
        """
        return np.asarray(np.searchsorted(self.thresholds, x, side="right"), np.uint8)

    def dequantize(self, u: npt.NDArray[np.uint8]) -> Floats:
        """The values of codes.

        Args:
            u: uint8 in [0, levels], any shape.

        Returns:
            float32 in the shape of `u`.
        """
        return np.asarray(u.astype(np.float32) * self.scale)

    def as_dict(self) -> dict[str, Any]:
        """What JSON holds of it; every float32 is a Python float of the same value."""
        return {
            "site": list(self.site),
            "thresholds": self.thresholds.tolist(),
            "scale": float(self.scale),
            "bits": self.bits,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The exact inverse of `as_dict`.

        Raises:
            ConfigError: a field is missing, of another type, or has a value that it cannot have.
        """
        for name, kind in (("site", list), ("thresholds", list), ("scale", float), ("bits", int)):
            got = fields.get(name)
            _require(type(got) is kind, f"ThresholdGrid.{name} must be stored as {kind.__name__}", repr(got))
        wrong = [value for value in fields["thresholds"] if type(value) is not float]
        _require(not wrong, "ThresholdGrid.thresholds must be stored as floats", wrong)
        return cls(
            site=tuple(fields["site"]),
            thresholds=_float32(fields["thresholds"]),
            scale=_float32(fields["scale"]),
            bits=fields["bits"],
        )


AnyGrid = ActivationGrid | ThresholdGrid


def grid_from_dict(fields: Mapping[str, Any]) -> AnyGrid:
    """The exact inverse of `as_dict` of either grid.

    Raises:
        ConfigError: a field is missing, of another type, or has a value that it cannot have.

    >>> grid = ActivationGrid.from_zero_point(("x", -1), scale=0.5, zero_point=2, bits=4)
    >>> type(grid_from_dict(grid.as_dict())).__name__
    'ActivationGrid'
    """
    kind: type[ActivationGrid] | type[ThresholdGrid] = ThresholdGrid if "thresholds" in fields else ActivationGrid
    return kind.from_dict(fields)


def _float32(value: float | list[float] | Floats) -> Floats:
    with np.errstate(over="ignore"):  # too large: Inf, which every grid refuses
        return np.asarray(value).astype(np.float32)


def _multiple(count: int, scale: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.asarray(np.float32(count) * scale)


def integer_values(artifact: Artifact) -> tuple[Int8s, Floats, int | None] | None:
    """A weight as int8 codes times a scale, for kernels that compute with integers.

    Args:
        artifact: any.

    Returns:
        int8 codes in the weight's shape, float32 scale, and the axis of which each index has its own scale (None: the
        scale is 0-d): float32(codes) * scale equals `artifact.dequantize()` bit for bit. None where there are no such
        codes: float weights, blocks, zero points other than 0, unsigned codes above 127, palettes off any grid.

    >>> w = PalettizedWeight(codes=np.array([[0, 1, 2]], np.uint8), lut=np.array([[-0.5, 0, 1.5]], np.float32), bits=2)
    >>> codes, scale, axis = integer_values(w)
    >>> codes.tolist(), float(scale), axis
    ([[-1, 0, 3]], 0.5, None)
    """
    if isinstance(artifact, PalettizedWeight):
        found = integer_lut(artifact)
        if found is None:
            return None
        lut, scale = found
        codes = np.array(artifact.looked_up(lut), np.int8, order="C")
        return codes, scale, artifact.axis if scale.ndim else None
    if not isinstance(artifact, IntegerWeight) or artifact.block_size is not None:
        return None
    if artifact.zero_point is not None and artifact.zero_point.any():
        return None
    if not artifact.signed and artifact.codes.max(initial=0) > 127:
        return None
    return artifact.codes.astype(np.int8), artifact.scale, artifact.axis


def integer_lut(weight: PalettizedWeight) -> tuple[Int8s, Floats] | None:
    """A palette's tables as integers times a scale.

    Args:
        weight: any palettized weight.

    Returns:
        int8 in the shape of `weight.lut`, and float32 scale, 0-d or [O]: float32(entry) * scale equals what the
        weight's own table and scale give, bit for bit, for every entry and output channel. None where there is no such
        scale.

    >>> lut = np.array([[-0.75, -0.25, 0.25, 0.75]], np.float32)
    >>> integers, scale = integer_lut(PalettizedWeight(codes=np.zeros((1, 4), np.uint8), lut=lut, bits=2))
    >>> integers.tolist(), float(scale)
    ([[-3, -1, 1, 3]], 0.25)
    """
    if weight.lut.dtype == np.int8:
        assert weight.scale is not None
        return weight.lut.astype(np.int8), weight.scale
    tables = np.asarray(weight.lut, np.float32)
    together = _common_step(tables)
    steps = [together] if together is not None else [_common_step(table) for table in tables]
    if None in steps:
        return None
    steps_G = np.broadcast_to(np.array(steps, np.float32), len(tables))
    integers = np.rint(tables / along_axis(steps_G, tables.ndim, 0)).astype(np.int8)
    group_O = granularity.group_of_row(weight.shape[weight.axis] if weight.shape else 1, weight.rows_per_lut)
    scale = np.asarray(steps_G[group_O] if together is None else together)
    wanted_O = tables[group_O]
    with np.errstate(over="ignore", invalid="ignore"):
        if weight.scale is not None:
            scale = np.asarray(scale * weight.scale)
            wanted_O = wanted_O * spread(weight.scale, wanted_O.shape, 0)
        got_O = integers[group_O].astype(np.float32) * spread(scale, wanted_O.shape, 0)
    return (integers, scale) if got_O.tobytes() == wanted_O.tobytes() else None


_LARGEST: Final = 127  # both signs of it are int8


def _common_step(values: Floats) -> np.float32 | None:
    """The largest float32 of which every value is a multiple by at most 127, as float32 multiplies; None: none."""
    magnitudes = np.unique(np.abs(values[values != 0]))
    if not len(magnitudes):
        return np.float32(1)
    if not np.isfinite(magnitudes[-1]):
        return None
    # The smallest value is j steps for some j. It and the largest are rounded products: the step that gives both is
    # within an ulp of the quotient.
    smallest, largest = float(magnitudes[0]), float(magnitudes[-1])
    j = np.arange(1, _LARGEST + 1)
    most = np.rint(largest * j / smallest)
    most = most[most <= _LARGEST]
    nearest = (largest / most).astype(np.float32)
    below, above = np.nextafter(nearest, np.float32(0)), np.nextafter(nearest, np.float32(largest))
    steps = np.unique(np.concatenate([below, nearest, above]))
    steps = steps[steps > 0]
    for magnitude in magnitudes:  # nearly all steps fail at the first one or two
        counts = np.rint(magnitude / steps)
        steps = steps[(counts <= _LARGEST) & (counts * steps == magnitude)]
    return np.float32(steps[-1]) if len(steps) else None


def spread(scale: Floats, shape: tuple[int, ...], axis: int | None) -> Floats:
    """A scale, 0-d or one for each index of `axis`, as it broadcasts against a weight.

    >>> spread(np.zeros(3, np.float32), (2, 3), 1).shape, spread(np.float32(2), (2, 3), 1).shape
    ((1, 3), ())
    """
    return along_axis(scale, len(shape), axis) if axis is not None and scale.ndim else scale


def along_axis(values: npt.NDArray[Any], ndim: int, axis: int) -> npt.NDArray[Any]:
    """A vector shaped to broadcast along one axis of an `ndim`-dimensional array.

    >>> along_axis(np.zeros(8), 4, 0).shape
    (8, 1, 1, 1)
    """
    return values.reshape([-1 if i == axis else 1 for i in range(ndim)])


def digest(values: npt.NDArray[Any]) -> str:
    """A short digest of a decoded tensor: 11 characters, 66 bits of SHA-256 over dtype, shape and bytes.

    >>> digest(np.zeros(3, np.float32)), digest(np.zeros(4, np.float32))
    ('hl831PiDsz5', 'J6L4CB6Zs0X')
    """
    values = np.asarray(values, order="C")
    head = f"{values.dtype.str}{list(values.shape)}".encode()
    return short_digest(head, values.reshape(-1).view(np.uint8).data)  # no copy


def short_digest(*parts: bytes | memoryview) -> str:
    """11 characters (66 bits) of the SHA-256 over `parts`, URL-safe.

    >>> short_digest(b"abc") == short_digest(b"a", b"bc")
    True
    """
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return base64.urlsafe_b64encode(state.digest()).decode()[:11]


def _require(condition: bool, requirement: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"{requirement}, got {got}.")


def _require_site(who: str, site: object) -> None:
    _require(
        isinstance(site, tuple) and [type(part) for part in site] == [str, int] and site[1] >= -1,
        f"{who}.site must be (name, index) with an index of at least -1",
        site,
    )


def _require_scalar(who: str, value: Floats) -> None:
    _require(
        value.dtype == np.float32 and value.shape == (),
        f"{who} must be float32 and 0-d",
        f"{value.dtype} {list(value.shape)}",
    )


def _require_axis(who: str, axis: int, ndim: int) -> None:
    _require(0 <= axis < ndim, f"{who}.axis must be in [0, {ndim})", axis)
