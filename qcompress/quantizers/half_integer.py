"""Grids without a zero: 2^b levels at odd multiples of half a step, which no zero point describes.

Shape suffixes: O = output channels.
"""

import numpy as np
import torch
from torch import Tensor

from qcompress.artifacts import PalettizedWeight
from qcompress.artifacts.integer_range import IntegerRange


def odd_codes(unit: Tensor, bits: int) -> Tensor:
    """The nearest of 2^bits even steps from -1 to 1, as an odd integer in [-(2^bits - 1), 2^bits - 1].

    Args:
        unit: in [-1, 1]; what is outside is clipped.
        bits: width of a code.

    >>> odd_codes(torch.tensor([-5.0, -0.4, 0.1, 1.0]), 2).tolist()
    [-3.0, -1.0, 1.0, 3.0]
    """
    levels = IntegerRange(bits, signed=False).p
    return (unit.clamp(-1, 1) + 1).mul_(levels / 2).round_().mul_(2).sub_(levels)


def palette(odd: Tensor, step: Tensor, bits: int, axis: int = 0) -> PalettizedWeight:
    """Odd integers times a step, as a table: of int8 where they fit, which is up to 7 bits.

    Args:
        odd: what `odd_codes` gave.
        step: float32, 0-d or [O].
        bits: width of a code.
        axis: the weight's axis that counts output channels.

    >>> palette(torch.tensor([[-3.0, 1.0]]), torch.tensor(0.5), 2).dequantize().tolist()
    [[-1.5, 0.5]]
    """
    levels = IntegerRange(bits, signed=False).p
    lut = np.arange(-levels, levels + 1, 2)[None]
    return PalettizedWeight(
        codes=((odd + levels) / 2).to(torch.uint8).cpu().numpy(),
        lut=lut.astype(np.int8) if levels <= np.iinfo(np.int8).max else lut.astype(np.float32),
        bits=bits,
        axis=axis,
        scale=step.detach().float().cpu().numpy().copy(),
    )
