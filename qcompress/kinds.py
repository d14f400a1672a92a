"""The kinds of layers: one fixed list, the same for modules, exported programs, state dicts and ONNX files."""

from typing import Final

KINDS: Final = ("conv", "depthwise", "conv_transpose", "linear", "embedding", "recurrent", "parameter", "other")
COUNTER: Final = "num_batches_tracked"  # of a BatchNorm: a buffer that no model in eval mode reads
# The kind of every tensor of a bare state dict, which does not name the layers.
UNKNOWN: Final = "unknown"
# The kinds whose weights a plan compresses.
WEIGHT_KINDS: Final = ("conv", "depthwise", "conv_transpose", "linear", "embedding", "recurrent", "parameter")
# Those of layers, which have a first and a last one.
LAYER_WEIGHT_KINDS: Final = WEIGHT_KINDS[:-1]


def kind_without_layer(shape: tuple[int, ...]) -> str:
    """Return the kind of a float tensor that no layer takes as its weight.

    Biases, scales and shifts count along one axis; what counts along several is worth compressing wherever it is used.

    >>> kind_without_layer((1, 197, 768)), kind_without_layer((1, 64, 1, 1))
    ('parameter', 'other')
    """
    return "parameter" if sum(n > 1 for n in shape) > 1 else "other"
