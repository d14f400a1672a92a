"""Arithmetic of integer layers: the scale of a bias, free offsets in biases, sums that saturate.

Shape suffix: O = output channels.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from qcompress.artifacts import SiteGrid
from qcompress.artifacts.base import Doubles, Floats

LARGEST: Final = 2**31 - 1
_INT16: Final = 2**15 - 1


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A weight that integer kernels can take.

    Args:
        name: qualified name.
        codes: int8, the weight's shape.
        scale: float32, 0-d or [O].
        axis: of the output channels.
    """

    name: str
    codes: npt.NDArray[np.int8]
    scale: Floats
    axis: int

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return int(self.codes.shape[self.axis])


def bias_scale(grid: SiteGrid, weight: Int8Weight) -> Floats:
    """Return float32(s_x * s_w), 0-d or [O]: the scale that onnxruntime takes for a bias, whatever is written."""
    return np.asarray(grid.scale * weight.scale, np.float32)


def in_steps(bias: Doubles, grid: SiteGrid, weight: Int8Weight) -> npt.NDArray[np.int32]:
    """Return a bias in steps of `bias_scale`, rounded."""
    return np.rint(bias / bias_scale(grid, weight).astype(np.float64)).astype(np.int32)


def folded(bias: Doubles | None, grid: SiteGrid, weight: Int8Weight) -> Doubles:
    """Return bias + beta * s_w * sum(w_bar): exact where no padding is seen.

    Source: LSQ+ (Bhalgat et al. 2020), eq. 5.

    Args:
        bias: float64 [O]; None: 0.
        grid: of the layer's input; its free offset is beta.
        weight: of the layer.
    """
    others = tuple(i for i in range(weight.codes.ndim) if i != weight.axis)
    total_O = weight.codes.sum(axis=others, dtype=np.int64) * weight.scale.astype(np.float64)
    return np.asarray((0.0 if bias is None else bias) + float(grid.free_offset) * total_O, np.float64)


def pair_saturation(weight: Int8Weight, largest: int) -> float:
    """Return the share of pairs of weights whose products with some pair of inputs sum to more than 16 bits hold.

    Without VNNI, x86 adds two neighbouring products of uint8 with int8 in 16 bits, and saturates (vpmaddubsw).

    Args:
        weight: of a layer; its neighbours are input channels, one at a time in depthwise layers.
        largest: code of an input.

    >>> codes = np.array([[127, 2, 100, 100], [-63, -63, -127, 127]], np.int8)
    >>> pair_saturation(Int8Weight("fc.weight", codes, np.float32(1), 0), largest=255)
    0.5
    """
    codes = np.moveaxis(weight.codes, 1 - weight.axis if weight.codes.ndim == 2 else 1, -1).astype(np.int32)
    pairs = codes[..., : codes.shape[-1] // 2 * 2].reshape(-1, 2)
    highest, lowest = (largest * pairs.clip(*ends).sum(1) for ends in ((0, None), (None, 0)))
    return float(np.mean((highest > _INT16) | (lowest < -_INT16 - 1))) if len(pairs) else 0.0
