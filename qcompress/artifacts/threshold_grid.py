"""Activation grids with learned thresholds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import numpy as np
import numpy.typing as npt

from qcompress.artifacts.base import Floats, require
from qcompress.artifacts.packing import check_bits
from qcompress.artifacts.site_grid import float32, require_scalar, require_site


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdGrid:
    """An activation grid with learned thresholds: x_hat = codes * scale; a code counts the thresholds up to x.

    Args:
        site: as in `ActivationGrid`.
        thresholds: float32 [2**bits - 1], finite, ascending; compared with x itself.
        scale: float32 0-d, finite, > 0; the difference of neighbouring output values.
        bits: width of a code, 1 to 8.

    Raises:
        ConfigError: a field has the wrong dtype, shape or range.

    >>> thresholds = np.array([0.25, 1.0, 4.0], np.float32)
    >>> grid = ThresholdGrid(site=("fc.weight", 0), thresholds=thresholds, scale=np.asarray(np.float32(0.5)), bits=2)
    >>> u = grid.quantize(np.array([-9.0, 0.25, 0.8, 99.0], np.float32))
    >>> u.tolist(), grid.dequantize(u).tolist(), grid.nbytes
    ([0, 1, 1, 3], [0.0, 0.5, 0.5, 1.5], 16)
    """

    kind: ClassVar[str] = "thresholds"
    site: tuple[str, int]
    thresholds: Floats
    scale: Floats
    bits: int

    def __post_init__(self) -> None:
        check_bits(self.bits)
        require_site("ThresholdGrid", self.site)
        require(
            self.thresholds.dtype == np.float32 and self.thresholds.shape == (self.levels,),
            f"ThresholdGrid.thresholds must be float32 [{self.levels}] at {self.bits} bits",
            f"{self.thresholds.dtype} {list(self.thresholds.shape)}",
        )
        require(
            bool(np.isfinite(self.thresholds).all() and (np.diff(self.thresholds) >= 0).all()),
            "ThresholdGrid.thresholds must be finite and ascend",
            self.thresholds.tolist(),
        )
        require_scalar("ThresholdGrid.scale", self.scale)
        require(bool(0 < self.scale < np.inf), "ThresholdGrid.scale must be finite and above 0", self.scale)

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def zero_point(self) -> int:
        """The code of 0.0: to the layers, the codes are those of an even, unsigned grid."""
        return 0

    @property
    def offset(self) -> Floats:
        """The value that is added to scaled codes: 0."""
        return np.zeros((), np.float32)

    @property
    def stored_zero_point(self) -> int:
        """The code of 0.0."""
        return 0

    @property
    def free_offset(self) -> Floats:
        """The offset that no zero point stands for: 0."""
        return self.offset

    @property
    def nbytes(self) -> int:
        """Bytes on disk: thresholds and scale."""
        return self.thresholds.nbytes + self.scale.nbytes

    def quantize(self, x: Floats) -> npt.NDArray[np.uint8]:
        """Return how many thresholds each value reaches.

        Args:
            x: float32, any shape; NaN is not allowed.

        Returns:
            uint8 in [0, levels], in the shape of `x`.
        """
        return np.asarray(np.searchsorted(self.thresholds, x, side="right"), np.uint8)

    def dequantize(self, u: npt.NDArray[np.uint8]) -> Floats:
        """Return the values of codes.

        Args:
            u: uint8 in [0, levels], any shape.

        Returns:
            float32 in the shape of `u`.
        """
        return np.asarray(u.astype(np.float32) * self.scale)

    def snapped(self) -> Self:
        """Return the grid itself: it has no free offset."""
        return self

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; every float32 is a Python float of the same value."""
        return {
            "kind": self.kind,
            "site": list(self.site),
            "thresholds": self.thresholds.tolist(),
            "scale": float(self.scale),
            "bits": self.bits,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Return the grid of stored fields; the exact inverse of `as_dict`.

        Raises:
            ConfigError: a field is missing, or has the wrong type or range.
        """
        for name, kind in (("site", list), ("thresholds", list), ("scale", float), ("bits", int)):
            got = fields.get(name)
            require(type(got) is kind, f"ThresholdGrid.{name} must be stored as {kind.__name__}", repr(got))
        wrong = [value for value in fields["thresholds"] if type(value) is not float]
        require(not wrong, "ThresholdGrid.thresholds must be stored as floats", wrong)
        return cls(
            site=tuple(fields["site"]),
            thresholds=float32(fields["thresholds"]),
            scale=float32(fields["scale"]),
            bits=fields["bits"],
        )
