"""What uniform quantizers share: how values are coded, the learned scale, and the artifacts that are stored.

Shape suffixes: S = rows of all weights, N = elements of all weights; see `rows.py`.
"""

import abc
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Required, Self, TypedDict, final

import numpy as np
import torch
from torch import Tensor, nn

from qcompress.artifacts import ActivationGrid, Artifact, IntegerWeight, SiteGrid, granularity
from qcompress.artifacts.integer_range import IntegerRange
from qcompress.errors import ConfigError
from qcompress.graph.conversion import to_numpy
from qcompress.quantizers import ste
from qcompress.quantizers.base import (
    AbstractQuantizer,
    Role,
    SiteKey,
    check_init,
    check_role,
    elements_per_scale,
    gradient_factor,
    one_tensor,
    uniform_range,
)
from qcompress.quantizers.initial import INITS, Init, activation_scale, weight_scale
from qcompress.quantizers.positive import LearnedValues, Positive
from qcompress.quantizers.rows import Rows


class UniformOptions(TypedDict, total=False):
    """The arguments that all uniform quantizers take, as `UniformSpec` documents them."""

    bits: Required[int]
    role: Required[Role]
    axis: int | None
    channels: int | None
    features: int | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class UniformSpec:
    """How a uniform quantizer codes values: everything but what it learns.

    Args:
        who: the quantizer's name, for messages.
        bits: width of a code: 2 to 8 signed, 1 to 8 unsigned.
        role: "weight" or "activation".
        init: the start of the scale: "lsq", "min_max" or "lsq_plus".
        signed: whether there are negative codes; None: for weights only.
        has_offset: whether an offset is added to the codes times the scale.
        axis: the weight's axis that counts output channels, each of which has its own scale; None: one scale.
        channels: the number of output channels; given together with axis.
        features: N of LSQ's g for activations, the number of values in one sample; None: counted in each batch, whose
            first axis is the sample.

    Raises:
        ConfigError: an argument is invalid, or two of them conflict.

    >>> UniformSpec(who="Lsq", bits=2, role="weight", init="lsq").limits.n
    -2
    """

    who: str
    bits: int
    role: Role
    init: Init
    signed: bool | None = None
    has_offset: bool = False
    axis: int | None = None
    channels: int | None = None
    features: int | None = None

    def __post_init__(self) -> None:
        check_role(self.who, self.role)
        check_init(self.who, self.init, INITS)
        if (self.axis is None) != (self.channels is None):
            raise ConfigError(
                f"{self.who}: axis and channels must be given together, got axis={self.axis!r} and "
                f"channels={self.channels!r}."
            )
        if self.role == "activation" and self.axis is not None:
            raise ConfigError(
                f"{self.who}: an activation has one scale, got axis={self.axis!r}; remove axis and channels."
            )
        if self.features is not None and self.features < 1:
            raise ConfigError(f"{self.who}.features must be at least 1, got {self.features!r}.")
        uniform_range(self.who, self.bits, self.has_negative)

    @property
    def has_negative(self) -> bool:
        """Whether there are negative codes."""
        return self.role == "weight" if self.signed is None else self.signed

    @property
    def limits(self) -> IntegerRange:
        """The codes."""
        return IntegerRange(self.bits, self.has_negative)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the scale."""
        return () if self.channels is None else (self.channels,)

    def gradient_factor(self, x: Tensor) -> float:
        """Returns LSQ's g for a weight or a batch of the activation."""
        elements = self.features or elements_per_scale(x, self.role, self.channels or 1)
        return gradient_factor(elements, self.limits.p)

    def broadcast(self, scale: Tensor, ndim: int) -> Tensor:
        """Returns a scale in the shape that broadcasts against its weight or activation of `ndim` axes."""
        return scale if self.axis is None else scale.reshape([-1 if i == self.axis % ndim else 1 for i in range(ndim)])

    def start(self, values: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the scale, in its shape, and the offset, 0-d, that training starts from.

        Args:
            values: the weight, or batches of the activation.

        Raises:
            ConfigError: there are no values, or the weight has another number of channels.
        """
        x = one_tensor(values)
        if self.role == "activation":
            return activation_scale(x.reshape(-1), self.limits, self.init, has_offset=self.has_offset)
        rows_OR = x.reshape(1, -1) if self.axis is None else granularity.rows(x, self.axis)
        if self.channels is not None and len(rows_OR) != self.channels:
            raise ConfigError(
                f"{self.who}.channels is {self.channels}, but the weight has {len(rows_OR)} on axis {self.axis}."
            )
        return weight_scale(rows_OR, self.limits, self.init).reshape(self.shape), x.new_zeros(())

    def integer_weight(self, weight: Tensor, scale: Tensor) -> IntegerWeight:
        """Returns the stored form of a weight with a learned scale."""
        limits = self.limits
        with torch.no_grad():
            scale = scale.float()
            found = ste.codes(weight.float(), self.broadcast(scale, weight.ndim), limits.n, limits.p)
        codes = to_numpy(found)
        return IntegerWeight(
            codes=codes.astype(np.int8) if limits.signed else codes.astype(np.uint8),
            scale=to_numpy(scale).copy(),
            bits=self.bits,
            axis=None if self.axis is None else self.axis % weight.ndim,
        )

    def activation_grid(self, site: SiteKey, scale: Tensor, offset: Tensor | None = None) -> ActivationGrid:
        """Returns the stored form of an activation's grid with a learned scale and offset."""
        return ActivationGrid(
            site=site,
            scale=np.asarray(float(scale.detach()), np.float32),
            offset=np.asarray(0.0 if offset is None else float(offset.detach()), np.float32),
            bits=self.bits,
            signed=self.limits.signed,
        )


@final
class LearnedScale(nn.Module):
    """The learned scale of a uniform quantizer; its gradient is multiplied by LSQ's g.

    Args:
        spec: how values are coded.
        value: the parameter, in the spec's shape.
    """

    def __init__(self, spec: UniformSpec, value: LearnedValues) -> None:
        super().__init__()
        self.spec, self.value = spec, value

    def forward(self, x: Tensor) -> Tensor:
        """Returns the scale in a shape that broadcasts against x."""
        scale: Tensor = self.value(self.spec.gradient_factor(x))
        return self.spec.broadcast(scale, x.ndim)


class UniformQuantizer(AbstractQuantizer, abc.ABC):
    """A quantizer whose codes are multiples of a learned scale: a subclass adds `quantized`.

    Args:
        spec: how values are coded.
        value: the scale's parameter; None: a positive number per scale.
    """

    def __init__(self, spec: UniformSpec, value: LearnedValues | None = None) -> None:
        super().__init__()
        self.bits, self.spec = spec.bits, spec
        self.scale = LearnedScale(spec, Positive(spec.shape) if value is None else value)

    @abc.abstractmethod
    def quantized(self, x: Tensor, scale: Tensor) -> Tensor:
        """Returns the fake-quantized tensor without an offset.

        Args:
            x: any shape; not modified.
            scale: > 0, broadcastable against x.
        """

    def forward(self, x: Tensor) -> Tensor:
        """Returns the fake-quantized tensor."""
        return self.quantized(x, self.scale(x))

    def shared(self) -> Hashable:
        """Returns the codes."""
        return self.spec.limits, type(self.scale.value)

    @property
    def row_axis(self) -> int | None:
        """The axis that counts output channels; None: one scale."""
        return self.spec.axis

    @classmethod
    def quantize_rows(cls, quantizers: Sequence[Self], x_N: Tensor, rows: Rows) -> Tensor:
        """Returns the quantized elements of several weights, [N]."""
        learned = [quantizer.scale.value for quantizer in quantizers]
        spec = quantizers[0].spec
        factors = rows.constant([gradient_factor(length, spec.limits.p) for _, length in rows.shapes], like=x_N)
        scale_S = type(learned[0]).together(learned, factors)
        return quantizers[0].quantized(x_N, rows.each(scale_S))

    def initialise(self, values: Tensor | Sequence[Tensor]) -> None:
        """Sets the scale from the weight, or from batches of the activation."""
        self.scale.value.set(self.spec.start(values)[0])

    def step_size(self, weight: Tensor) -> Tensor:
        """Returns the scale in a shape that broadcasts against the weight; its gradient is multiplied by g."""
        scale: Tensor = self.scale(weight)
        return scale

    def weight_scale(self, weight: Tensor) -> Tensor:
        """Returns the learned scale."""
        return self.activation_scale()

    def activation_scale(self) -> Tensor:
        """Returns the learned scale."""
        scale: Tensor = self.scale.value()
        return scale.detach().float()

    def learned_offset(self) -> Tensor | None:
        """Returns the current offset, 0-d; None: the codes have no offset."""
        return None

    def weight_artifact(self, weight: Tensor) -> Artifact:
        """Returns integer codes and their scale."""
        if self.spec.role != "weight":
            return super().weight_artifact(weight)
        return self.spec.integer_weight(weight, self.scale.value())

    def activation_grid(self, site: SiteKey) -> SiteGrid:
        """Returns the grid with the current scale and offset."""
        if self.spec.role != "activation":
            return super().activation_grid(site)
        return self.spec.activation_grid(site, self.scale.value(), self.learned_offset())
