"""LSQ+: LSQ with a learned offset beside the learned scale.

Source: Bhalgat et al., CVPR workshops 2020: codes and values (2), gradient of the scale (3), of the offset (4), the
four configurations of Table 1, their start in 3.2.1, (7) and (8), the offset that is not learned in Table 6.
Code: written from the paper; no code copied.
Deviations: LSQ's g = 1/sqrt(N·p), which the paper does not mention, is applied to scale and offset. The scale cannot
fall below a thousandth of its start; the gradient reaches it there, too. `initial.py` lists the start's deviations.
"""

from collections.abc import Sequence
from typing import Final, Unpack, final

import torch
from torch import Tensor, nn

from qcompress.errors import ConfigError
from qcompress.quantizers.initial import Init
from qcompress.quantizers.positive import multiplied_gradient
from qcompress.quantizers.ste import fake_quantize, straight_through
from qcompress.quantizers.step import UniformOptions, UniformQuantizer, UniformSpec

# Table 1: configuration -> (signed, has an offset).
_CONFIGURATIONS: Final = {1: (False, False), 2: (True, False), 3: (True, True), 4: (False, True)}


def lsq_plus(x: Tensor, scale: Tensor, offset: Tensor, qmin: int, qmax: int) -> Tensor:
    """Fake-quantizes to codes in [qmin, qmax] times a learned scale plus a learned offset, (2).

    Args:
        x: float32 or float64, any shape; not modified.
        scale: > 0, 0-d or broadcastable against x.
        offset: 0-d or broadcastable against x.
        qmin: smallest code.
        qmax: largest code.

    Returns:
        clip(round(v), qmin, qmax) * scale + offset with v = (x - offset) / scale, in the shape of x. Gradients where
        qmin < v < qmax: 1 for x, round(v) - v for the scale (3), 0 for the offset (4); elsewhere 0, the code, and 1.
        Where `ActivationGrid` has a zero point z, this is (clip(round(x / scale) + z) - z) * scale, rounded in that
        order.

    >>> x, offset = torch.tensor([-3.0, 0.75, 3.0]), torch.tensor(-0.25, requires_grad=True)
    >>> y = lsq_plus(x, torch.tensor(1.0), offset, 0, 3)
    >>> y.tolist(), torch.autograd.grad(y.sum(), offset)[0].item()
    ([-0.25, 0.75, 2.75], 2.0)
    """
    return fake_quantize(x, scale, offset, qmin, qmax)


@final
class LsqPlus(UniformQuantizer):
    """Quantizes a weight (configuration 2) or an activation with LSQ+.

    Args:
        configuration: 1 unsigned, 2 signed, 3 signed with an offset, 4 unsigned with an offset; None: 2 for a weight,
            4 for an activation.
        init: the start of the scale: "lsq", "min_max" or "lsq_plus".
        learn_offset: whether the offset, if the configuration has one, is trained; False: it stays at its start. A
            snapped offset follows the scale in either case.
        options: `bits`, `role`, `axis`, `channels` and `features`, as in `UniformSpec`.

    Raises:
        ConfigError: an argument is invalid, or two of them conflict.

    >>> quantizer = LsqPlus(bits=2, role="activation", init="min_max")
    >>> quantizer.initialise([torch.tensor([-1.0, 0.0]), torch.tensor([5.0])])
    >>> quantizer(torch.tensor([-2.0, 0.5, 9.0])).tolist()
    [-1.0, 1.0, 5.0]
    """

    def __init__(
        self,
        *,
        configuration: int | None = None,
        init: Init = "lsq_plus",
        learn_offset: bool = True,
        **options: Unpack[UniformOptions],
    ) -> None:
        is_weight = options.get("role") == "weight"
        chosen = (2 if is_weight else 4) if configuration is None else configuration
        if chosen not in _CONFIGURATIONS or (is_weight and chosen != 2):
            wanted = "2 for a weight" if is_weight else "1, 2, 3 or 4"
            raise ConfigError(f"LsqPlus.configuration must be {wanted}, got {configuration!r}.")
        signed, has_offset = _CONFIGURATIONS[chosen]
        super().__init__(UniformSpec(who="LsqPlus", signed=signed, has_offset=has_offset, init=init, **options))
        self.offset = nn.Parameter(torch.zeros(()), requires_grad=learn_offset) if has_offset else None
        self._is_snapped = False

    def quantized(self, x: Tensor, scale: Tensor) -> Tensor:
        """Returns the tensor fake-quantized without an offset, as configurations 1 and 2 do."""
        return fake_quantize(x, scale, None, self.spec.limits.n, self.spec.limits.p)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the fake-quantized tensor."""
        limits, scale = self.spec.limits, self.scale(x)
        if self.offset is None:
            return self.quantized(x, scale)
        offset = multiplied_gradient(self.offset, self.spec.gradient_factor(x))
        if self._is_snapped:
            offset = straight_through(offset, self._snapped())
        return lsq_plus(x, scale, offset, limits.n, limits.p)

    def snap_offset(self) -> None:
        """Rounds the offset, from now on, to the multiple of the scale that a zero point in [0, 255] can store."""
        self._is_snapped = self.offset is not None

    def get_extra_state(self) -> dict[str, bool]:
        """Returns whether the offset is snapped, for the state dict."""
        return {"is_snapped": self._is_snapped}

    def set_extra_state(self, state: dict[str, bool]) -> None:
        """Restores whether the offset is snapped."""
        self._is_snapped = state["is_snapped"]

    def _snapped(self) -> Tensor:
        assert self.offset is not None
        scale: Tensor = self.scale.value().detach()
        n = self.spec.limits.n
        steps = (-self.offset.detach() / scale).round().clamp(n, n + 255)
        snapped: Tensor = -steps * scale
        return snapped

    def initialise(self, values: Tensor | Sequence[Tensor]) -> None:
        """Sets scale and offset from the weight or from batches of the activation."""
        scale, offset = self.spec.start(values)
        self.scale.value.set(scale)
        if self.offset is not None:
            with torch.no_grad():
                self.offset.copy_(offset)

    def learned_offset(self) -> Tensor | None:
        """Returns the current offset, 0-d; None: the configuration has no offset."""
        return self._snapped() if self._is_snapped else self.offset
