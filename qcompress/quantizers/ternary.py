"""TWN: ternary weights, each -α, 0 or α.

Source: Li et al., 2016 ("ternary weight networks"), which BMPQ (Kundu et al.) uses at 2 bits: Δ = 0.7·mean|w|, α the
mean of |w| above Δ.
Code: written from the equations; no code copied.
Deviations: none.

Shape suffixes: those of `rows.py`.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import final

import numpy as np
import torch
from torch import Tensor

from qcompress.artifacts import Artifact, IntegerWeight
from qcompress.errors import ConfigError
from qcompress.graph.conversion import to_numpy
from qcompress.quantizers.base import AbstractQuantizer
from qcompress.quantizers.rows import Rows
from qcompress.quantizers.ste import straight_through

_Reduce = Callable[[Tensor], Tensor]


def ternary(w: Tensor) -> Tensor:
    """Fake-quantizes a weight to -α, 0 and α.

    Args:
        w: float32 or float64, any shape; not modified.

    Returns:
        α·sign(w) where |w| > 0.7·mean|w|, else 0, in the shape of w; α is the mean of those |w|. The gradient passes
        unchanged.

    >>> ternary(torch.tensor([-2.0, 0.5, 1.0, 3.0])).tolist()
    [-2.5, 0.0, 0.0, 2.5]
    """
    with torch.no_grad():
        signs, alpha = _signs_and_alpha(w)
        value = signs * alpha
    return straight_through(w, value)


def _signs_and_alpha(w: Tensor) -> tuple[Tensor, Tensor]:
    row = w.reshape(1, -1)
    signs, alpha = _of_rows(row, lambda values: values.mean(1), lambda values: values.sum(1), lambda each: each)
    return signs.reshape(w.shape), alpha.reshape(())


def _of_rows(x: Tensor, mean: _Reduce, total: _Reduce, each: _Reduce) -> tuple[Tensor, Tensor]:
    """Returns the signs, 0 for small values, in the shape of x, and α of each row.

    Args:
        x: the elements of all rows.
        mean: returns the mean of each row.
        total: returns the sum of each row.
        each: returns the value of its row for each element, broadcastable against x.
    """
    size = x.abs()
    above = size > 0.7 * each(mean(size))
    alpha = total(size * above) / total(above.to(x.dtype)).clamp_min(1)
    return torch.where(above, x.sign(), 0.0), alpha


@final
class Ternary(AbstractQuantizer):
    """Quantizes a weight to -α, 0 and α; it has no parameters.

    Args:
        bits: 2.

    Raises:
        ConfigError: bits is not 2.

    >>> Ternary(bits=2).weight_artifact(torch.tensor([[-2.0, 0.5, 1.0, 3.0]])).codes.tolist()
    [[-1, 0, 0, 1]]
    """

    def __init__(self, *, bits: int = 2) -> None:
        super().__init__()
        if bits != 2:
            raise ConfigError(f"Ternary.bits must be 2, got {bits!r}.")
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """Returns the fake-quantized weight."""
        return ternary(x)

    def shared(self) -> Hashable:
        """Returns the width."""
        return self.bits

    @classmethod
    def quantize_rows(cls, quantizers: Sequence["Ternary"], x_N: Tensor, rows: Rows) -> Tensor:
        """Returns the quantized elements of several weights, [N]."""
        mean, total = partial(rows.reduced, reduce=torch.mean), partial(rows.reduced, reduce=torch.sum)
        with torch.no_grad():
            signs_N, alpha_S = _of_rows(x_N, mean, total, rows.each)
            value_N = signs_N * rows.each(alpha_S)
        return straight_through(x_N, value_N)

    def initialise(self, values: Tensor | Sequence[Tensor]) -> None:
        """Does nothing: there are no parameters to set."""

    def weight_artifact(self, weight: Tensor) -> Artifact:
        """Returns codes -1, 0 and 1, and one scale."""
        with torch.no_grad():
            signs, alpha = _signs_and_alpha(weight.float())
        return IntegerWeight(codes=to_numpy(signs).astype(np.int8), scale=to_numpy(alpha).copy(), bits=self.bits)

    def weight_scale(self, weight: Tensor) -> Tensor:
        """Returns α."""
        return _signs_and_alpha(weight.detach().float())[1]
