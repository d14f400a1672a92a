"""Inner values get short names: a name costs its length each time it stands in the file."""

from collections.abc import Iterable, Iterator
from typing import final

import onnx_ir as ir

from qcompress_exporters.onnx_format.names import ShortNames


@final
class ShortenNames(ir.passes.InPlacePass):
    """Renames all values but the graph's inputs and outputs, those with most users to the shortest names.

    Subgraphs share the graph's name space.

    Args:
        keep: names of other values that stay as they are.
        avoid: names that no value gets, because something else will have them.
    """

    def __init__(self, keep: Iterable[str] = (), avoid: Iterable[str] = ()) -> None:
        super().__init__()
        self._keep, self._avoid = frozenset(keep), frozenset(avoid)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        graph = model.graph
        kept = {*graph.inputs, *graph.outputs}
        inner = [v for v in dict.fromkeys(_values(graph)) if v.name and v not in kept and v.name not in self._keep]
        initializers = {v: v.graph for v in inner if v.is_initializer()}
        for value, owner in initializers.items():  # a name may go to another one while its old owner still has it
            assert owner is not None
            del owner.initializers[str(value.name)]
        names = ShortNames({*self._keep, *self._avoid, *(str(v.name) for v in kept)})
        for value in sorted(inner, key=lambda v: -len(v.uses())):
            value.name = names.new()
        for value, owner in initializers.items():
            assert owner is not None
            owner.register_initializer(value)
        return ir.passes.PassResult(model, modified=bool(inner))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from (*attribute.as_graph().inputs, *_values(attribute.as_graph()))
            elif attribute.type == ir.AttributeType.GRAPHS:
                for inner in attribute.as_graphs():
                    yield from (*inner.inputs, *_values(inner))
