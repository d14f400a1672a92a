"""Rounding to a uniform grid with straight-through gradients, shared by several quantizers.

Forward is the arithmetic of `ActivationGrid` and `IntegerWeight`, bit for bit: divide, round half to even, clip,
multiply, add. Zero is +0.0, as it is after integers are converted to floats.

Backward takes few passes over the data. It saves input and output only, which the neighbouring layers save, too. The
derivative of x_hat by the scale is code - v inside the range and code outside it; by the offset it is 0 inside and 1
outside. With out = x_hat, and gx = g inside and 0 outside, the sums are:

    d/d offset = Σ(g - gx),    d/d scale = (Σ(g·out - gx·x) - offset · d/d offset) / scale.
"""

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ZERO_POINTS: Final = 255  # the largest zero point


class _Shift(NamedTuple):
    """An offset in two parts, offset - steps * scale; one of them is 0."""

    offset: Tensor
    steps: Tensor


def fake_quantize(x: Tensor, scale: Tensor, offset: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """Rounds to the closest value of a uniform grid, with gradients for x, scale and offset.

    Args:
        x: any shape; not modified.
        scale: > 0, broadcastable against x.
        offset: broadcastable against x; None: 0.
        qmin: smallest code.
        qmax: largest code.

    Returns:
        clip(round((x - offset) / scale), qmin, qmax) * scale + offset. If a zero point z in [0, 255] can store the
        offset, which is then a multiple of the scale, this is (clip(round(x / scale) + z) - z) * scale.

    >>> fake_quantize(torch.tensor([-9.0, 0.5, 1.5]), torch.tensor(1.0), None, -2, 1).tolist()
    [-2.0, 0.0, 1.0]
    """
    out: Tensor = _FakeQuantize.apply(x, scale, offset, qmin, qmax)  # type: ignore[no-untyped-call]
    return out


def codes(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """Returns the codes in [qmin, qmax] of a grid without an offset, in the dtype of x.

    >>> codes(torch.tensor([-9.0, 0.5, 1.5]), torch.tensor(1.0), -2, 1).tolist()
    [-2.0, 0.0, 1.0]
    """
    return (x / scale).round_().clamp_(qmin, qmax).add_(0.0)


def inside(gradient: Tensor, v: Tensor, qmin: float, qmax: float) -> Tensor:
    """Returns the gradient where qmin < v < qmax, else 0, in one pass.

    >>> inside(torch.ones(3), torch.tensor([0.0, 0.5, 1.0]), 0, 1).tolist()
    [0.0, 1.0, 0.0]
    """
    return torch.ops.aten.hardtanh_backward(gradient, v, qmin, qmax)  # type: ignore[no-any-return]


def scale_gradient(gradient: Tensor, masked: Tensor, x: Tensor, out: Tensor, shape: torch.Size) -> Tensor:
    """Returns Σ(g·out - gx·x), subtracting before summing: two long sums would cancel.

    Args:
        gradient: g, the gradient by `out`.
        masked: gx, the same gradient, 0 outside the range.
        x: input of the quantizer.
        out: its output.
        shape: shape of the sum.
    """
    return (gradient * out).addcmul_(masked, x, value=-1).sum_to_size(shape)


def straight_through(x: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns a value and passes its gradient to x where the mask is true.

    Args:
        x: receives the gradient.
        value: the result, in the shape of x.
        mask: bool, in the shape of x; None: true everywhere.

    >>> x = torch.tensor([0.4, 7.0], requires_grad=True)
    >>> y = straight_through(x, x.detach().round(), x < 1)
    >>> y.tolist(), torch.autograd.grad(y.sum(), x)[0].tolist()
    ([0.0, 7.0], [1.0, 0.0])
    """
    out: Tensor = _StraightThrough.apply(x, value.detach(), mask)  # type: ignore[no-untyped-call]
    return out


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(mask)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return g if mask is None else g * mask, None, None


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, offset: Tensor | None, qmin: int, qmax: int) -> Tensor:
        ctx.limits = qmin, qmax
        if offset is None:
            out, part, steps = codes(x, scale, qmin, qmax).mul_(scale), None, None
        else:
            part, steps = _shift(scale, offset, qmin)
            out = x.sub(part).div_(scale).round_().add_(steps).clamp_(qmin, qmax)
            out = out.sub_(steps).mul_(scale).add_(part)
        ctx.save_for_backward(x, scale, offset, out, part, steps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, offset, out, part, steps = ctx.saved_tensors
        qmin, qmax = ctx.limits
        v = x / scale if offset is None else x.sub(part).div_(scale).add_(steps)
        gx = inside(g, v, qmin, qmax)
        g_scale = g_offset = None
        if offset is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            # Sums of equal values are equal: the difference is exactly 0 if no value is outside.
            shape = (scale + offset).shape
            outside = g.sum_to_size(shape) - gx.sum_to_size(shape)
            g_offset = outside.sum_to_size(offset.shape)
        if ctx.needs_input_grad[1]:
            g_scale = scale_gradient(g, gx, x, out, scale.shape)
            if offset is not None:
                g_scale = g_scale - (offset * outside).sum_to_size(scale.shape)
            g_scale = g_scale / scale
        return gx.sum_to_size(x.shape), g_scale, g_offset, None, None


def _shift(scale: Tensor, offset: Tensor, qmin: int) -> _Shift:
    """Splits an offset: `ActivationGrid` rounds x / scale if it has a zero point, else (x - offset) / scale."""
    steps = (-offset / scale).round_().clamp_(qmin, qmin + _ZERO_POINTS)
    is_multiple = steps * scale == -offset
    return _Shift(torch.where(is_multiple, 0.0, offset), steps.mul_(is_multiple))
