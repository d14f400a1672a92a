"""What a quantizer is: a function with parameters that training runs, and the artifact that it ends in."""

import abc
import math
from collections.abc import Sequence
from typing import Final, Literal, get_args

import torch
from torch import Tensor, nn

from qcompress.artifacts import Artifact, SiteGrid
from qcompress.artifacts.integer_range import IntegerRange
from qcompress.errors import ConfigError
from qcompress.quantizers.positive import Positive

Role = Literal["weight", "activation"]
Site = tuple[str, int]


class AbstractQuantizer(nn.Module, abc.ABC):
    """A fake quantizer, as a parametrization of a weight or as a module that an activation goes through.

    Parameters exist from construction; `initialise` gives them their values.
    """

    bits: int

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The fake-quantized tensor, in the shape of x, which is not modified."""

    @abc.abstractmethod
    def initialise(self, values: Tensor | Sequence[Tensor]) -> None:
        """Sets the parameters.

        Args:
            values: the weight, or a few batches of the activation.
        """

    def weight_artifact(self, weight: Tensor) -> Artifact:
        """What is stored of a weight: `dequantize()` equals `forward(weight)` in float32, bit for bit.

        Args:
            weight: float32, on the parameters' device.

        Raises:
            ConfigError: this quantizes activations.
        """
        raise ConfigError(f"{type(self).__name__} quantizes an activation here and has no weight artifact.")

    def activation_grid(self, site: Site) -> SiteGrid:
        """What is stored of an activation: `dequantize(quantize(x))` equals `forward(x)` in float32, bit for bit.

        Args:
            site: as in `ActivationGrid`.

        Raises:
            ConfigError: this quantizes weights.
        """
        raise ConfigError(f"{type(self).__name__} quantizes a weight here and has no activation grid.")

    def snap_offset(self) -> None:
        """From now on keep the offset, where there is one, at a multiple of the scale that a zero point stands for."""

    def step_size(self, weight: Tensor) -> Tensor | None:
        """The learned scale, as it broadcasts against a weight; None: codes are not multiples of one."""
        return None

    @property
    def collapsed(self) -> bool:
        """Whether a parameter that must stay positive sits on its floor, or most of its values do."""
        return any(module.collapsed for module in self.modules() if isinstance(module, Positive))


def uniform_range(who: str, bits: int, signed: bool) -> IntegerRange:
    """The codes of a uniform grid.

    Raises:
        ConfigError: there is no positive one.

    >>> uniform_range("Lsq", 2, signed=True).p
    1
    """
    limits = IntegerRange(bits, signed)
    if limits.p == 0:
        raise ConfigError(
            f"{who}: a signed grid of 1 bit has no positive code; use 2 to 8 bits, or dorefa or n2uq for weights."
        )
    return limits


def check_role(who: str, role: str) -> None:
    """Whether a quantizer's role is one.

    Raises:
        ConfigError: it is not.
    """
    if role not in get_args(Role):
        raise ConfigError(f"{who}.role must be 'weight' or 'activation', got {role!r}.")


def check_init(who: str, init: str, known: Sequence[str]) -> None:
    """Whether an initialisation is known.

    Raises:
        ConfigError: it is not.
    """
    if init not in known:
        raise ConfigError(f"{who}.init must be one of {', '.join(known)}, got {init!r}.")


def gradient_factor(elements: int, p: int) -> float:
    """LSQ's g = 1 / sqrt(N·p), by which the gradient of a scale is multiplied.

    Args:
        elements: N, weights that share the scale, or features of one sample.
        p: the largest code.

    >>> gradient_factor(8, 2)
    0.25
    """
    return 1 / math.sqrt(max(1, elements) * p)


def elements_per_scale(x: Tensor, role: Role, scales: int) -> int:
    """N of LSQ's g: weights that share a scale, or features of a sample, the first axis being the batch.

    >>> elements_per_scale(torch.zeros(4, 3, 2), "weight", 4), elements_per_scale(torch.zeros(4, 3, 2), "activation", 1)
    (6, 6)
    """
    return x.numel() // (scales if role == "weight" else max(1, len(x) if x.ndim else 1))


def one_tensor(values: Tensor | Sequence[Tensor]) -> Tensor:
    """Values to initialise from, detached: a tensor as it is, batches as one flat tensor.

    Batches are thinned, evenly, to a quarter of a million values together.

    Raises:
        ConfigError: there are none.

    >>> one_tensor([torch.ones(2, 2), torch.zeros(1)]).tolist()
    [1.0, 1.0, 1.0, 1.0, 0.0]
    """
    if isinstance(values, Tensor):
        found = values.detach()
    else:
        step = max(1, sum(v.numel() for v in values) // _MOST)
        found = torch.cat([v.detach().reshape(-1)[::step] for v in values]) if len(values) else torch.empty(0)
    if not found.numel():
        raise ConfigError("A quantizer is initialised from at least one value, got none.")
    return found


_MOST: Final = 1 << 18
