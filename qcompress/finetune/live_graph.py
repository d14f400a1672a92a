"""A program's graph that computes with the tensors of a live module, and runs in training instead of its forward.

The graph was traced in eval mode; BatchNorm and dropout behave as in the module's current mode.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, final

from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.nn import functional

from qcompress.graph.batchnorm import returns_list, statistics
from qcompress.graph.layers import layers
from qcompress.graph.marks import site_op
from qcompress.graph.nodes import operator_name, row_of
from qcompress.graph.program import FloatProgram, state_nodes

_DROPOUTS: Final[Mapping[str, Callable[..., Tensor]]] = {
    "dropout.default": functional.dropout,
    "feature_dropout.default": functional.dropout2d,
}

# (index of the site, value) -> the value that replaces it.
AtSite = Callable[[int, Tensor], Tensor]


@final
class LiveGraph(Interpreter):
    """Runs a marked program.

    Args:
        program: a marked program; not modified.
    """

    def __init__(self, program: FloatProgram) -> None:
        super().__init__(program.exported.graph_module)
        self._names = state_nodes(program.exported)
        self._placeholders = program.exported.graph.find_nodes(op="placeholder")
        self._weights = {layer.node.name: layer.weight for layer in layers(program)}
        self.first_not_finite: str | None = None

    def __deepcopy__(self, memo: object) -> "LiveGraph":
        """Returns itself: it holds no tensor of a module."""
        return self

    @property
    def tensors(self) -> list[str]:
        """Qualified names of the tensors that it computes with."""
        return list(self._names.values())

    def outputs(
        self,
        tensors: Mapping[str, Tensor],
        inputs: Sequence[Tensor],
        at_site: AtSite,
        norms: Mapping[str, nn.Module],
        *,
        training: bool,
        watch: bool = False,
    ) -> list[Tensor]:
        """Returns the program's outputs.

        Args:
            tensors: by qualified name.
            inputs: in the program's order.
            at_site: called once for each site, with its index and value.
            norms: BatchNorm modules to call instead of the graph's operator, by the qualified name of their running
                mean.
            training: whether dropout is active.
            watch: whether to look for NaN and Inf; `first_not_finite` is then the name of the first tensor, layer (its
                weight) or value with one.
        """
        self._at_site, self._norms, self._training, self._seen = at_site, norms, training, set[int]()
        self._watch, self.first_not_finite = watch, None
        left = iter(inputs)
        values = [tensors[self._names[n]] if n in self._names else next(left) for n in self._placeholders]
        return list(self.run(*values))

    def run_node(self, n: Node) -> Any:
        """Runs a node, and checks its value if `watch` is set."""
        value = self._computed(n)
        if self._watch and self.first_not_finite is None and isinstance(value, Tensor) and not value.isfinite().all():
            self.first_not_finite = self._names.get(n) or self._weights.get(n.name, n.name)
        return value

    def _computed(self, n: Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        if n.target is site_op:
            x, index = args
            if index in self._seen:  # other uses of the site: the value is quantized already
                return x
            self._seen.add(index)
            return self._at_site(index, x)
        row = row_of(n)
        if row.normalizes:
            mean = statistics(n)[0]
            module = self._norms.get(self._names.get(mean, "")) if isinstance(mean, Node) else None
            if module is not None:
                return (module(args[0]), None, None) if returns_list(n) else module(args[0])
        if self._training and row.drops:
            return _DROPOUTS[operator_name(n)](args[0], args[1], training=True)
        return super().run_node(n)
