"""The hinge: what every method ends in and every exporter starts from.

An artifact is frozen, holds numpy arrays only, and knows three things about itself: the float32 weight that it stands
for (`dequantize`, the reference for parity), the bytes that it takes on disk (`nbytes`), and bits per weight.

Shape suffixes: O = output channels, R = elements of one output channel, G = LUT groups, K = LUT entries,
D = vector_dim.
"""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol, final, runtime_checkable

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qcompress import granularity, grid
from qcompress.errors import ConfigError
from qcompress.packing import check_bits, packed_nbytes

Floats = npt.NDArray[np.float32]
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
    """Codes into a table of float values, one table per group of output channels.

    Args:
        codes: uint8 in the weight's shape, or [ceil(N / vector_dim)] where an entry is a vector.
        lut: float32 [G, K], or [G, K, D] for vectors.
        bits: width of a code, 1 to 8; K <= 2**bits.
        axis: the weight's axis that counts output channels.
        rows_per_lut: output channels that share a table; None: all of them (G = 1).
        scale: float32 [O] that multiplies each output channel, or None.
        weight_shape: the weight's shape; needed for vectors only.

    >>> lut_GK = np.array([[-1.0, 2.0]], np.float32)
    >>> w = PalettizedWeight(codes=np.array([[0, 1], [1, 1]], np.uint8), lut=lut_GK, bits=1)
    >>> w.dequantize().tolist(), w.nbytes
    ([[-1.0, 2.0], [2.0, 2.0]], 9)
    """

    kind: ClassVar[str] = "palette"
    codes: npt.NDArray[np.uint8]
    lut: Floats
    bits: int
    axis: int = 0
    rows_per_lut: int | None = None
    scale: Floats | None = None
    weight_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        _require(self.codes.dtype == np.uint8, "PalettizedWeight.codes must be uint8", self.codes.dtype)
        _require(self.lut.dtype == np.float32, "PalettizedWeight.lut must be float32", self.lut.dtype)
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
        if self.scale is not None:
            _require(self.scale.dtype == np.float32, "PalettizedWeight.scale must be float32", self.scale.dtype)
            _require(
                self.scale.shape == (self._channels,),
                f"PalettizedWeight.scale must have one value for each of the {self._channels} output channels",
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
        if self.vector_dim > 1:
            values = granularity.from_vectors(self.lut[0][self.codes], self.shape)
        else:
            codes_OR = granularity.rows(self.codes, self.axis)
            group_O = granularity.group_of_row(self._channels, self.rows_per_lut)
            values = granularity.from_rows(self.lut[group_O[:, None], codes_OR], self.shape, self.axis)
        if self.scale is not None:
            values = values * along_axis(self.scale, len(self.shape), self.axis)
        return np.array(values, np.float32, order="C")

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

FLOAT_DTYPES: Final = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationGrid:
    """The grid that one activation is quantized to: x_hat = codes * scale + offset.

    Args:
        site: (qualified name of the consumer, argument index), or the producer's for outputs.
        scale: float32 0-d, > 0.
        offset: float32 0-d, the β of LSQ+.
        bits: width of a code.
        signed: whether codes are signed.
    """

    site: tuple[str, int]
    scale: Floats
    offset: Floats
    bits: int
    signed: bool


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
    return short_digest(head, values.tobytes())


def short_digest(*parts: bytes) -> str:
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


def _require_axis(who: str, axis: int, ndim: int) -> None:
    _require(0 <= axis < ndim, f"{who}.axis must be in [0, {ndim})", axis)
