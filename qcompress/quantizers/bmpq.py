"""BMPQ's grid: even levels whose last one is the largest weight.

Source: Kundu et al. ("BMPQ"), section III-B, scale (3), codes and values (4), straight-through estimator.
Code: written from the paper; no code copied.
Deviations: the scale gets no gradient; the paper does not say. The paper takes a ternary grid at 2 bits: `ternary`.

Shape suffixes: those of `rows.py`.
"""

from collections.abc import Hashable, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from qcompress.artifacts import Artifact, IntegerWeight
from qcompress.graph.conversion import to_numpy
from qcompress.quantizers.base import AbstractQuantizer, uniform_range
from qcompress.quantizers.positive import SMALLEST
from qcompress.quantizers.rows import Rows
from qcompress.quantizers.ste import codes, straight_through


def bmpq(w: Tensor, bits: int) -> Tensor:
    """Fake-quantizes a weight to codes in [-p, p] times max|w| / p, where p = 2^(bits - 1) - 1.

    Args:
        w: float32 or float64, any shape; not modified.
        bits: width of a code, 2 to 8.

    Returns:
        round(w / S) * S with S = max|w| / p, in the shape of w. The gradient passes unchanged.

    >>> bmpq(torch.tensor([-6.0, 0.5, 1.5, 3.0]), 3).tolist()
    [-6.0, 0.0, 2.0, 4.0]
    """
    with torch.no_grad():
        found, scale = _codes_and_scale(w, bits)
    return straight_through(w, found * scale)


def _codes_and_scale(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    p = uniform_range("bmpq", bits, signed=True).p
    scale = _scale(w.abs().amax() if w.numel() else w.new_zeros(()), p)
    return codes(w, scale, -p, p), scale


def _scale(largest: Tensor, p: int) -> Tensor:
    scale = largest / p
    return torch.where(scale > SMALLEST, scale, 1.0)


@final
class Bmpq(AbstractQuantizer):
    """Quantizes a weight with BMPQ's grid; it has no parameters.

    Args:
        bits: width of a code, 2 to 8.

    Raises:
        ConfigError: bits is out of range.

    >>> Bmpq(bits=3).weight_artifact(torch.tensor([[-6.0, 0.5, 1.5, 3.0]])).codes.tolist()
    [[-3, 0, 1, 2]]
    """

    def __init__(self, *, bits: int) -> None:
        super().__init__()
        uniform_range("Bmpq", bits, signed=True)
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """Returns the fake-quantized weight."""
        return bmpq(x, self.bits)

    def shared(self) -> Hashable:
        """Returns the width."""
        return self.bits

    @classmethod
    def quantize_rows(cls, quantizers: Sequence["Bmpq"], x_N: Tensor, rows: Rows) -> Tensor:
        """Returns the quantized elements of several weights, [N]."""
        p = uniform_range("bmpq", quantizers[0].bits, signed=True).p
        with torch.no_grad():
            scale_N = rows.each(_scale(rows.reduced(x_N.abs(), torch.amax), p))
            value_N = codes(x_N, scale_N, -p, p) * scale_N
        return straight_through(x_N, value_N)

    def initialise(self, values: Tensor | Sequence[Tensor]) -> None:
        """Does nothing: there are no parameters to set."""

    def weight_artifact(self, weight: Tensor) -> Artifact:
        """Returns codes in [-p, p], and one scale."""
        with torch.no_grad():
            found, scale = _codes_and_scale(weight.float(), self.bits)
        return IntegerWeight(codes=to_numpy(found).astype(np.int8), scale=to_numpy(scale).copy(), bits=self.bits)

    def weight_scale(self, weight: Tensor) -> Tensor:
        """Returns the scale."""
        return _codes_and_scale(weight.detach().float(), self.bits)[1]
