"""Computes the size of a large file without building its bytes."""

from collections.abc import Mapping

import onnx


def nbytes_with(model: onnx.ModelProto, data: Mapping[str, int]) -> int:
    """Return the size in bytes that a model will have once its initializers have their data.

    An embedded field is a tag of one byte, its length as a varint, and its content. This holds at three levels:
    raw_data in a tensor, a tensor in the graph, and the graph in the model.

    Args:
        model: a model in which the initializers named in `data` have no raw_data.
        data: number of bytes of raw_data, by name of the initializer.

    >>> import numpy as np
    >>> from onnx import helper, numpy_helper
    >>> tensor = numpy_helper.from_array(np.zeros(300, np.float32), "w")
    >>> def model(tensor):
    ...     return helper.make_model(helper.make_graph([], "g", [], [], [tensor]))
    >>> wanted = model(tensor).ByteSize()
    >>> tensor.ClearField("raw_data")
    >>> nbytes_with(model(tensor), {"w": 1200}) == wanted
    True
    """
    empty: int = model.graph.ByteSize()
    total: int = model.ByteSize()
    graph = empty
    for tensor in model.graph.initializer:
        size = tensor.ByteSize()
        graph += _field(size + _field(data.get(tensor.name, 0))) - _field(size)
    return total + _field(graph) - _field(empty)


def _field(nbytes: int) -> int:
    """Return the encoded size of a field with `nbytes` of content; empty fields are not written (0)."""
    return 1 + max(1, -(-nbytes.bit_length() // 7)) + nbytes if nbytes else 0
