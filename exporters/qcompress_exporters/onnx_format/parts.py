"""Weights that are too large to be decoded once, at load, are written in parts, and what takes them takes the parts.

onnxruntime 1.27 and later folds no value above 1 GiB: it would decode such a weight at each run. Each part is decoded
by itself; an operator with a weight becomes one with each part, whose results are joined.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import onnx_ir as ir

from qcompress_exporters.onnx_format.graph_writer import GraphWriter
from qcompress_exporters.onnx_format.passes.replace import constant_of, drop_unused, input_of, optional_input

FOLDED: Final = 1 << 30  # bytes of the largest value that onnxruntime folds, unless a session sets another limit
_PADDING: Final = 64  # elements beyond a weight's own that its codes may decode to


class Part(NamedTuple):
    """A range of one axis of a weight.

    Args:
        value: its decoded value.
        start: its first index.
        stop: the index behind its last one.
    """

    value: ir.Value
    start: int
    stop: int


class Use(NamedTuple):
    """A place that takes a weight.

    Args:
        node: takes it.
        position: the input that is the weight.
    """

    node: ir.Node
    position: int


def largest_part(limit: int) -> int:
    """Return how many elements a part may have, as float32 or as indices into a palette, so that it is folded.

    Args:
        limit: bytes of the largest value that the runtime folds.
    """
    return limit // np.dtype(np.float32).itemsize - _PADDING


def axes_of(value: ir.Value, graph: ir.Graph) -> list[int]:
    """Return the axes of a weight along which all that take it can take parts.

    Args:
        value: the weight; its shape is known.
        graph: the main graph: nodes of other graphs take whole weights only.
    """
    if value.is_graph_output() or value.shape is None:
        return []
    axes = set(range(len(value.shape)))
    for node, position in value.uses():
        known = node.graph is graph and not node.domain and node.op_type in _USERS
        axes &= _USERS[node.op_type].axes(Use(node, position), graph) if known else set()
    return sorted(axes)


def take_parts(writer: GraphWriter, value: ir.Value, axis: int, parts: Sequence[Part]) -> None:
    """Let all that take a weight take its parts.

    Args:
        writer: of the graph.
        value: the weight.
        axis: one of `axes_of(value)`.
        parts: in order; together the whole weight.
    """
    for node, position in value.uses():
        _USERS[node.op_type].take(writer, Use(node, position), axis, parts)


class _User(NamedTuple):
    """How an operator takes a weight in parts.

    Args:
        axes: returns the axes along which a use can take parts.
        take: rewrites a use.
    """

    axes: Callable[[Use, ir.Graph], set[int]]
    take: Callable[[GraphWriter, Use, int, Sequence[Part]], None]


def _product_axes(use: Use, graph: ir.Graph) -> set[int]:
    """Return the axis of the weight of a Gemm or a product of matrices that counts outputs."""
    if use.position != 1:
        return set()
    weight, bias = input_of(use.node, 1), optional_input(use.node, 2)
    if weight.shape is None or len(weight.shape) != 2:
        return set()
    axis = 0 if use.node.attributes.get_int("transB", 0) else 1
    is_cut = bias is None or (bias.shape is not None and list(bias.shape) == [weight.shape[axis]])
    return {axis} if is_cut else set()


def _conv_axes(use: Use, graph: ir.Graph) -> set[int]:
    return {0} if use.position == 1 and use.node.attributes.get_int("group", 1) == 1 else set()


def _take_product(writer: GraphWriter, use: Use, axis: int, parts: Sequence[Part]) -> None:
    """Compute some of a layer's outputs from each part, and join these."""
    node = use.node
    source, bias = input_of(node, 0), optional_input(node, 2)
    results = []
    for part in parts:
        inputs = [source, part.value]
        if bias is not None:
            inputs.append(writer.add("Slice", [bias, writer.shape([part.start]), writer.shape([part.stop])]))
        results.append(writer.add_like(node, inputs))
    _supersede(writer, node, writer.add("Concat", results, axis=-1 if node.op_type == "MatMul" else 1))


