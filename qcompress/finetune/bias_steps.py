"""Biases of integer layers at whole steps of s_x * s_w in training, as the export writes them.

The bias that is rounded has the layer's BatchNorm folded in, with stored statistics. Gradients pass straight through
the rounding.

Shape suffix: N = the output channels of all such layers, one layer after another.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor
from torch.nn import functional

from qcompress.compressed.model import CompressedModel
from qcompress.graph.batchnorm import NormTensors, absorbed_norms
from qcompress.graph.program import FloatProgram
from qcompress.posthoc.biases import finer_steps, integer_biases
from qcompress.quantizers.ste import straight_through


@final
@dataclass(frozen=True, slots=True)
class SteppedBias:
    """One bias that training keeps at whole steps.

    Args:
        name: qualified name of the bias after folding.
        weight: qualified name of the layer's weight.
        site: index of the site of the layer's input.
        norm: the BatchNorm that the layer absorbs; None: there is none.
        channels: number of output channels.
        finer: steps of the bias in one step of the weight's codes.
    """

    name: str
    weight: str
    site: int
    norm: NormTensors | None
    channels: int
    finer: int


@final
@dataclass(frozen=True, slots=True)
class Scales:
    """The scales that decide the steps of biases, float32.

    Args:
        weights: of each weight that has codes, 0-d or [O], by qualified name.
        activations: of each site, 0-d.
    """

    weights: Mapping[str, Tensor]
    activations: Sequence[Tensor]


@final
class BiasSteps:
    """Rounds biases, those of all layers in one go.

    Args:
        biases: those that are rounded.
        left_out: names of those that only the export can round.
    """

    def __init__(self, biases: Sequence[SteppedBias], left_out: Sequence[str] = ()) -> None:
        self.biases, self.left_out = tuple(biases), tuple(left_out)
        self._channels = [bias.channels for bias in self.biases]
        self._by_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, program: FloatProgram, small: CompressedModel) -> Self:
        """Returns the steps of a model's biases; a BatchNorm without β, or in front of another, leaves one out.

        Args:
            program: the program that runs in training.
            small: what training would end with now.
        """
        norms, sites = absorbed_norms(program), list(small.activations)
        biases, left_out = [], []
        for bias in integer_biases(small.program, small.artifacts, list(small.activations.values())):
            norm, finer = norms.get(bias.weight), finer_steps(small.artifacts[bias.weight])
            if norm is None and bias.weight in norms:
                left_out.append(bias.name)
            else:
                site = sites.index(bias.grid.site)
                biases.append(SteppedBias(bias.name, bias.weight, site, norm, len(bias.values), finer))
        return cls(biases, left_out)

    def stored(self, tensors: Mapping[str, Tensor], scales: Scales) -> dict[str, Tensor]:
        """Returns the biases that the file gets, float32, by their names after folding.

        Args:
            tensors: of the program in training, by qualified name.
            scales: of weights and activations.
        """
        if not self.biases:
            return {}
        _, rounded_N = self._rounded(tensors, scales)
        return dict(zip((bias.name for bias in self.biases), torch.split(rounded_N, self._channels), strict=True))

    def used(self, tensors: Mapping[str, Tensor], scales: Scales) -> dict[str, Tensor]:
        """Returns the tensors with which the program in training has these biases: its biases, and β of BatchNorms.

        Args:
            tensors: of the program in training, by qualified name.
            scales: of weights and activations.
        """
        if not self.biases:
            return {}
        exact_N, rounded_N = self._rounded(tensors, scales)
        found: dict[str, Tensor] = {}
        split = (torch.split(values_N, self._channels) for values_N in (rounded_N, rounded_N - exact_N))
        for bias, rounded_O, moved_O in zip(self.biases, *split, strict=True):
            if bias.norm is None:
                found[bias.name] = rounded_O
            else:  # β of the channels of other layers stays as it is
                name, first = bias.norm.beta, bias.norm.first
                beta = found.get(name, tensors[name].detach())
                behind = len(beta) - first - bias.channels
                found[name] = beta + functional.pad(moved_O, (first, behind)) if first or behind else beta + moved_O
        return {name: straight_through(tensors[name], value.to(tensors[name].dtype)) for name, value in found.items()}

    @torch.no_grad()
    def _rounded(self, tensors: Mapping[str, Tensor], scales: Scales) -> tuple[Tensor, Tensor]:
        """Returns the folded biases in float64, and at whole steps in float32, by the arithmetic of fold and export."""
        one = scales.activations[0].new_ones(())

        def joined(of: Callable[[SteppedBias], Tensor]) -> Tensor:
            return torch.cat([of(bias).detach().expand(bias.channels) for bias in self.biases])

        def norm(attribute: str, default: Tensor) -> Tensor:
            def tensor(bias: SteppedBias) -> Tensor:
                name = None if bias.norm is None else getattr(bias.norm, attribute)
                if bias.norm is None or name is None:
                    return default
                whole, first = tensors[name], bias.norm.first
                return whole if len(whole) == bias.channels else whole[first : first + bias.channels]

            return joined(tensor).double()

        zero = one - 1
        own_N = joined(lambda b: tensors[b.name] if b.norm is None else tensors.get(b.norm.bias or "", zero)).double()
        epsilon_N, finer_N = self._constants(one.device)
        factor_N = norm("gamma", one) / (norm("variance", one) + epsilon_N).sqrt()
        exact_N = (norm("beta", zero) - norm("mean", zero) * factor_N) + own_N * factor_N
        scale_N = (joined(lambda b: scales.weights[b.weight]).double() * factor_N).float()
        scale_N = torch.where(scale_N == 0, 1, scale_N) / finer_N
        step_N = (joined(lambda b: scales.activations[b.site]) * scale_N).double()
        return exact_N, ((exact_N / step_N).round() * step_N).add(0.0).float()  # zero is +0.0

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns ε of each channel's BatchNorm, float64, and how much finer its steps are, float32."""
        if device not in self._by_device:
            lengths = torch.tensor(self._channels)
            epsilon = [0.0 if bias.norm is None else bias.norm.epsilon for bias in self.biases]
            finer = [float(bias.finer) for bias in self.biases]
            self._by_device[device] = (
                torch.tensor(epsilon, dtype=torch.float64).repeat_interleave(lengths).to(device),
                torch.tensor(finer).repeat_interleave(lengths).to(device),
            )
        return self._by_device[device]
