"""LSQ: a uniform grid whose step size is learned.

Source: Esser et al., ICLR 2020, as written down by Han et al., ICCV 2021 ("bin regularization"), section 3.1, (1)-(4):
code (1), value (2), gradient of the scale (3), of the input (4), g = 1/sqrt(N·p) and the start 2·mean|v|/sqrt(p) below.
Code: written from the paper; no code copied.
Deviations: the scale cannot fall below a thousandth of its start; the gradient reaches it there, too.
"""

from typing import Unpack, final

from torch import Tensor

from qcompress.quantizers.initial import Init
from qcompress.quantizers.ste import fake_quantize
from qcompress.quantizers.step import UniformOptions, UniformQuantizer, UniformSpec


def lsq(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """Fake-quantizes to codes in [qmin, qmax] times a learned scale, (1) and (2).

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
    """Quantizes a weight or an activation with LSQ.

    Args:
        signed: whether there are negative codes; None: for weights only.
        init: the start of the scale: "lsq", "min_max" or "lsq_plus".
        options: `bits`, `role`, `axis`, `channels` and `features`, as in `UniformSpec`.

    Raises:
        ConfigError: an argument is invalid, or two of them conflict.

    >>> import torch
    >>> quantizer = Lsq(bits=2, role="weight")
    >>> quantizer.initialise(torch.tensor([[-0.5, 0.5]]))
    >>> quantizer(torch.tensor([[-0.5, 3.0]])).tolist()
    [[0.0, 1.0]]
    """

    def __init__(self, *, signed: bool | None = None, init: Init = "lsq", **options: Unpack[UniformOptions]) -> None:
        super().__init__(UniformSpec(who="Lsq", signed=signed, init=init, **options))

    def quantized(self, x: Tensor, scale: Tensor) -> Tensor:
        """Returns the fake-quantized tensor."""
        return lsq(x, scale, self.spec.limits.n, self.spec.limits.p)
