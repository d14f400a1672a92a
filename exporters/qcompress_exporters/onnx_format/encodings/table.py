"""The table of formats of weights, by kind of artifact."""

from collections.abc import Mapping
from typing import Final

from qcompress.artifacts import Artifact, FloatWeight, IntegerWeight, PalettizedWeight
from qcompress.errors import ConfigError
from qcompress_exporters.onnx_format.encodings.floats import Float
from qcompress_exporters.onnx_format.encodings.formats import WeightFormat, Written
from qcompress_exporters.onnx_format.encodings.palette import Palette
from qcompress_exporters.onnx_format.encodings.uniform import Uniform
from qcompress_exporters.onnx_format.graph_writer import GraphWriter

# A new kind of artifact is a file that writes it, and a line here.
WEIGHTS: Final[Mapping[str, WeightFormat]] = {
    PalettizedWeight.kind: Palette(),
    IntegerWeight.kind: Uniform(),
    FloatWeight.kind: Float(),
}


def write_weight(
    writer: GraphWriter, weight: Artifact, name: str, opset: int, weights: Mapping[str, WeightFormat] = WEIGHTS
) -> Written:
    """Write what decodes a weight to the value `name`, which equals `weight.dequantize()`.

    Args:
        writer: of the graph.
        weight: any artifact whose kind is in `weights`.
        name: the value's name.
        opset: the file's.
        weights: what writes each kind of artifact.

    Raises:
        ConfigError: nothing writes artifacts of this kind.
    """
    written = _format_of(weight, name, weights).write(writer, weight, opset)
    written.value.name = name
    return written


def write_int8(
    writer: GraphWriter, weight: Artifact, name: str, opset: int, weights: Mapping[str, WeightFormat] = WEIGHTS
) -> Written:
    """Write what gives `weight.integers().codes` as the int8 value `name`; its scale is left to the caller.

    Args:
        writer: of the graph.
        weight: an artifact that is int8 codes times a scale.
        name: the value's name.
        opset: the file's.
        weights: what writes each kind of artifact.

    Raises:
        ConfigError: the weight is no int8 codes times a scale, or nothing writes artifacts of its kind.
    """
    if weight.integers() is None:
        raise ConfigError(
            f"{name}: int8 compute must have weights that are int8 values times a scale, got a {weight.kind} artifact "
            f"of other values: compress it with scheme uniform, or to a palette of int8 entries, or compute in float."
        )
    written = _format_of(weight, name, weights).write_int8(writer, weight, opset)
    written.value.name = name
    return written


def _format_of(weight: Artifact, name: str, weights: Mapping[str, WeightFormat]) -> WeightFormat:
    if weight.kind not in weights:
        raise ConfigError(f"{name}: the kind of an artifact must be one of {', '.join(weights)}, got {weight.kind!r}.")
    return weights[weight.kind]
