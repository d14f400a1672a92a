"""A program's graph that computes with the tensors of a live module: what training runs in place of its forward.

The graph was traced in eval mode; BatchNorm and dropout behave as the module's own do.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.nn import functional

from qcompress.graph.batchnorm import BATCH_NORMS, statistics
from qcompress.graph.layers import layers
from qcompress.graph.program import FloatProgram, copy_graph, state_nodes
from qcompress.graph.sites import site_op

aten = torch.ops.aten

_DROPOUTS: Final[Mapping[Any, Callable[..., Tensor]]] = {
    aten.dropout.default: functional.dropout,
    aten.feature_dropout.default: functional.dropout2d,
}

# (index of the site, value) -> the value to go on with.
AtSite = Callable[[int, Tensor], Tensor]


@final
class LiveGraph(Interpreter):
    """Runs a marked program.

    Args:
        program: marked, BatchNorm not folded; not modified.
    """

    def __init__(self, program: FloatProgram) -> None:
        module = copy_graph(program.exported)
        for node in module.graph.nodes:
            node.target = _out_of_place(node.target)
        super().__init__(module)
        names = {node.name: name for node, name in state_nodes(program.exported).items()}
        self._names = {node: names[node.name] for node in module.graph.nodes if node.name in names}
        self._placeholders = module.graph.find_nodes(op="placeholder")
        self._weights = {layer.node.name: layer.weight for layer in layers(program)}
        self.first_not_finite: str | None = None

    def __deepcopy__(self, memo: object) -> "LiveGraph":
        """Nothing of it belongs to one module."""
        return self

    @property
    def tensors(self) -> list[str]:
        """Qualified names of the tensors that it takes."""
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
        """The program's outputs.

        Args:
            tensors: by qualified name.
            inputs: in the program's order.
            at_site: what happens to values at sites, once for each.
            norms: the BatchNorms that run themselves, by the qualified name of their running mean.
            training: whether dropout drops.
            watch: whether to look for NaN and Inf: `first_not_finite` is then the first tensor, layer (its weight) or
                value that has one.
        """
        self._at_site, self._norms, self._training, self._seen = at_site, norms, training, set[int]()
        self._watch, self.first_not_finite = watch, None
        left = iter(inputs)
        values = [tensors[self._names[n]] if n in self._names else next(left) for n in self._placeholders]
        return list(self.run(*values))

    def run_node(self, n: Node) -> Any:
        """A site goes to `at_site`, BatchNorm and dropout to their modules, anything else is run."""
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
            if index in self._seen:  # further places hold values that are on the grid
                return x
            self._seen.add(index)
            return self._at_site(index, x)
        if n.target in BATCH_NORMS:
            mean = statistics(n, n.args)[0]
            module = self._norms.get(self._names.get(mean, "")) if isinstance(mean, Node) else None
            if module is not None:
                return module(args[0]) if n.target is aten.batch_norm.default else (module(args[0]), None, None)
        if self._training and n.target in _DROPOUTS:
            return _DROPOUTS[n.target](args[0], args[1], training=True)
        return super().run_node(n)


def _out_of_place(target: Any) -> Any:
    """What computes the same without writing to its argument, which gradients may need.

    >>> _out_of_place(aten.relu_.default) is aten.relu.default, _out_of_place(aten.relu.default) is aten.relu.default
    (True, True)
    """
    packet = getattr(target, "overloadpacket", None)
    name = "" if packet is None else packet.__name__
    if not name.endswith("_") or name.startswith("_"):
        return target
    return getattr(getattr(aten, name[:-1], None), target._overloadname, target)
