"""An ONNX graph while it is being changed: who gives a value, who takes it."""

import heapq
from collections.abc import Iterator
from typing import Any

import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from qcompress_exporters.onnx_format.names import ShortNames


class GraphEditor:
    """Nodes of a graph by the values that they give and take. Subgraphs are left alone; what they take counts.

    Args:
        graph: its nodes are copied; `finish` gives them back.
        names: where names of new values come from.
    """

    def __init__(self, graph: onnx.GraphProto, names: ShortNames) -> None:
        self._names = names
        self._nodes: dict[int, onnx.NodeProto] = {}
        self._gives: dict[str, onnx.NodeProto] = {}
        self._takes: dict[str, list[onnx.NodeProto]] = {}
        self._constants = {t.name: t for t in graph.initializer}
        self.outputs = {v.name for v in graph.output}
        for node in graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            self._register(copy)

    def __iter__(self) -> Iterator[onnx.NodeProto]:
        return iter(list(self._nodes.values()))

    def new_name(self) -> str:
        """A short name that is not taken."""
        return self._names.new()

    def constant(self, name: str) -> npt.NDArray[Any] | None:
        """The value of an initializer; None for any other value."""
        tensor = self._constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def producer(self, value: str) -> onnx.NodeProto | None:
        """The node that gives a value."""
        return self._gives.get(value)

    def users(self, value: str) -> list[onnx.NodeProto]:
        """The nodes that take a value, each once."""
        return list(self._takes.get(value, []))

    def only_user(self, value: str) -> onnx.NodeProto | None:
        """The one node that takes a value, if there is one alone and the value is no output."""
        users = self._takes.get(value, [])
        return users[0] if len(users) == 1 and value not in self.outputs else None

    def add(self, op_type: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        """A new node; returns its output's name."""
        output = output or self._names.new()
        self._register(helper.make_node(op_type, inputs, [output], **attributes))
        return output

    def add_many(self, op_type: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        """A new node with several outputs."""
        self._register(helper.make_node(op_type, inputs, outputs, **attributes))

    def remove(self, node: onnx.NodeProto) -> None:
        """Take a node out; what it gave may be given by another one from then on."""
        del self._nodes[id(node)]
        for name in node.output:
            if self._gives.get(name) is node:
                del self._gives[name]
        for name in values_taken(node):
            self._takes[name] = [n for n in self._takes[name] if n is not node]

    def set_input(self, node: onnx.NodeProto, position: int, value: str) -> None:
        """Let a node take another value."""
        self._forget(node)
        while len(node.input) <= position:
            node.input.append("")
        node.input[position] = value
        self._remember(node)

    def set_output(self, node: onnx.NodeProto, value: str, position: int = 0) -> None:
        """Let an output of a node have another name."""
        self._gives.pop(node.output[position], None)
        node.output[position] = value
        self._gives[value] = node

    def replace(self, old: str, new: str) -> None:
        """Let all users of a value take another one. The old one must not be an output of the graph."""
        for node in self.users(old):
            for position, name in enumerate(node.input):
                if name == old:
                    self.set_input(node, position, new)

    def drop_unused(self, value: str) -> None:
        """Remove the node that gives a value, and what it alone needed, if no one takes the value."""
        node = self._gives.get(value)
        if node is None or any(self._takes.get(o) or o in self.outputs for o in node.output):
            return
        self.remove(node)
        for name in dict.fromkeys(node.input):
            self.drop_unused(name)

    def finish(self, first: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """All nodes in an order that can be run: those given first, then each as early as it can stand."""
        done = {o for node in first for o in node.output}
        ordered, waiting = list(first), list(self._nodes.values())
        position = {id(n): i for i, n in enumerate(waiting)}
        missing = {
            id(n): {name for name in values_taken(n) if name in self._gives and name not in done} for n in waiting
        }
        ready = [position[id(n)] for n in waiting if not missing[id(n)]]
        heapq.heapify(ready)
        while ready:
            node = waiting[heapq.heappop(ready)]
            ordered.append(node)
            for output in node.output:
                for user in self._takes.get(output, []):
                    if output in missing[id(user)]:
                        missing[id(user)].discard(output)
                        if not missing[id(user)]:
                            heapq.heappush(ready, position[id(user)])
        assert len(ordered) == len(first) + len(waiting), "the graph has a cycle"
        return ordered

    def _register(self, node: onnx.NodeProto) -> None:
        self._nodes[id(node)] = node
        for name in node.output:
            self._gives[name] = node
        self._remember(node)

    def _remember(self, node: onnx.NodeProto) -> None:
        for name in values_taken(node):
            self._takes.setdefault(name, []).append(node)

    def _forget(self, node: onnx.NodeProto) -> None:
        for name in values_taken(node):
            self._takes[name] = [n for n in self._takes[name] if n is not node]


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute."""
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def values_taken(node: onnx.NodeProto) -> list[str]:
    """Every value that a node takes, once: those that its subgraphs take from outside, too."""
    names = [name for name in node.input if name]
    for a in node.attribute:
        for inner in ([a.g] if a.HasField("g") else []) + list(a.graphs):
            for n in inner.node:
                names += values_taken(n)
            names += [v.name for v in inner.output]
    return list(dict.fromkeys(names))
