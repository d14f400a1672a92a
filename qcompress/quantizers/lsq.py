"""LSQ: a uniform grid whose step size is learned.

Source: Esser et al., ICLR 2020, as written down by Han et al., ICCV 2021 ("bin regularization"), section 3.1, (1)-(4):
code (1), value (2), gradient of the scale (3), of the input (4), g = 1/sqrt(N·p) and the start 2·mean|v|/sqrt(p) below.
Code: written from the paper; no code copied.
Deviations: the scale has a floor, a thousandth of its start, on which it keeps its gradient.
"""

from collections.abc import Sequence
from typing import final

from torch import Tensor

from qcompress.quantizers.base import Role
from qcompress.quantizers.initial import Init
from qcompress.quantizers.ste import fake_quantize
from qcompress.quantizers.step import Grid, Step, UniformQuantizer


def lsq(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """Fake-quantize to codes in [qmin, qmax] times a learned scale, (1) and (2).

    Args:
        x: float32 or float64, any shape; not modified.
        scale: > 0, 0-d or broadcastable against x, such as [O, 1, 1, 1].
        qmin: smallest code.
        qmax: largest code.

    Returns:
        clip(round(x / scale), qmin, qmax) * scale, in the shape of x. Gradients: 1 for x where
        qmin < x / scale < qmax, else 0; for the scale round(x / scale) - x / scale there, qmin below, qmax above.

    >>> import torch
    >>> x, scale = torch.tensor([-3.0, 0.75, 3.0]), torch.tensor(0.5, requires_grad=True)
    >>> y = lsq(x, scale, -2, 1)
    >>> y.tolist(), torch.autograd.grad(y[2], scale)[0].item()
    ([-1.0, 0.5, 0.5], 1.0)
    """
    return fake_quantize(x, scale, None, qmin, qmax)


@final
class Lsq(UniformQuantizer):
    """LSQ of a weight or an activation.

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

    >>> import torch
    >>> quantizer = Lsq(bits=2, role="weight")
    >>> quantizer.initialise(torch.tensor([[-0.5, 0.5]]))
    >>> quantizer(torch.tensor([[-0.5, 3.0]])).tolist()
    [[0.0, 1.0]]
    """

    def __init__(
        self,
        *,
        bits: int,
        role: Role,
        signed: bool | None = None,
        axis: int | None = None,
        channels: int | None = None,
        features: int | None = None,
        init: Init = "lsq",
    ) -> None:
        super().__init__()
        self.bits = bits
        self.grid = Grid("Lsq", bits, role, signed=signed, axis=axis, channels=channels, features=features, init=init)
        self.scale = Step(self.grid)

    def forward(self, x: Tensor) -> Tensor:
        """The fake-quantized tensor."""
        return lsq(x, self.scale(x), self.grid.limits.n, self.grid.limits.p)

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
