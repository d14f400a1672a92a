"""Even levels without a zero: 2^b odd multiples of half a step, which no zero point can describe.

Shape suffixes: O = output channels.
"""

import numpy as np
import torch
from torch import Tensor

from qcompress.artifacts import PalettizedWeight
from qcompress.artifacts.integer_range import IntegerRange
from qcompress.graph.conversion import to_numpy


def odd_codes(unit: Tensor, bits: int) -> Tensor:
    """Rounds to 2^bits even levels from -1 to 1, written as odd integers in [-(2^bits - 1), 2^bits - 1].

    Args:
        unit: any shape; values outside [-1, 1] are clipped.
        bits: width of a code.

    >>> odd_codes(torch.tensor([-5.0, -0.4, 0.1, 1.0]), 2).tolist()
    [-3.0, -1.0, 1.0, 3.0]
    """
    levels = IntegerRange(bits, signed=False).p
    return (unit.clamp(-1, 1) + 1).mul_(levels / 2).round_().mul_(2).sub_(levels)


def palettized(odd: Tensor, step: Tensor, bits: int, axis: int = 0) -> PalettizedWeight:
    """Returns odd integers times a step as a palettized weight; its entries are int8 up to 7 bits, else float32.

    Args:
        odd: result of `odd_codes`.
        step: float32, 0-d or [O].
        bits: width of a code.
        axis: the weight's axis that counts output channels.

    >>> palettized(torch.tensor([[-3.0, 1.0]]), torch.tensor(0.5), 2).dequantize().tolist()
    [[-1.5, 0.5]]
    """
    levels = IntegerRange(bits, signed=False).p
    lut = np.arange(-levels, levels + 1, 2)[None]
    return PalettizedWeight(
        codes=to_numpy(((odd + levels) / 2).to(torch.uint8)),
        lut=lut.astype(np.int8) if levels <= np.iinfo(np.int8).max else lut.astype(np.float32),
        bits=bits,
        axis=axis,
        scale=to_numpy(step.float()).copy(),
    )
