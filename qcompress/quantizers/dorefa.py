"""DoReFa: weights passed through tanh and rounded to even levels from -1 to 1.

Source: Zhou et al., 2016, as PACT and BMPQ use it: 2·round((t/2 + 1/2)·(2^b - 1))/(2^b - 1) - 1 with
t = tanh(w) / max|tanh(w)|.
Code: written from the equation; no code copied.
Deviations: 1 bit uses the same formula; the paper takes mean|w| times the sign of w.

Shape suffixes: those of `rows.py`.
"""

from collections.abc import Hashable, Sequence
from typing import final

import torch
from torch import Tensor

from qcompress.artifacts import Artifact
from qcompress.artifacts.packing import check_bits
from qcompress.quantizers.base import AbstractQuantizer
from qcompress.quantizers.half_integer import odd_codes, palettized
from qcompress.quantizers.rows import Rows
from qcompress.quantizers.ste import straight_through


def dorefa_weight(w: Tensor, bits: int) -> Tensor:
    """Fake-quantizes a weight to 2^bits even levels from -1 to 1.

    Args:
        w: float32 or float64, any shape; not modified.
        bits: width of a code, 1 to 8.

    Returns:
        Odd integers in [-(2^bits - 1), 2^bits - 1] times 1 / (2^bits - 1), in the shape of w. The gradient is that of
        tanh(w) / max|tanh(w)| with a constant maximum.

    >>> dorefa_weight(torch.tensor([-0.9, -0.1, 0.2]), 2).tolist()
    [-1.0, -0.3333333432674408, 0.3333333432674408]
    """
    return _rounded(_unit(w), bits)


def _rounded(unit: Tensor, bits: int) -> Tensor:
    with torch.no_grad():
        odd = odd_codes(unit, bits)
    return straight_through(unit, odd * _step(unit, bits))


def _unit(w: Tensor) -> Tensor:
    squeezed = w.tanh()
    return squeezed / _largest(squeezed.detach().abs().amax() if w.numel() else squeezed.new_ones(()))


def _largest(found: Tensor) -> Tensor:
    return torch.where(found > 0, found, 1.0)


def _step(w: Tensor, bits: int) -> Tensor:
    return w.new_ones(()) / ((1 << bits) - 1)


@final
class DoReFa(AbstractQuantizer):
    """Quantizes a weight with DoReFa; it has no parameters.

    Args:
        bits: width of a code, 1 to 8.

    Raises:
        ConfigError: bits is out of range.

    >>> DoReFa(bits=1)(torch.tensor([[-0.9, 0.2]])).tolist()
    [[-1.0, 1.0]]
    """

    def __init__(self, *, bits: int) -> None:
        super().__init__()
        check_bits(bits)
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """Returns the fake-quantized weight."""
        return dorefa_weight(x, self.bits)

    def shared(self) -> Hashable:
        """Returns the width."""
        return self.bits

    @classmethod
    def quantize_rows(cls, quantizers: Sequence["DoReFa"], x_N: Tensor, rows: Rows) -> Tensor:
        """Returns the quantized elements of several weights, [N]."""
        squeezed_N = x_N.tanh()
        largest_S = _largest(rows.reduced(squeezed_N.detach().abs(), torch.amax))
        return _rounded(squeezed_N / rows.each(largest_S), quantizers[0].bits)

    def initialise(self, values: Tensor | Sequence[Tensor]) -> None:
        """Does nothing: there are no parameters to set."""

    def weight_artifact(self, weight: Tensor) -> Artifact:
        """Returns a palette of odd integers and one scale."""
        with torch.no_grad():
            weight = weight.float()
            return palettized(odd_codes(_unit(weight), self.bits), _step(weight, self.bits), self.bits)

    def weight_scale(self, weight: Tensor) -> Tensor:
        """Returns the distance of neighbouring odd integers, halved."""
        return _step(weight.detach().float(), self.bits)
