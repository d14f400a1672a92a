"""EWGS: a uniform grid whose straight-through gradient is scaled by the rounding error of each element.

Source: Lee, Kim and Ham, CVPR 2021 ("element-wise gradient scaling"): x_n = clip(x / s), x_q = round(x_n),
g_x = g·(1 + δ·sign(g)·(x_n - x_q)).
Code: written from the equation; no code copied.
Deviations: one learned scale with LSQ's gradient, g and start replaces the two interval bounds. δ is a constant; the
paper can also derive it from the Hessian's trace.
"""

from collections.abc import Hashable
from typing import Any, Unpack, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qcompress.errors import ConfigError
from qcompress.quantizers.initial import Init
from qcompress.quantizers.ste import codes, inside, scale_gradient
from qcompress.quantizers.step import UniformOptions, UniformQuantizer, UniformSpec


def ewgs(x: Tensor, scale: Tensor, qmin: int, qmax: int, delta: float) -> Tensor:
    """Fake-quantizes to codes in [qmin, qmax] times a learned scale.

    Args:
        x: float32 or float64, any shape; not modified.
        scale: > 0, 0-d or broadcastable against x.
        qmin: smallest code.
        qmax: largest code.
        delta: δ, >= 0; with 0 this is LSQ.

    Returns:
        The same as `lsq`. Gradients: for x, g·(1 + delta·sign(g)·(x / scale - round(x / scale))) where
        qmin < x / scale < qmax, else 0; for the scale, LSQ's.

    >>> x = torch.tensor([0.25, 9.0], requires_grad=True)
    >>> y = ewgs(x, torch.tensor(1.0), -2, 1, 0.2)
    >>> y.tolist(), torch.autograd.grad(y.sum(), x)[0].tolist()
    ([0.0, 1.0], [1.0499999523162842, 0.0])
    """
    out: Tensor = _Ewgs.apply(x, scale, qmin, qmax, delta)  # type: ignore[no-untyped-call]
    return out


class _Ewgs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmin: int, qmax: int, delta: float) -> Tensor:
        out = codes(x, scale, qmin, qmax).mul_(scale)
        ctx.save_for_backward(x, scale, out)
        ctx.constants = qmin, qmax, delta
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, out = ctx.saved_tensors
        qmin, qmax, delta = ctx.constants
        v = x / scale
        gx, g_scale = inside(g, v, qmin, qmax), None
        if ctx.needs_input_grad[1]:
            g_scale = scale_gradient(g, gx, x, out, scale.shape) / scale
        gx = gx.addcmul(gx.abs(), v.sub_(v.round()), value=delta)
        return gx.sum_to_size(x.shape), g_scale, None, None, None


@final
class Ewgs(UniformQuantizer):
    """Quantizes a weight or an activation with EWGS.

    Args:
        delta: δ, >= 0.
        signed: whether there are negative codes; None: for weights only.
        init: the start of the scale: "lsq", "min_max" or "lsq_plus".
        options: `bits`, `role`, `axis`, `channels` and `features`, as in `UniformSpec`.

    Raises:
        ConfigError: an argument is invalid, or two of them conflict.

    >>> quantizer = Ewgs(bits=2, role="weight")
    >>> quantizer.initialise(torch.tensor([[-0.5, 0.5]]))
    >>> quantizer(torch.tensor([[-0.5, 3.0]])).tolist()
    [[0.0, 1.0]]
    """

    def __init__(
        self,
        *,
        delta: float = 1e-3,
        signed: bool | None = None,
        init: Init = "lsq",
        **options: Unpack[UniformOptions],
    ) -> None:
        super().__init__(UniformSpec(who="Ewgs", signed=signed, init=init, **options))
        if not 0 <= delta < float("inf"):
            raise ConfigError(f"Ewgs.delta must be finite and at least 0, got {delta!r}.")
        self.delta = delta

    def quantized(self, x: Tensor, scale: Tensor) -> Tensor:
        """Returns the fake-quantized tensor."""
        return ewgs(x, scale, self.spec.limits.n, self.spec.limits.p, self.delta)

    def shared(self) -> Hashable:
        """Returns the codes and δ."""
        return super().shared(), self.delta
