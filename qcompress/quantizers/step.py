"""The scale of a uniform grid as a module: how many there are, where they start, what they end in."""

import abc
from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from qcompress.artifacts import ActivationGrid, Artifact, IntegerWeight, SiteGrid, granularity
from qcompress.artifacts.integer_range import IntegerRange
from qcompress.errors import ConfigError
from qcompress.quantizers import ste
from qcompress.quantizers.base import (
    AbstractQuantizer,
    Role,
    Site,
    check_init,
    check_role,
    elements_per_scale,
    gradient_factor,
    one_tensor,
    uniform_range,
)
from qcompress.quantizers.initial import INITS, Init, activation_scale, weight_scale
from qcompress.quantizers.positive import Positive


@final
class Grid:
    """What a uniform grid is, apart from its scale.

    Args:
        who: the quantizer's name, for messages.
        bits: width of a code.
        role: what it quantizes.
        signed: whether codes are; None: a weight's are, an activation's are not.
        axis: the weight's axis that counts output channels; None: one scale.
        channels: how many there are; None: one scale.
        features: of one sample, for activations; None: those of the tensor that comes, its first axis being the batch.
        init: where the scale starts.

    Raises:
        ConfigError: one of them is none, or does not go with another.
    """

    def __init__(
        self,
        who: str,
        bits: int,
        role: Role,
        *,
        signed: bool | None,
        axis: int | None,
        channels: int | None,
        features: int | None,
        init: Init,
    ) -> None:
        check_role(who, role)
        check_init(who, init, INITS)
        if (axis is None) != (channels is None):
            raise ConfigError(f"{who}: axis and channels go together, got axis={axis!r} and channels={channels!r}.")
        if role == "activation" and axis is not None:
            raise ConfigError(f"{who}: an activation has one scale, got axis={axis!r}; leave axis and channels out.")
        if features is not None and features < 1:
            raise ConfigError(f"{who}.features must be at least 1, got {features!r}.")
        self.who, self.bits, self.role, self.axis, self.features, self.init = who, bits, role, axis, features, init
        self.signed = role == "weight" if signed is None else signed
        self.limits: IntegerRange = uniform_range(who, bits, self.signed)
        self.shape: tuple[int, ...] = () if channels is None else (channels,)

    def gradient_factor(self, x: Tensor) -> float:
        """LSQ's g for the tensor that comes."""
        scales = self.shape[0] if self.shape else 1
        return gradient_factor(self.features or elements_per_scale(x, self.role, scales), self.limits.p)

    def spread(self, scale: Tensor, ndim: int) -> Tensor:
        """A scale as it broadcasts against the tensor that it belongs to."""
        return scale if self.axis is None else scale.reshape([-1 if i == self.axis % ndim else 1 for i in range(ndim)])

    def start(self, values: Tensor | Sequence[Tensor], *, has_offset: bool = False) -> tuple[Tensor, Tensor]:
        """Scale, in the scale's shape, and offset, 0-d, to start from.

        Raises:
            ConfigError: there are no values, or the weight has other channels than were told.
        """
        x = one_tensor(values)
        if self.role == "activation":
            return activation_scale(x.reshape(-1), self.limits, self.init, has_offset=has_offset)
        rows_OR = x.reshape(1, -1) if self.axis is None else granularity.rows(x, self.axis)
        if self.shape and len(rows_OR) != self.shape[0]:
            raise ConfigError(
                f"{self.who}.channels is {self.shape[0]}, but the weight has {len(rows_OR)} on that axis."
            )
        return weight_scale(rows_OR, self.limits, self.init).reshape(self.shape), x.new_zeros(())

    def integer_weight(self, weight: Tensor, scale: Tensor) -> IntegerWeight:
        """What is stored of a weight."""
        with torch.no_grad():
            scale = scale.float()
            found = ste.codes(weight.float(), self.spread(scale, weight.ndim), self.limits.n, self.limits.p)
        codes = found.cpu().numpy()
        return IntegerWeight(
            codes=codes.astype(np.int8) if self.signed else codes.astype(np.uint8),
            scale=scale.detach().cpu().numpy().copy(),
            bits=self.bits,
            axis=None if self.axis is None else self.axis % weight.ndim,
        )

    def activation_grid(self, site: Site, scale: Tensor, offset: Tensor | None = None) -> ActivationGrid:
        """What is stored of an activation."""
        return ActivationGrid(
            site=site,
            scale=np.asarray(float(scale.detach()), np.float32),
            offset=np.asarray(0.0 if offset is None else float(offset.detach()), np.float32),
            bits=self.bits,
            signed=self.signed,
        )


@final
class Step(nn.Module):
    """The learned scale of a uniform grid, positive whatever happens, its gradient multiplied by LSQ's g.

    Args:
        grid: the rest of the grid.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.value = Positive(grid.shape)

    def forward(self, x: Tensor) -> Tensor:
        """The scale as it broadcasts against x."""
        scale: Tensor = self.value(self.grid.gradient_factor(x))
        return self.grid.spread(scale, x.ndim)


class UniformQuantizer(AbstractQuantizer, abc.ABC):
    """A quantizer onto a uniform grid: what it ends in."""

    grid: Grid

    @abc.abstractmethod
    def learned_scale(self) -> Tensor:
        """The scale as it is now, 0-d or one for each channel."""

    def learned_offset(self) -> Tensor | None:
        """The offset as it is now, 0-d; None: there is none."""
        return None

    def weight_artifact(self, weight: Tensor) -> Artifact:
        """Integer codes and their scale."""
        if self.grid.role != "weight":
            return super().weight_artifact(weight)
        return self.grid.integer_weight(weight, self.learned_scale())

    def activation_grid(self, site: Site) -> SiteGrid:
        """The grid, with its offset where there is one."""
        if self.grid.role != "activation":
            return super().activation_grid(site)
        return self.grid.activation_grid(site, self.learned_scale(), self.learned_offset())
