"""TQT: a uniform grid whose scale is a power of two with a learned exponent.

Source: Jain et al., MLSys 2020 ("trained quantization thresholds"): s = 2^⌈log2_scale⌉, straight through the ceiling,
∂x_hat/∂log2_scale = s·ln2·∂x_hat/∂s with LSQ's ∂x_hat/∂s.
Code: written from the equations; no code copied.
Deviations: the exponent of the scale is learned; it differs from the threshold's by a constant. Its gradient is
multiplied by LSQ's g; the paper leaves the normalisation to Adam. It starts from LSQ+'s scale and stays within 2^±10
of it.
"""

import math
from typing import Any, Final, Unpack, final

import torch
from torch import Tensor, nn

from qcompress.quantizers.initial import Init
from qcompress.quantizers.positive import SMALLEST, LearnedValues
from qcompress.quantizers.ste import fake_quantize
from qcompress.quantizers.step import UniformOptions, UniformQuantizer, UniformSpec

_RANGE: Final = 10.0


def tqt(x: Tensor, log2_scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """Fake-quantizes to codes in [qmin, qmax] times a power of two.

    Args:
        x: float32 or float64, any shape; not modified.
        log2_scale: in [-126, 127], 0-d or broadcastable against x.
        qmin: smallest code.
        qmax: largest code.

    Returns:
        clip(round(x / s), qmin, qmax) * s with s = 2^⌈log2_scale⌉, in the shape of x. Gradients: for x, LSQ's;
        for log2_scale, LSQ's gradient of the scale times s·ln2.

    >>> tqt(torch.tensor([0.3, 0.8, 9.0]), torch.tensor(-1.3), 0, 3).tolist()
    [0.5, 1.0, 1.5]
    """
    return fake_quantize(x, power_of_two(log2_scale), None, qmin, qmax)


def power_of_two(log2_scale: Tensor) -> Tensor:
    """Returns 2^⌈log2_scale⌉, exactly; the gradient passes straight through the ceiling.

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
    def forward(ctx: Any, value: Tensor, center: Tensor, factor: float | Tensor) -> Tensor:
        ctx.factor = factor
        return value.clamp(center - _RANGE, center + _RANGE)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return g * ctx.factor, None, None


@final
class PowerOfTwo(LearnedValues):
    """2^⌈log2⌉; log2 is learned and stays within 10 of its start.

    Args:
        shape: shape of the parameter; its values are 1.0 until they are set.

    >>> scale = PowerOfTwo(())
    >>> scale.set(torch.tensor(0.3))
    >>> scale().item()
    0.5
    """

    start: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.log2 = nn.Parameter(torch.zeros(shape))
        self.register_buffer("start", torch.zeros(shape))

    def set(self, values: Tensor) -> None:
        """Sets the exponents.

        Args:
            values: >= 0, broadcastable to the parameter's shape; 0 (there is nothing to scale) becomes 1.
        """
        with torch.no_grad():
            self.log2.copy_(torch.where(values > SMALLEST, values, 1.0).log2())
            self.start.copy_(self.log2)

    def parts(self) -> tuple[Tensor, Tensor]:
        """Returns the exponent and its start."""
        return self.log2, self.start

    @staticmethod
    def values(learned: Tensor, start: Tensor, factor: float | Tensor) -> Tensor:
        """Returns the powers of two."""
        return power_of_two(_Within.apply(learned, start, factor))  # type: ignore[no-untyped-call]

    @staticmethod
    def at_limit(learned: Tensor, start: Tensor) -> Tensor:
        """Returns whether each exponent has reached the end of its range."""
        return (learned - start).abs() >= _RANGE


@final
class Tqt(UniformQuantizer):
    """Quantizes a weight or an activation with TQT.

    Args:
        signed: whether there are negative codes; None: for weights only.
        init: the start of the scale: "lsq", "min_max" or "lsq_plus".
        options: `bits`, `role`, `axis`, `channels` and `features`, as in `UniformSpec`.

    Raises:
        ConfigError: an argument is invalid, or two of them conflict.

    >>> quantizer = Tqt(bits=2, role="weight", init="min_max")
    >>> quantizer.initialise(torch.tensor([[-0.3, 0.7]]))
    >>> quantizer(torch.tensor([[-1.2, 3.0]])).tolist()
    [[-1.0, 1.0]]
    """

    def __init__(
        self, *, signed: bool | None = None, init: Init = "lsq_plus", **options: Unpack[UniformOptions]
    ) -> None:
        spec = UniformSpec(who="Tqt", signed=signed, init=init, **options)
        super().__init__(spec, PowerOfTwo(spec.shape))

    def quantized(self, x: Tensor, scale: Tensor) -> Tensor:
        """Returns the fake-quantized tensor."""
        return fake_quantize(x, scale, None, self.spec.limits.n, self.spec.limits.p)