def _transpose_axes(use: Use, graph: ir.Graph) -> set[int]:
    """Return what the users of a transposed weight allow, in the weight's own axes."""
    weight = input_of(use.node, 0)
    if weight.shape is None:
        return set()
    order, transposed = _order(use.node, len(weight.shape)), use.node.outputs[0]
    if transposed.shape is None:
        transposed.shape = ir.Shape([weight.shape[axis] for axis in order])
    return {order[axis] for axis in axes_of(transposed, graph)}


def _order(transpose: ir.Node, rank: int) -> Sequence[int]:
    return transpose.attributes.get_ints("perm", tuple(reversed(range(rank))))


def _take_transpose(writer: GraphWriter, use: Use, axis: int, parts: Sequence[Part]) -> None:
    """Transpose each part."""
    transposed = use.node.outputs[0]
    assert transposed.shape is not None
    order = _order(use.node, len(transposed.shape))
    moved = [part._replace(value=writer.add("Transpose", [part.value], perm=order)) for part in parts]
    take_parts(writer, transposed, order.index(axis), moved)
    drop_unused(writer.graph, transposed)


def _lookup_axes(use: Use, graph: ir.Graph) -> set[int]:
    """Return the first axis of a weight where whole rows of it are looked up."""
    attributes = use.node.attributes
    if use.position or attributes.get_int("axis", 0) or attributes.get_int("batch_dims", 0):
        return set()
    return {0} if _rows_of(use.node) is not None else set()


def _rows_of(node: ir.Node) -> ir.Value | None:
    """Return the rows that a node looks up; None if it looks up anything else: a GatherND can take more indices."""
    indices = input_of(node, 1)
    if node.op_type == "Gather":
        return indices
    last_added = indices.producer()
    if last_added is None or last_added.op_type != "Unsqueeze":
        return None
    axes = constant_of(last_added, 1)
    return input_of(last_added, 0) if axes is not None and axes.tolist() == [-1] else None


def _take_lookup(writer: GraphWriter, use: Use, axis: int, parts: Sequence[Part]) -> None:
    """Look rows up in each part, and take those of the part that has them; rows may be counted from the end."""
    weight, rows = input_of(use.node, 0), _rows_of(use.node)
    assert weight.shape is not None
    assert rows is not None

    def number(value: int) -> ir.Value:
        return writer.constant(np.array(value, np.int64))

    rows = writer.add("Cast", [rows], to=ir.DataType.INT64)
    from_end = writer.add("Add", [rows, number(parts[-1].stop)])
    rows = writer.add("Where", [writer.add("Less", [rows, number(0)]), from_end, rows])
    ends = [writer.add("Less", [rows, number(part.stop)]) for part in parts[:-1]]
    found = None
    for part in reversed(parts):
        inside = writer.add("Max", [writer.add("Sub", [rows, number(part.start)]), number(0)])
        if found is None:
            found = writer.add("Gather", [part.value, inside])
            continue
        inside = writer.add("Min", [inside, number(part.stop - part.start - 1)])
        here = writer.add("Unsqueeze", [ends.pop(), writer.shape(range(-(len(weight.shape) - 1), 0))])
        found = writer.add("Where", [here, writer.add("Gather", [part.value, inside]), found])
    assert found is not None
    indices = input_of(use.node, 1)
    _supersede(writer, use.node, found)
    drop_unused(writer.graph, indices)


def _supersede(writer: GraphWriter, node: ir.Node, result: ir.Value) -> None:
    writer.supersede(node.outputs[0], result)
    writer.graph.remove(node, safe=True)


# An operator that can take its weight in parts is a line here.
_USERS: Final[Mapping[str, _User]] = {
    "Conv": _User(_conv_axes, _take_product),
    "Gather": _User(_lookup_axes, _take_lookup),
    "GatherND": _User(_lookup_axes, _take_lookup),
    "Gemm": _User(_product_axes, _take_product),
    "MatMul": _User(_product_axes, _take_product),
    "Transpose": _User(_transpose_axes, _take_transpose),
}
