"""A weight as the int8 values that integer kernels compute with, packed on disk; its scale is left to the caller."""

import numpy as np

from qcompress.artifacts import Artifact, IntegerWeight, PalettizedWeight
from qcompress.errors import ConfigError
from qcompress_exporters.onnx_format.encodings.base import GraphWriter
from qcompress_exporters.onnx_format.encodings.palette import choose, write_int8_palette
from qcompress_exporters.onnx_format.encodings.uniform import write_codes


def write_int8(writer: GraphWriter, weight: Artifact, name: str, opset: int) -> str:
    """Write the nodes and initializers that give `weight.integers()[0]` as the int8 value `name`.

    onnxruntime folds them when it loads the file, before it looks for quantized layers.

    Args:
        writer: takes them.
        weight: one that is int8 codes times a scale.
        name: what the value, in the weight's shape, is called.
        opset: one that the target reads.

    Returns:
        The name of the encoding of its codes; `words` for 8 bits, which are bytes.

    Raises:
        ConfigError: `integer_values` has none.
    """
    values = weight.integers()
    if values is None or not isinstance(weight, PalettizedWeight | IntegerWeight):
        raise ConfigError(
            f"{name}: int8 compute must have weights that are int8 values times a scale, got a {weight.kind} artifact "
            f"of other values: compress it with scheme uniform, or to a palette of int8 entries, or compute in float."
        )
    encoding = choose(weight.bits, opset)
    if isinstance(weight, IntegerWeight):
        return write_codes(writer, weight, np.dtype(np.int8), opset, name)[1]
    if weight.bits == 8 and weight.vector_dim == 1:  # the values take no more than the codes, and need no table
        writer.tensor(values[0], name)
    else:
        found = weight.integer_lut()
        assert found is not None
        write_int8_palette(writer, weight, found[0], name, encoding)
    return encoding.name
