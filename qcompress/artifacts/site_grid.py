"""The protocol of activation grids, and helpers that they share."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np
import numpy.typing as npt

from qcompress.artifacts.base import Floats, require

Site = tuple[str, int]


@runtime_checkable
class SiteGrid(Protocol):
    """The grid that the activations of one site are quantized to; stored codes are uint8 in [0, levels]."""

    kind: ClassVar[str]

    @property
    def site(self) -> Site:
        """(Qualified name of the consumer, argument index), or (name of a value, -1) for the value's producer."""

    @property
    def bits(self) -> int:
        """Width of a code, 1 to 8."""

    @property
    def levels(self) -> int:
        """The largest stored code."""

    @property
    def scale(self) -> Floats:
        """Difference of neighbouring values, float32 0-d."""

    @property
    def offset(self) -> Floats:
        """The value that is added to scaled codes, float32 0-d."""

    @property
    def zero_point(self) -> int | None:
        """The z in [0, 255] with which x_hat = (u - z) * scale is exactly this grid; None if there is no such z."""

    @property
    def stored_zero_point(self) -> int:
        """The stored code that dequantizes to 0 before a free offset is added."""

    @property
    def free_offset(self) -> Floats:
        """The offset that no zero point stands for, float32 0-d."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""

    def quantize(self, x: Floats) -> npt.NDArray[np.uint8]:
        """Return the stored codes of values."""

    def dequantize(self, u: npt.NDArray[np.uint8]) -> Floats:
        """Return the values of stored codes."""

    def snapped(self) -> Self:
        """Return the grid with its offset moved to the nearest one that has a zero point."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, including the kind."""

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Return the grid of stored fields; the exact inverse of `as_dict`."""


def float32(value: float | list[float] | Floats) -> Floats:
    """Return a value as float32; a value that is too large becomes Inf, which every grid refuses."""
    with np.errstate(over="ignore"):
        return np.asarray(value).astype(np.float32)


def multiple(count: int, scale: Floats) -> Floats:
    """Return a whole number of steps, rounded as float32 multiplies."""
    with np.errstate(over="ignore"):
        return np.asarray(np.float32(count) * scale)


def require_site(who: str, site: object) -> None:
    """Raise a ConfigError unless `site` is (name, index)."""
    require(
        isinstance(site, tuple) and [type(part) for part in site] == [str, int] and site[1] >= -1,
        f"{who}.site must be (name, index) with an index of at least -1",
        site,
    )


def require_scalar(who: str, value: Floats) -> None:
    """Raise a ConfigError unless `value` is float32 and 0-d."""
    require(
        value.dtype == np.float32 and value.shape == (),
        f"{who} must be float32 and 0-d",
        f"{value.dtype} {list(value.shape)}",
    )
