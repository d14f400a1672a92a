"""PACT: activations are clipped at a learned level, then quantized uniformly.

Source: Choi et al., arXiv:1805.06085, as written down by Kundu et al. ("BMPQ"), section II-B, (1) and (2). Choi et al.
add an L2 regularizer of α to the loss, with the decay of the weights: 2e-4 for ResNet-20 on CIFAR-10.
Code: written from the papers; no code copied.
Deviations: (2) divides by the scale α / (2^k - 1), as onnxruntime does, where the paper multiplies by its reciprocal. α
starts at the end of a uniform grid chosen as in LSQ+, and cannot fall below a thousandth of its start. Its decay does
not follow the weights': it is an option.
"""

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qcompress.artifacts import SiteGrid
from qcompress.artifacts.integer_range import IntegerRange
from qcompress.errors import ConfigError
from qcompress.quantizers.base import AbstractQuantizer, SiteKey
from qcompress.quantizers.initial import Init
from qcompress.quantizers.positive import Positive
from qcompress.quantizers.ste import codes, inside
from qcompress.quantizers.step import UniformSpec


def pact(x: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """Clips to [0, alpha] (1) and rounds to 2^bits levels (2).

    Args:
        x: float32 or float64, any shape; not modified.
        alpha: > 0, 0-d or broadcastable against x.
        bits: width of a code, 1 to 8.

    Returns:
        clip(round(x / s), 0, 2^bits - 1) * s with s = alpha / (2^bits - 1), in the shape of x. Gradients: 1 for x where
        0 < x < alpha, else 0; 1 for alpha where x >= alpha, else 0.

    >>> alpha = torch.tensor(3.0, requires_grad=True)
    >>> y = pact(torch.tensor([-1.0, 0.9, 3.0, 7.0]), alpha, 2)
    >>> y.tolist(), torch.autograd.grad(y.sum(), alpha)[0].item()
    ([0.0, 1.0, 3.0, 3.0], 2.0)
    """
    out: Tensor = _Pact.apply(x, alpha, IntegerRange(bits, signed=False).p)  # type: ignore[no-untyped-call]
    return out


class _Pact(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, levels: int) -> Tensor:
        ctx.save_for_backward(x, alpha)
        scale = alpha / levels
        return codes(x, scale, 0, levels).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha = ctx.saved_tensors
        v, g_alpha = x / alpha, None  # exactly 1 where x is alpha, and less than 1 where x is less
        if ctx.needs_input_grad[1]:
            g_alpha = (g - inside(g, v, -math.inf, 1)).sum_to_size(alpha.shape)
        return inside(g, v, 0, 1).sum_to_size(x.shape), g_alpha, None


@final
class Pact(AbstractQuantizer):
    """Quantizes an activation with PACT, in place of a ReLU or after one.

    Args:
        bits: width of a code, 1 to 8.
        init: the start of alpha: 2^bits - 1 times the scale of "lsq", "min_max" or "lsq_plus".
        decay: L2 decay of alpha: the factor of alpha² / 2 in `penalty()`, which the training loop adds to the loss.

    Raises:
        ConfigError: an argument is invalid.

    >>> quantizer = Pact(bits=2, init="min_max")
    >>> quantizer.initialise([torch.tensor([-1.0, 6.0])])
    >>> quantizer(torch.tensor([-1.0, 1.5, 9.0])).tolist()
    [0.0, 2.0, 6.0]
    """

    def __init__(self, *, bits: int, init: Init = "lsq_plus", decay: float = 2e-4) -> None:
        super().__init__()
        if not 0 <= decay < math.inf:
            raise ConfigError(f"Pact.decay must be finite and at least 0, got {decay!r}.")
        self.bits, self.decay = bits, decay
        self.spec = UniformSpec(who="Pact", bits=bits, role="activation", init=init)
        self.alpha = Positive(())

    def forward(self, x: Tensor) -> Tensor:
        """Returns the fake-quantized tensor."""
        return pact(x, self.alpha(), self.bits)

    def penalty(self) -> Tensor | None:
        """Returns decay · alpha² / 2, 0-d; None without decay."""
        return self.alpha().square() * (self.decay / 2) if self.decay else None

    def initialise(self, values: Tensor | Sequence[Tensor]) -> None:
        """Sets alpha from batches of the activation."""
        self.alpha.set(self.spec.start(values)[0] * self.spec.limits.p)

    def activation_scale(self) -> Tensor:
        """Returns the distance of neighbouring levels."""
        alpha: Tensor = self.alpha()
        return (alpha.detach() / self.spec.limits.p).float()

    def activation_grid(self, site: SiteKey) -> SiteGrid:
        """Returns the unsigned grid from 0 to alpha."""
        return self.spec.activation_grid(site, self.alpha() / self.spec.limits.p)
