"""Parameters that stay positive whatever an optimizer does to them."""

import abc
from collections.abc import Sequence
from typing import Any, Final, final

import torch
from torch import Tensor, nn

_FLOOR: Final = 1e-3  # smallest multiple of the start
SMALLEST: Final = 1e-30  # smaller values count as 0


class LearnedValues(nn.Module, abc.ABC):
    """Positive numbers that are learned: a scale, a clipping level, the lengths of intervals."""

    @abc.abstractmethod
    def parts(self) -> tuple[Tensor, Tensor]:
        """Returns the parameter, and the buffer of the same shape that holds its start."""

    @staticmethod
    @abc.abstractmethod
    def values(learned: Tensor, start: Tensor, factor: float | Tensor) -> Tensor:
        """Returns the positive values; gradients are multiplied by `factor`.

        Args:
            learned: values of the parameter.
            start: values of its buffer.
            factor: a number, or one for each value.
        """

    @staticmethod
    @abc.abstractmethod
    def at_limit(learned: Tensor, start: Tensor) -> Tensor:
        """Returns whether each value has reached the end of its range, bool."""

    @abc.abstractmethod
    def set(self, values: Tensor) -> None:
        """Sets the values.

        Args:
            values: >= 0, broadcastable to the parameter's shape; 0 (there is nothing to scale) becomes 1.
        """

    def forward(self, factor: float = 1.0) -> Tensor:
        """Returns the positive values; gradients are multiplied by `factor`."""
        return self.values(*self.parts(), factor)

    @classmethod
    def together(cls, learned: Sequence["LearnedValues"], factor: float | Tensor = 1.0) -> Tensor:
        """Returns the values of several modules of this class as one flat tensor.

        Args:
            learned: the modules.
            factor: by which gradients are multiplied: a number, or one for each value.
        """
        parts = zip(*(each.parts() for each in learned), strict=True)
        values, starts = (torch.cat([tensor.reshape(-1) for tensor in tensors]) for tensors in parts)
        return cls.values(values, starts, factor)

    def is_collapsed(self) -> Tensor:
        """Returns whether most values have reached the end of their range, bool, 0-d.

        Some values may: those of channels that the model does not use.
        """
        return self.at_limit(*self.parts()).double().mean() > 0.5


@final
class Positive(LearnedValues):
    """start * max(raw, 0.001): what is learned is the value as a multiple of its start.

    So an optimizer such as Adam, whose steps do not depend on the size of gradients, moves each value by a share of its
    start, be it 10 or 0.001. The gradient of raw is that of the value over the start: plain SGD moves values as if they
    were the parameters. It reaches raw on the floor, too.

    Args:
        shape: shape of the parameter; its values are 1.0 until they are set.

    >>> scale = Positive(())
    >>> scale.set(torch.tensor(0.5))
    >>> with torch.no_grad():
    ...     _ = scale.raw.fill_(-1e9)
    >>> round(scale().item(), 6), scale.is_collapsed().item()
    (0.0005, True)
    """

    start: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.ones(shape))
        self.register_buffer("start", torch.ones(shape))

    def set(self, values: Tensor) -> None:
        """Sets the values.

        Args:
            values: >= 0, broadcastable to the parameter's shape; 0 (there is nothing to scale) becomes 1.
        """
        with torch.no_grad():
            self.raw.fill_(1.0)
            self.start.copy_(torch.where(values > SMALLEST, values, 1.0))

    def parts(self) -> tuple[Tensor, Tensor]:
        """Returns the parameter and the start."""
        return self.raw, self.start

    @staticmethod
    def values(learned: Tensor, start: Tensor, factor: float | Tensor) -> Tensor:
        """Returns the values, none below a thousandth of its start."""
        values: Tensor = _Multiple.apply(learned, start, factor)  # type: ignore[no-untyped-call]
        return values

    @staticmethod
    def at_limit(learned: Tensor, start: Tensor) -> Tensor:
        """Returns whether each value has reached the floor."""
        return learned <= _FLOOR


def multiplied_gradient(x: Tensor, factor: float) -> Tensor:
    """Returns x; its gradient is multiplied by a factor.

    >>> x = torch.ones((), requires_grad=True)
    >>> torch.autograd.grad(multiplied_gradient(x, 0.5), x)[0].item()
    0.5
    """
    out: Tensor = _Multiplied.apply(x, factor)  # type: ignore[no-untyped-call]
    return out


class _Multiplied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return g * ctx.factor, None


class _Multiple(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, raw: Tensor, start: Tensor, factor: float | Tensor) -> Tensor:
        ctx.factor = factor
        ctx.save_for_backward(start)
        return start * raw.clamp_min(_FLOOR)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (start,) = ctx.saved_tensors
        return g * ctx.factor / start, None, None
