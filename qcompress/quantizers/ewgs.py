"""EWGS: a uniform grid whose straight-through gradient is scaled, element by element, by how far rounding moved it.

Source: Lee, Kim and Ham, CVPR 2021 ("element-wise gradient scaling"): x_n = clip(x / s), x_q = round(x_n),
g_x = g·(1 + δ·sign(g)·(x_n - x_q)).
Code: written from the equation; no code copied.
Deviations: one learned scale as LSQ's in place of two interval bounds, with LSQ's gradient, g and start. δ is a
constant, which the paper also derives from the Hessian's trace.
"""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qcompress.errors import ConfigError
from qcompress.quantizers.base import Role
from qcompress.quantizers.initial import Init
from qcompress.quantizers.ste import codes, inside, scale_gradient
from qcompress.quantizers.step import Grid, Step, UniformQuantizer


def ewgs(x: Tensor, scale: Tensor, qmin: int, qmax: int, delta: float) -> Tensor:
    """Fake-quantize to codes in [qmin, qmax] times a learned scale.

    Args:
        x: float32 or float64, any shape; not modified.
        scale: > 0, 0-d or broadcastable against x.
        qmin: smallest code.
        qmax: largest code.
        delta: >= 0; 0 is LSQ.

    Returns:
        What `lsq` returns. Gradients: g·(1 + delta·sign(g)·(x / scale - round(x / scale))) for x where
        qmin < x / scale < qmax, else 0; for the scale LSQ's.

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
        ctx.settings = qmin, qmax, delta
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, out = ctx.saved_tensors
        qmin, qmax, delta = ctx.settings
        v = x / scale
        gx, g_scale = inside(g, v, qmin, qmax), None
        if ctx.needs_input_grad[1]:
            g_scale = scale_gradient(g, gx, x, out, scale.shape) / scale
        gx = gx.addcmul(gx.abs(), v.sub_(v.round()), value=delta)
        return gx.sum_to_size(x.shape), g_scale, None, None, None


@final
class Ewgs(UniformQuantizer):
    """EWGS of a weight or an activation.

    Args:
        bits: width of a code: 2 to 8, unsigned 1 to 8.
        role: what it quantizes.
        delta: >= 0.
        signed: whether codes are; None: a weight's are, an activation's are not.
        axis: the weight's axis that counts output channels, for a scale each; None: one scale.
        channels: how many there are; None: one scale.
        features: N of g, per sample, for activations; None: those of the tensor that comes, batch first.
        init: "lsq", "min_max" or "lsq_plus".

    Raises:
        ConfigError: one of them is none, or does not go with another.

    >>> quantizer = Ewgs(bits=2, role="weight")
    >>> quantizer.initialise(torch.tensor([[-0.5, 0.5]]))
    >>> quantizer(torch.tensor([[-0.5, 3.0]])).tolist()
    [[0.0, 1.0]]
    """

    def __init__(
        self,
        *,
        bits: int,
        role: Role,
        delta: float = 1e-3,
        signed: bool | None = None,
        axis: int | None = None,
        channels: int | None = None,
        features: int | None = None,
        init: Init = "lsq",
    ) -> None:
        super().__init__()
        if not 0 <= delta < float("inf"):
            raise ConfigError(f"Ewgs.delta must be finite and at least 0, got {delta!r}.")
        self.bits, self.delta = bits, delta
        self.grid = Grid("Ewgs", bits, role, signed=signed, axis=axis, channels=channels, features=features, init=init)
        self.scale = Step(self.grid)

    def forward(self, x: Tensor) -> Tensor:
        """The fake-quantized tensor."""
        return ewgs(x, self.scale(x), self.grid.limits.n, self.grid.limits.p, self.delta)

    def initialise(self, values: Tensor | Sequence[Tensor]) -> None:
        """Sets the scale from the weight or from batches of the activation."""
        self.scale.value.set(self.grid.start(values)[0])

    def step_size(self, weight: Tensor) -> Tensor:
        """The scale, its gradient multiplied by g."""
        scale: Tensor = self.scale(weight)
        return scale

    def learned_scale(self) -> Tensor:
        """Of the last step."""
        scale: Tensor = self.scale.value()
        return scale
