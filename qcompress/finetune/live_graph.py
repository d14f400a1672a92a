"""A program's graph that computes with the tensors of a live module, and runs in training instead of its forward.

The graph was traced in eval mode; BatchNorm and dropout behave as in the module's current mode. It is turned into
Python code once, a function of the module's tensors, the inputs and what replaces operators: it holds no tensor itself.
"""

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from typing import Any, Final, final

from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional

from qcompress.graph.batchnorm import returns_list, statistics
from qcompress.graph.layers import layers
from qcompress.graph.marks import site_op
from qcompress.graph.nodes import operator_name, row_of
from qcompress.graph.program import FloatProgram, copy_graph, state_nodes

_DROPOUTS: Final[Mapping[str, Callable[..., Tensor]]] = {
    "dropout.default": functional.dropout,
    "feature_dropout.default": functional.dropout2d,
}

# By index of the site: value -> the value that replaces it.
AtSites = Sequence[Callable[[Tensor], Tensor]]


@final
class LiveGraph:
    """Runs a marked program.

    Args:
        program: a marked program; not modified.
        norms: qualified names of the running means of those BatchNorms whose modules are called instead of the graph's
            operator.
    """

    def __init__(self, program: FloatProgram, norms: Container[str] = ()) -> None:
        placeholders = program.exported.graph.find_nodes(op="placeholder")
        names = state_nodes(program.exported)
        self.tensors = [*names.values()]
        self._order = [names.get(node) for node in placeholders]
        weights = {layer.node.name: layer.weight for layer in layers(program)}
        self._names = weights | {node.name: name for node, name in names.items()}
        self.norms = tuple(dict.fromkeys(name for node in placeholders if (name := names.get(node, "")) in norms))
        self.function = _function(program, self.norms)

    def __deepcopy__(self, memo: object) -> "LiveGraph":
        """Returns itself: it holds no tensor of a module."""
        return self

    def arguments(
        self,
        tensors: Mapping[str, Tensor],
        inputs: Sequence[Tensor],
        at_sites: AtSites,
        norms: Mapping[str, nn.Module],
        *,
        training: bool,
    ) -> list[Any]:
        """Returns the arguments of `function`, which returns the program's outputs.

        Args:
            tensors: by qualified name.
            inputs: in the program's order.
            at_sites: each is called once with its site's value.
            norms: BatchNorm modules by the qualified name of their running mean.
            training: whether dropout is active.
        """
        left = iter(inputs)
        values = [next(left) if name is None else tensors[name] for name in self._order]
        return [*values, at_sites, [norms[name] for name in self.norms], training]

    def first_not_finite(self, arguments: Sequence[Any]) -> str | None:
        """Returns the name of the first tensor, layer (its weight) or value with NaN or Inf; None: all are finite.

        Args:
            arguments: of `function`.
        """
        watching = _Watching(self.function)
        watching.run(*arguments)
        return None if watching.found is None else self._names.get(watching.found, watching.found)


@final
class LiveGraphs:
    """The graphs of a marked program: one for each choice of the BatchNorms that run as modules.

    Args:
        program: a marked program; not modified.
    """

    def __init__(self, program: FloatProgram) -> None:
        self._program = program
        self.tensors = [*state_nodes(program.exported).values()]
        self._made: dict[tuple[str, ...], LiveGraph] = {}

    def __deepcopy__(self, memo: object) -> "LiveGraphs":
        """Returns itself: it holds no tensor of a module."""
        return self

    def with_norms(self, norms: Collection[str]) -> LiveGraph:
        """Returns the graph for some BatchNorms, by the qualified names of their running means; it is made once."""
        key = tuple(norms)
        if key not in self._made:
            self._made[key] = LiveGraph(self._program, norms)
        return self._made[key]


class _Watching(Interpreter):
    """Runs a graph node by node, and finds the first node whose value has NaN or Inf."""

    found: str | None = None

    def run_node(self, n: Node) -> Any:
        """Runs a node and checks its value."""
        value = super().run_node(n)
        if self.found is None and isinstance(value, Tensor) and not value.isfinite().all():
            self.found = n.name
        return value


def _function(program: FloatProgram, norms: Sequence[str]) -> GraphModule:
    """Returns the program as a function of its placeholders, of what is called at sites, of BatchNorms and the mode."""
    module, names = copy_graph(program.exported), state_nodes(program.exported)
    graph = module.graph
    by_name = {node.name: names[node] for node in names}
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        at_sites, modules, training = (graph.placeholder(f"live_{what}") for what in ("sites", "norms", "training"))
    seen = set[int]()
    for node in [*graph.nodes]:
        row = row_of(node)
        if node.target is site_op:
            x, index = node.args
            if index in seen:  # other uses of the site: the value is quantized already
                node.replace_all_uses_with(x)
                graph.erase_node(node)
            else:
                seen.add(index)
                node.target, node.args = _call, (at_sites, index, x)
        elif row.normalizes:
            mean = statistics(node)[0]
            name = by_name.get(mean.name) if isinstance(mean, Node) else None
            if name in norms:
                node.target = _call_first if returns_list(node) else _call
                node.args, node.kwargs = (modules, norms.index(name), node.args[0]), {}
        elif row.drops:
            node.target, node.args = _DROPOUTS[operator_name(node)], (node.args[0], node.args[1], training)
    graph.lint()
    module.recompile()
    return module


def _call(modules: AtSites, index: int, x: Tensor) -> Tensor:
    return modules[index](x)


def _call_first(modules: AtSites, index: int, x: Tensor) -> tuple[Tensor, None, None]:
    return modules[index](x), None, None
