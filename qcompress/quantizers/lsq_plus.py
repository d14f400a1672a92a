"""LSQ+: LSQ with a learned offset beside the learned scale.

Source: Bhalgat et al., CVPR workshops 2020: codes and values (2), gradient of the scale (3), of the offset (4), the
four configurations of Table 1, where they start 3.2.1, (7) and (8).
Code: written from the paper; no code copied.
Deviations: LSQ's g = 1/sqrt(N·p), of which the paper says nothing, is applied to scale and offset. The scale has a
floor, a thousandth of its start, on which it keeps its gradient. `initial.py` names those of the start.
"""

from collections.abc import Sequence
from typing import Final, final

import torch
from torch import Tensor, nn

from qcompress.errors import ConfigError
from qcompress.quantizers.base import Role
from qcompress.quantizers.initial import Init
from qcompress.quantizers.positive import multiplied_gradient
from qcompress.quantizers.ste import fake_quantize, straight_through
from qcompress.quantizers.step import Grid, Step, UniformQuantizer

# Table 1: configuration -> (signed, has an offset).
_CONFIGURATIONS: Final = {1: (False, False), 2: (True, False), 3: (True, True), 4: (False, True)}


def lsq_plus(x: Tensor, scale: Tensor, offset: Tensor, qmin: int, qmax: int) -> Tensor:
    """Fake-quantize to codes in [qmin, qmax] times a learned scale plus a learned offset, (2).

    Args:
        x: float32 or float64, any shape; not modified.
        scale: > 0, 0-d or broadcastable against x.
        offset: 0-d or broadcastable against x.
        qmin: smallest code.
        qmax: largest code.

    Returns:
        clip(round(v), qmin, qmax) * scale + offset with v = (x - offset) / scale, in the shape of x. Gradients where
        qmin < v < qmax: 1 for x, round(v) - v for the scale (3), 0 for the offset (4); elsewhere 0, the code, and 1.
        Where `ActivationGrid` has a zero point z this is (clip(round(x / scale) + z) - z) * scale, rounded in that
        order.

    >>> x, offset = torch.tensor([-3.0, 0.75, 3.0]), torch.tensor(-0.25, requires_grad=True)
    >>> y = lsq_plus(x, torch.tensor(1.0), offset, 0, 3)
    >>> y.tolist(), torch.autograd.grad(y.sum(), offset)[0].item()
    ([-0.25, 0.75, 2.75], 2.0)
    """
    return fake_quantize(x, scale, offset, qmin, qmax)


@final
class LsqPlus(UniformQuantizer):
    """LSQ+ of a weight (configuration 2) or an activation.

    Args:
        bits: width of a code: 1 to 8 in configurations 1 and 4, 2 to 8 in 2 and 3.
        role: what it quantizes.
        configuration: 1 unsigned, 2 signed, 3 signed with an offset, 4 unsigned with an offset; None: 2 for a weight,
            4 for an activation.
        axis: the weight's axis that counts output channels, for a scale each; None: one scale.
        channels: how many there are; None: one scale.
        features: N of g, per sample, for activations; None: those of the tensor that comes, batch first.
        init: "lsq", "min_max" or "lsq_plus".

    Raises:
        ConfigError: one of them is none, or does not go with another.

    >>> quantizer = LsqPlus(bits=2, role="activation", init="min_max")
    >>> quantizer.initialise([torch.tensor([-1.0, 0.0]), torch.tensor([5.0])])
    >>> quantizer(torch.tensor([-2.0, 0.5, 9.0])).tolist()
    [-1.0, 1.0, 5.0]
    """

    def __init__(
        self,
        *,
        bits: int,
        role: Role,
        configuration: int | None = None,
        axis: int | None = None,
        channels: int | None = None,
        features: int | None = None,
        init: Init = "lsq_plus",
    ) -> None:
        super().__init__()
        chosen = (2 if role == "weight" else 4) if configuration is None else configuration
        if chosen not in _CONFIGURATIONS or (role == "weight" and chosen != 2):
            wanted = "2 for a weight" if role == "weight" else "1, 2, 3 or 4"
            raise ConfigError(f"LsqPlus.configuration must be {wanted}, got {configuration!r}.")
        signed, has_offset = _CONFIGURATIONS[chosen]
        self.bits = bits
        self.grid = Grid(
            "LsqPlus", bits, role, signed=signed, axis=axis, channels=channels, features=features, init=init
        )
        self.scale = Step(self.grid)
        self.offset = nn.Parameter(torch.zeros(())) if has_offset else None
        self._is_snapped = False

    def forward(self, x: Tensor) -> Tensor:
        """The fake-quantized tensor."""
        limits, scale = self.grid.limits, self.scale(x)
        if self.offset is None:
            return fake_quantize(x, scale, None, limits.n, limits.p)
        offset = multiplied_gradient(self.offset, self.grid.gradient_factor(x))
        if self._is_snapped:
            offset = straight_through(offset, self._snapped())
        return lsq_plus(x, scale, offset, limits.n, limits.p)

    def snap_offset(self) -> None:
        """From now on the offset is the nearest multiple of the scale that a zero point in [0, 255] stands for."""
        self._is_snapped = self.offset is not None

    def get_extra_state(self) -> dict[str, bool]:
        """Whether the offset is snapped: part of the state dict."""
        return {"is_snapped": self._is_snapped}

    def set_extra_state(self, state: dict[str, bool]) -> None:
        """As it was saved."""
        self._is_snapped = state["is_snapped"]

    def _snapped(self) -> Tensor:
        assert self.offset is not None
        scale: Tensor = self.scale.value().detach()
        n = self.grid.limits.n
        steps = (-self.offset.detach() / scale).round().clamp(n, n + 255)
        snapped: Tensor = -steps * scale
        return snapped

    def initialise(self, values: Tensor | Sequence[Tensor]) -> None:
        """Sets scale and offset from the weight or from batches of the activation."""
        scale, offset = self.grid.start(values, has_offset=self.offset is not None)
        self.scale.value.set(scale)
        if self.offset is not None:
            with torch.no_grad():
                self.offset.copy_(offset)

    def step_size(self, weight: Tensor) -> Tensor:
        """The scale, its gradient multiplied by g."""
        scale: Tensor = self.scale(weight)
        return scale

    def learned_scale(self) -> Tensor:
        """Of the last step."""
        scale: Tensor = self.scale.value()
        return scale

    def learned_offset(self) -> Tensor | None:
        """Of the last step; None: the configuration has none."""
        return self._snapped() if self._is_snapped else self.offset
