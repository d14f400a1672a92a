"""Parameters that stay positive whatever an optimizer does to them."""

import abc
from typing import Any, Final, final

import torch
from torch import Tensor, nn

_FRACTION: Final = 1e-3
SMALLEST: Final = 1e-30  # smaller values count as 0


class LearnedValues(nn.Module, abc.ABC):
    """Positive numbers that are learned: a scale, a clipping level, the lengths of intervals."""

    @abc.abstractmethod
    def forward(self, factor: float = 1.0) -> Tensor:
        """Returns the positive values; gradients are multiplied by `factor`."""

    @abc.abstractmethod
    def set(self, values: Tensor) -> None:
        """Sets the values.

        Args:
            values: >= 0, broadcastable to the parameter's shape; 0 (there is nothing to scale) becomes 1.
        """

    @property
    @abc.abstractmethod
    def collapsed(self) -> bool:
        """Whether most values have reached the end of their range.

        Some values may: those of channels that the model does not use.
        """


@final
class Positive(LearnedValues):
    """max(raw, floor); the gradient reaches raw on the floor, too.

    Args:
        shape: shape of the parameter; its values are 1.0 until they are set.

    >>> scale = Positive(())
    >>> scale.set(torch.tensor(0.5))
    >>> with torch.no_grad():
    ...     _ = scale.raw.fill_(-1e9)
    >>> round(scale().item(), 6), scale.collapsed
    (0.0005, True)
    """

    floor: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.ones(shape))
        self.register_buffer("floor", torch.full(shape, _FRACTION))

    def set(self, values: Tensor, floor: float | None = None) -> None:
        """Sets the values.

        Args:
            values: >= 0, broadcastable to the parameter's shape; 0 (there is nothing to scale) becomes 1.
            floor: the smallest value that they can take later; None: a thousandth of each value.
        """
        with torch.no_grad():
            self.raw.copy_(torch.where(values > SMALLEST, values, 1.0))
            self.floor.copy_(self.raw * _FRACTION if floor is None else torch.full_like(self.raw, floor))

    def forward(self, factor: float = 1.0) -> Tensor:
        """Returns the positive values; gradients are multiplied by `factor`."""
        values: Tensor = _AtLeast.apply(self.raw, self.floor, factor)  # type: ignore[no-untyped-call]
        return values

    @property
    def collapsed(self) -> bool:
        """Whether most values have reached the floor."""
        return bool((self.raw <= self.floor).double().mean() > 0.5)


def multiplied_gradient(x: Tensor, factor: float) -> Tensor:
    """Returns x; its gradient is multiplied by a factor.

    >>> x = torch.ones((), requires_grad=True)
    >>> torch.autograd.grad(multiplied_gradient(x, 0.5), x)[0].item()
    0.5
    """
    out: Tensor = _AtLeast.apply(x, x, factor)  # type: ignore[no-untyped-call]
    return out


class _AtLeast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, raw: Tensor, floor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return torch.maximum(raw, floor)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return g * ctx.factor, None, None
