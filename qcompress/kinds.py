"""The kinds of layers: one fixed list, the same for modules, exported programs, state dicts and ONNX files."""

from typing import Final

KINDS: Final = ("conv", "depthwise", "conv_transpose", "linear", "embedding", "recurrent", "other")
# The kind of every tensor of a bare state dict, which does not name the layers.
UNKNOWN: Final = "unknown"
# The kinds whose weights a plan compresses.
WEIGHT_KINDS: Final = ("conv", "depthwise", "conv_transpose", "linear", "embedding")
