"""TQT: a uniform grid whose scale is a power of two, its exponent learned.

Source: Jain et al., MLSys 2020 ("trained quantization thresholds"): s = 2^⌈log2_scale⌉, straight through the ceiling,
∂x_hat/∂log2_scale = s·ln2·∂x_hat/∂s with LSQ's ∂x_hat/∂s.
Code: written from the equations; no code copied.
Deviations: the exponent of the scale is learned, which is that of the threshold less a constant. Its gradient is
multiplied by LSQ's g where the paper has Adam normalise it; it starts as LSQ+'s scale and stays within 2^±10 of that.
"""

import math
from collections.abc import Sequence
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from qcompress.quantizers.base import Role
from qcompress.quantizers.initial import Init
from qcompress.quantizers.positive import SMALLEST
from qcompress.quantizers.ste import fake_quantize
from qcompress.quantizers.step import Grid, UniformQuantizer

_RANGE: Final = 10.0


def tqt(x: Tensor, log2_scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """Fake-quantize to codes in [qmin, qmax] times a power of two.

    Args:
        x: float32 or float64, any shape; not modified.
        log2_scale: in [-126, 127], 0-d or broadcastable against x.
        qmin: smallest code.
        qmax: largest code.

    Returns:
        clip(round(x / s), qmin, qmax) * s with s = 2^⌈log2_scale⌉, in the shape of x. Gradients: LSQ's for x; for
        log2_scale LSQ's of the scale times s·ln2.

    >>> tqt(torch.tensor([0.3, 0.8, 9.0]), torch.tensor(-1.3), 0, 3).tolist()
    [0.5, 1.0, 1.5]
    """
    return fake_quantize(x, power_of_two(log2_scale), None, qmin, qmax)


def power_of_two(log2_scale: Tensor) -> Tensor:
    """2^⌈log2_scale⌉, exactly, straight through the ceiling.

    >>> power_of_two(torch.tensor([-1.3, 0.0, 2.5])).tolist()
    [0.5, 1.0, 8.0]
    """
    out: Tensor = _PowerOfTwo.apply(log2_scale)  # type: ignore[no-untyped-call]
    return out


class _PowerOfTwo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log2_scale: Tensor) -> Tensor:
        scale = torch.ldexp(torch.ones_like(log2_scale), log2_scale.ceil().int())
        ctx.save_for_backward(scale)
        return scale

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (scale,) = ctx.saved_tensors
        return g * scale * math.log(2)  # type: ignore[no-any-return]


class _Within(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, center: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.clamp(center - _RANGE, center + _RANGE)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return g * ctx.factor, None, None


@final
class Tqt(UniformQuantizer):
    """TQT of a weight or an activation.

    Args:
        bits: width of a code: 2 to 8, unsigned 1 to 8.
        role: what it quantizes.
        signed: whether codes are; None: a weight's are, an activation's are not.
        axis: the weight's axis that counts output channels, for a scale each; None: one scale.
        channels: how many there are; None: one scale.
        features: N of g, per sample, for activations; None: those of the tensor that comes, batch first.
        init: "lsq", "min_max" or "lsq_plus".

    Raises:
        ConfigError: one of them is none, or does not go with another.

    >>> quantizer = Tqt(bits=2, role="weight", init="min_max")
    >>> quantizer.initialise(torch.tensor([[-0.3, 0.7]]))
    >>> quantizer(torch.tensor([[-1.2, 3.0]])).tolist()
    [[-1.0, 1.0]]
    """

    start: Tensor

    def __init__(
        self,
        *,
        bits: int,
        role: Role,
        signed: bool | None = None,
        axis: int | None = None,
        channels: int | None = None,
        features: int | None = None,
        init: Init = "lsq_plus",
    ) -> None:
        super().__init__()
        self.bits = bits
        self.grid = Grid("Tqt", bits, role, signed=signed, axis=axis, channels=channels, features=features, init=init)
        self.log2_scale = nn.Parameter(torch.zeros(self.grid.shape))
        self.register_buffer("start", torch.zeros(self.grid.shape))

    def forward(self, x: Tensor) -> Tensor:
        """The fake-quantized tensor."""
        log2_scale = self.grid.spread(self._log2_scale(self.grid.gradient_factor(x)), x.ndim)
        return tqt(x, log2_scale, self.grid.limits.n, self.grid.limits.p)

    def _log2_scale(self, factor: float = 1.0) -> Tensor:
        out: Tensor = _Within.apply(self.log2_scale, self.start, factor)  # type: ignore[no-untyped-call]
        return out

    def initialise(self, values: Tensor | Sequence[Tensor]) -> None:
        """Sets the exponent from the weight or from batches of the activation."""
        scale = self.grid.start(values)[0]
        with torch.no_grad():
            self.log2_scale.copy_(torch.where(scale > SMALLEST, scale, 1.0).log2())
            self.start.copy_(self.log2_scale)

    @property
    def collapsed(self) -> bool:
        """Whether most exponents sit at the end of what they can be."""
        return bool(((self.log2_scale - self.start).abs() >= _RANGE).double().mean() > 0.5)

    def step_size(self, weight: Tensor) -> Tensor:
        """The scale, its gradient multiplied by g."""
        return self.grid.spread(power_of_two(self._log2_scale(self.grid.gradient_factor(weight))), weight.ndim)

    def learned_scale(self) -> Tensor:
        """Of the last step."""
        return power_of_two(self._log2_scale())
