"""Shorter integers: shapes, axes and other small constants as varints instead of 8 or 4 bytes each."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

# Field that holds the values of a type one by one, as varints.
_FIELDS: Final = {TensorProto.INT64: "int64_data", TensorProto.INT32: "int32_data"}
_LIMITS: Final = 1 << 7 * np.arange(1, 9)  # the first values that take 2, 3, ... bytes
_NEGATIVE_NBYTES: Final = 10


def shorten_integers(model: onnx.ModelProto) -> None:
    """Write the initializers of integers as varints where these take fewer bytes; the values stay the same.

    >>> tensor = numpy_helper.from_array(np.array([64, 64, 3, 3]), "shape")
    >>> graph = onnx.helper.make_graph([], "g", [], [], [tensor])
    >>> model = onnx.helper.make_model(graph)
    >>> before = model.ByteSize()
    >>> shorten_integers(model)
    >>> before - model.ByteSize(), numpy_helper.to_array(model.graph.initializer[0]).tolist()
    (28, [64, 64, 3, 3])
    """
    for tensor in model.graph.initializer:
        if tensor.data_type not in _FIELDS or not tensor.raw_data:
            continue
        values = numpy_helper.to_array(tensor).ravel()
        if _varints_nbytes(values) < len(tensor.raw_data):
            tensor.ClearField("raw_data")
            getattr(tensor, _FIELDS[tensor.data_type]).extend(values.tolist())


def _varints_nbytes(values: npt.NDArray[np.signedinteger[Any]]) -> int:
    lengths = 1 + np.searchsorted(_LIMITS, values.astype(np.int64), side="right")
    return int(np.where(values < 0, _NEGATIVE_NBYTES, lengths).sum())
