"""Even activation grids."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, final

import numpy as np
import numpy.typing as npt

from qcompress.artifacts.base import Floats, require
from qcompress.artifacts.integer_range import IntegerRange
from qcompress.artifacts.packing import check_bits
from qcompress.artifacts.site_grid import float32, multiple, require_scalar, require_site


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationGrid:
    """The grid that one activation is quantized to: x_hat = codes * scale + offset, codes in [n, p].

    Stored codes, which files compute with, are unsigned: u = code - n, uint8 in [0, levels].

    Args:
        site: (qualified name of the consumer, argument index), or (name of a value, -1) for the value's producer.
        scale: float32 0-d, finite, > 0.
        offset: float32 0-d, finite; β of LSQ+.
        bits: width of a code, 1 to 8.
        signed: whether codes are signed; decides [n, p], see `IntegerRange`.

    Raises:
        ConfigError: a field has the wrong dtype, shape or range.

    >>> grid = ActivationGrid.from_zero_point(("fc.weight", 0), scale=0.5, zero_point=2, bits=4)
    >>> u = grid.quantize(np.array([-9.0, -0.5, 0.0, 0.8, 99.0], np.float32))
    >>> u.tolist(), grid.dequantize(u).tolist()
    ([0, 1, 2, 4, 15], [-1.0, -0.5, 0.0, 1.0, 6.5])
    """

    kind: ClassVar[str] = "even"
    site: tuple[str, int]
    scale: Floats
    offset: Floats
    bits: int
    signed: bool

    def __post_init__(self) -> None:
        check_bits(self.bits)
        require_site("ActivationGrid", self.site)
        for name, value in (("scale", self.scale), ("offset", self.offset)):
            require_scalar(f"ActivationGrid.{name}", value)
        require(bool(0 < self.scale < np.inf), "ActivationGrid.scale must be finite and above 0", self.scale)
        require(bool(np.isfinite(self.offset)), "ActivationGrid.offset must be finite", self.offset)

    @classmethod
    def from_zero_point(cls, site: tuple[str, int], scale: float | Floats, zero_point: int, bits: int) -> Self:
        """Return the unsigned grid x_hat = (u - zero_point) * scale.

        Args:
            site: as in the class.
            scale: finite, > 0; rounded to float32.
            zero_point: the code of 0.0, in [0, 255].
            bits: width of a code, 1 to 8.
        """
        require(0 <= zero_point <= 255, "ActivationGrid.zero_point must be in [0, 255]", zero_point)
        narrow = float32(scale)
        return cls(site=site, scale=narrow, offset=multiple(-zero_point, narrow), bits=bits, signed=False)

    @property
    def levels(self) -> int:
        """The largest code as it is stored."""
        limits = IntegerRange(self.bits, self.signed)
        return limits.p - limits.n

    @property
    def zero_point(self) -> int | None:
        """The z in [0, 255] with which x_hat = (u - z) * scale is exactly this grid; None if there is no such z.

        >>> one, half = np.float32(1), np.float32(0.5)
        >>> ActivationGrid(site=("x", -1), scale=one, offset=-one, bits=8, signed=True).zero_point
        129
        >>> ActivationGrid(site=("x", -1), scale=one, offset=half, bits=8, signed=True).zero_point is None
        True
        """
        n = IntegerRange(self.bits, self.signed).n
        z = self._nearest_zero_point()
        return z if 0 <= z <= 255 and self.offset == multiple(-(z + n), self.scale) else None

    @property
    def stored_zero_point(self) -> int:
        """The stored code that dequantizes to 0 before a free offset is added."""
        z = self.zero_point
        return z if z is not None else -IntegerRange(self.bits, self.signed).n

    @property
    def free_offset(self) -> Floats:
        """The offset that no zero point stands for; 0 for a grid with a zero point."""
        return np.zeros((), np.float32) if self.zero_point is not None else self.offset

    def _nearest_zero_point(self) -> int:
        return round(-float(self.offset) / float(self.scale)) - IntegerRange(self.bits, self.signed).n

    @property
    def nbytes(self) -> int:
        """Bytes on disk: float32 scale + uint8 zero point (5), or, without a zero point, scale + code + offset (9)."""
        return 5 if self.zero_point is not None else 9

    def quantize(self, x: Floats) -> npt.NDArray[np.uint8]:
        """Return the stored codes; out-of-range values are clipped.

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
                n = IntegerRange(self.bits, self.signed).n
                codes = np.rint((x - self.offset) / self.scale) - np.float32(n)
        return np.asarray(np.clip(codes, 0, self.levels), np.uint8)

    def dequantize(self, u: npt.NDArray[np.uint8]) -> Floats:
        """Return the values of stored codes.

        Args:
            u: uint8 in [0, levels], any shape.

        Returns:
            float32 in the shape of `u`.
        """
        z = self.zero_point
        if z is not None:
            return np.asarray((u.astype(np.float32) - np.float32(z)) * self.scale)
        n = IntegerRange(self.bits, self.signed).n
        return np.asarray((u.astype(np.float32) + np.float32(n)) * self.scale + self.offset)

    def snapped(self) -> Self:
        """Return this grid with its offset moved to the nearest one that has a zero point."""
        z = min(max(self._nearest_zero_point(), 0), 255)
        offset = multiple(-(z + IntegerRange(self.bits, self.signed).n), self.scale)
        return replace(self, offset=offset)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; every float32 is a Python float of the same value."""
        return {
            "kind": self.kind,
            "site": list(self.site),
            "scale": float(self.scale),
            "offset": float(self.offset),
            "bits": self.bits,
            "signed": self.signed,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Return the grid of stored fields; the exact inverse of `as_dict`.

        Raises:
            ConfigError: a field is missing, or has the wrong type or range.
        """
        for name, kind in (("site", list), ("scale", float), ("offset", float), ("bits", int), ("signed", bool)):
            got = fields.get(name)
            require(type(got) is kind, f"ActivationGrid.{name} must be stored as {kind.__name__}", repr(got))
        return cls(
            site=tuple(fields["site"]),
            scale=float32(fields["scale"]),
            offset=float32(fields["offset"]),
            bits=fields["bits"],
            signed=fields["signed"],
        )
