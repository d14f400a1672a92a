"""Which quantizers a model in training gets."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

from qcompress.graph.layers import Layer
from qcompress.quantizers import QUANTIZERS, AbstractQuantizer, way

_OF_ANY_SIGN: Final = "lsq_plus"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Methods:
    """How weights and activations are quantized.

    Args:
        weights: a key of `quantizers.QUANTIZERS`.
        activations: the same. Where that method has no codes for negative values and a site has some, or not for the
            site's width (operands of sums have 8 bits), LSQ+ quantizes it.
        weight_options: further arguments of the weights' quantizer, such as {"init": "min_max"}.
        activation_options: the same for activations.
        per_channel: whether output channels have scales of their own, where a method leaves the choice.
        bias_bits: of the biases of quantized layers, on a grid of one learned scale; None: floats. Layers in front of a
            BatchNorm commonly have none before it is folded.
    """

    weights: str = "lsq"
    activations: str = "lsq_plus"
    weight_options: Mapping[str, Any] = field(default_factory=dict)
    activation_options: Mapping[str, Any] = field(default_factory=dict)
    per_channel: bool = True
    bias_bits: int | None = None

    def weight(self, bits: int, layer: Layer, channels: int) -> AbstractQuantizer:
        """The quantizer of a layer's weight."""
        found = way(self.weights, "weight", bits)
        axes: dict[str, Any] = {}
        if found.scales == "channel":
            axes = {"axis": layer.axis}
        elif found.scales == "either" and self.per_channel:
            axes = {"axis": layer.axis, "channels": channels}
        return found.make(bits=bits, **axes, **self.weight_options)

    def bias(self) -> AbstractQuantizer:
        """The quantizer of a layer's bias: TQT's beside TQT's weights, else LSQ's."""
        assert self.bias_bits is not None
        return way("tqt" if self.weights == "tqt" else "lsq", "weight", self.bias_bits).make(bits=self.bias_bits)

    def activation(self, bits: int, has_negative: bool) -> AbstractQuantizer:
        """The quantizer of a site whose values were seen."""
        if self.activations not in QUANTIZERS or QUANTIZERS[self.activations].activation is None:
            way(self.activations, "activation", bits)  # says what is wrong
        asked = QUANTIZERS[self.activations].activation
        assert asked is not None
        if bits in asked.bits and (asked.for_sign is not None or not has_negative):
            sign = {} if asked.for_sign is None else asked.for_sign(has_negative)
            return asked.make(bits=bits, **{**sign, **self.activation_options})
        other = way(_OF_ANY_SIGN, "activation", bits)
        assert other.for_sign is not None
        return other.make(bits=bits, **other.for_sign(has_negative))
