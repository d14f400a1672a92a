"""The float and the compressed program side by side: one pass, operator by operator, over all calibration data.

When the pass reaches a layer, its weight is settled: on the layer's inputs in the program as compressed so far, towards
the layer's outputs in the float program. A value is freed after its last use, so that memory holds only those that are
still needed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import Interpreter, Node
from torch.fx.node import map_arg
from torch.nn import functional

from qcompress.graph.conversion import to_numpy, to_torch
from qcompress.graph.layers import LAYER_KINDS, Layer, bias_of, data_input, layers
from qcompress.graph.marks import Visit, site_op
from qcompress.graph.nodes import arguments
from qcompress.graph.program import Arrays, FloatProgram, state_nodes, tensor_of
from qcompress.graph.recurrent import OWN_LAYERS
from qcompress.posthoc.recurrent import Product, reach_products
from qcompress.progress import Track, untracked

Batches = list[Any]  # one value for each batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """A layer at its first use; of a recurrent layer, one of its products.

    Args:
        layer: the layer.
        weight: its weight in the float program.
        bias: qualified name of its bias; None if it has none of its own.
        inputs: its inputs in the compressed program, one tensor for each batch.
        float_inputs: its inputs in the float program; the same list while nothing in front of it is compressed.
        outputs: its outputs in the float program.
        run: weight -> the layer's outputs for `inputs`, with the float bias.
    """

    layer: Layer
    weight: torch.Tensor
    bias: str | None
    inputs: list[torch.Tensor]
    float_inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    run: Callable[[torch.Tensor], list[torch.Tensor]]


# Returns what replaces tensors of the program's state from this layer on, by qualified name.
Settle = Callable[[Reached], Mapping[str, torch.Tensor]]


def walk(
    program: FloatProgram,
    batches: Sequence[Arrays],
    settle: Settle,
    *,
    quantize: Visit | None = None,
    device: str = "cpu",
    track: Track = untracked,
) -> None:
    """Reach every layer of a program in the order in which the graph runs them.

    Args:
        program: with BatchNorm folded, and marked if `quantize` is given.
        batches: inputs by name; not modified.
        settle: called for each layer; returns the tensors that it computes with once compressed.
        quantize: applied to values of the compressed program at marks, as by `marks.MarkedRunner`.
        device: where it runs.
        track: a progress bar over the layers.
    """
    with torch.no_grad():
        _Walk(program, batches, settle, quantize, device).run(track)


class _Walk:
    """Holds the values of both programs.

    `_float` and `_small` map a node to its values by batch. While both hold the same list, the programs do not differ.
    Values made of weights only are computed on demand, since they change when a weight is settled.
    """

    def __init__(
        self, program: FloatProgram, batches: Sequence[Arrays], settle: Settle, quantize: Visit | None, device: str
    ) -> None:
        exported = program.exported
        self._graph, self._settle, self._quantize, self._device = exported.graph, settle, quantize, device
        self._interpreter = Interpreter(exported.graph_module)
        self._names = state_nodes(exported)
        specs = {s.arg.name: s for s in exported.graph_signature.input_specs}
        state = {n: tensor_of(exported, specs[n.name]).detach().to(device) for n in self._names}
        self._states = dict(state), dict(state)
        self._fixed = set(self._names)  # nodes that depend on no input
        inputs = [n for n in self._graph.nodes if n.op == "placeholder" and n not in self._names]
        bound = [program.bind(batch) for batch in batches]
        values = {node: [to_torch(arrays[i]).to(device) for arrays in bound] for i, node in enumerate(inputs)}
        self._float: dict[Node, Batches] = dict(values)
        self._small: dict[Node, Batches] = dict(values)
        self._count = len(batches)
        self._settled: set[Node] = set()
        self._seen: list[set[int]] = [set() for _ in batches]
        self._layers: dict[Node, Layer] = {}
        self._first: set[Node] = set()
        seen = set[str]()
        for layer in layers(program):
            self._layers[layer.node] = layer
            if layer.weight not in seen and layer.kind in LAYER_KINDS:
                self._first.add(layer.node)
            seen.add(layer.weight)

    def run(self, track: Track) -> None:
        left = {node: len(node.users) for node in self._graph.nodes}
        progress = iter(track(range(len(self._first)), "solving"))
        for node in self._graph.nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                continue
            if all(n in self._fixed for n in node.all_input_nodes):
                self._fixed.add(node)
                continue
            self._node(node)
            if node in self._first:
                next(progress, None)
            for used in node.all_input_nodes:
                left[used] -= 1
                if not left[used]:
                    self._float.pop(used, None)
                    self._small.pop(used, None)
        next(progress, None)  # lets a progress bar end

    def _node(self, node: Node) -> None:
        if node.target is site_op:
            self._float[node] = self._float[node.args[0]]  # type: ignore[index]
            self._small[node] = self._quantized(node)
            return
        float_values = self._computed(node, 0)
        if node.target in OWN_LAYERS:
            self._reach_products(node)
        elif node in self._first:
            self._reach(node, float_values)
        differs = any(self._differs(n) for n in node.all_input_nodes)
        self._small[node] = self._computed(node, 1) if differs else float_values
        self._float[node] = float_values

    def _reach(self, node: Node, outputs: Batches) -> None:
        layer, value, bias = self._layers[node], data_input(node), bias_of(node)
        if value not in self._small:
            return
        origin = next(n for n, name in self._names.items() if name == layer.weight)

        def run(weight: torch.Tensor) -> list[torch.Tensor]:
            before = self._states[1][origin]
            self._states[1][origin] = weight
            values = self._computed(node, 1)
            self._states[1][origin] = before
            return values

        reached = Reached(
            layer=layer,
            weight=self._states[0][origin],
            bias=None if bias is None or len(bias.users) > 1 else self._names.get(bias),
            inputs=self._small[value],
            float_inputs=self._float[value],
            outputs=outputs,
            run=run,
        )
        self._take(self._settle(reached))

    def _reach_products(self, node: Node) -> None:
        """Settle the weights of a recurrent layer."""

        def given(net: int) -> list[dict[str, Any]]:
            values = [partial(self._value, net=net, batch=i) for i in range(self._count)]
            return [map_arg(arguments(node), value) for value in values]

        def settle(product: Product) -> None:
            weight, bias = product.weight, product.bias
            if weight not in self._names or weight in self._settled:
                return
            added = None if bias is None else self._value(bias, 1, 0)
            reached = Reached(
                layer=Layer(self._names[weight], "recurrent", 0, node),
                weight=self._states[0][weight],
                bias=None if bias is None or len(bias.users) > 1 else self._names.get(bias),
                inputs=product.inputs[1],
                float_inputs=product.inputs[0],
                outputs=[functional.linear(x, self._states[0][weight], added) for x in product.inputs[0]],
                run=lambda values: [functional.linear(x, values, added) for x in product.inputs[1]],
            )
            self._take(self._settle(reached))

        reach_products(node, given, settle)

    def _take(self, settled: Mapping[str, torch.Tensor]) -> None:
        """Compute with settled tensors from now on."""
        for n, name in self._names.items():
            if name in settled:
                self._states[1][n] = settled[name].to(self._device)
                self._settled.add(n)

    def _differs(self, node: Node) -> bool:
        """Return whether a value may differ between the programs."""
        if node in self._names:
            return node in self._settled
        if node in self._fixed:
            return any(self._differs(n) for n in node.all_input_nodes)
        return self._float[node] is not self._small[node]

    def _computed(self, node: Node, net: int) -> Batches:
        found = []
        for i in range(self._count):
            args, kwargs = map_arg((node.args, node.kwargs), partial(self._value, net=net, batch=i))
            found.append(getattr(self._interpreter, node.op)(node.target, args, kwargs))
        return found

    def _value(self, node: Node, net: int, batch: int) -> Any:
        if node in self._names:
            return self._states[net][node]
        if node in self._fixed:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: self._value(n, net, batch))
            return getattr(self._interpreter, node.op)(node.target, args, kwargs)
        return (self._small if net else self._float)[node][batch]

    def _quantized(self, node: Node) -> Batches:
        value, index = node.args
        assert isinstance(value, Node)
        assert isinstance(index, int)
        if self._quantize is None:
            return self._small[value]
        found = []
        for i, batch in enumerate(self._small[value]):
            first = index not in self._seen[i]
            self._seen[i].add(index)
            found.append(torch.empty_like(batch).copy_(to_torch(self._quantize(index, to_numpy(batch), first))))
        return found
