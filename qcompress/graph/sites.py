"""The activations that are quantized: one function serves post-hoc export, training and parity.

A site is a value of the float program. Its place follows from what onnxruntime computes in integers; its grid is chosen
elsewhere, and `marks` puts it into the graph.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from torch.fx import Node

from qcompress.deployment import DEFAULT
from qcompress.errors import ConfigError
from qcompress.graph.layers import LAYER_KINDS, Layer, data_input, layers, named_uses
from qcompress.graph.nodes import moves, row_of
from qcompress.graph.program import FloatProgram, is_float_activation, state_nodes, user_inputs, value_of

Placement = Literal["deploy", "paper"]
PLACEMENTS: Final[tuple[Placement, ...]] = ("deploy", "paper")
OUTPUT: Final = -1  # index of a site that is a value itself; 0: the input of a layer

# Kinds of layers that have a site at their output, too.
_OUTPUT_KINDS: Final = ("conv", "depthwise", "conv_transpose")


@dataclass(frozen=True, slots=True)
class Site:
    """One quantized value.

    Args:
        name: the value's node in the graph, or the program's input; for a layer's input, the layer's weight.
        index: OUTPUT for a value, 0 for a layer's input.
        bits: width to which it is quantized.
    """

    name: str
    index: int
    bits: int

    @property
    def key(self) -> tuple[str, int]:
        """Return the site as an `ActivationGrid` holds it."""
        return self.name, self.index


def activation_sites(
    program: FloatProgram,
    activation_bits: Mapping[str, int],
    placement: Placement = "deploy",
    fused: frozenset[str] = DEFAULT.fused,
) -> tuple[Site, ...]:
    """Return the values of a program that are quantized, in the order in which the graph computes them.

    Args:
        program: with BatchNorm folded.
        activation_bits: bits of each layer's input, by the qualified name of its weight; all other layers take float
            activations.
        placement: `deploy`: everything that the target fuses: inputs of layers, outputs of convolutions, and, at 8
            bits, operands and outputs of the operators in between that `fused` names. `paper`: inputs of layers only.
        fused: see `Deployment.fused`.

    Returns:
        Sites. A value that only layers of one width take has that width; any other has 8 bits. Operands of sums keep 8,
        and at `deploy` a value has one grid for all its users: a second quantizer costs more time than fewer bits save.
        At `paper`, each layer quantizes such a value for itself.

    Raises:
        ConfigError: the placement is unknown.
    """
    if placement not in PLACEMENTS:
        raise ConfigError(f"placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}.")
    return _Finder(program, activation_bits, placement, fused).sites()


def layer_input_sites(program: FloatProgram, weights: Iterable[str]) -> tuple[Site, ...]:
    """Return a site of 8 bits at the input of each named layer: `dynamic8` quantizes there at run time."""
    wanted = set(weights)
    return tuple(Site(name, 0, 8) for name, use in named_uses(program).items() if use.weight in wanted)


class _Finder:
    """The state of one search; see `activation_sites`."""

    def __init__(
        self, program: FloatProgram, activation_bits: Mapping[str, int], placement: Placement, fused: frozenset[str]
    ) -> None:
        self.exported = program.exported
        self.bits = activation_bits
        self.paper = placement == "paper"
        self.fused = fused
        self.state = state_nodes(program.exported)
        self.names = dict(zip((s.name for s in user_inputs(program.exported)), program.input_names, strict=True))
        self.uses = {use.node: name for name, use in named_uses(program).items()}
        self.layers = {
            use.node: use for use in layers(program) if use.kind in LAYER_KINDS and use.weight in activation_bits
        }
        # A root is a value before any moves.
        self.takers: dict[Node, list[Layer]] = {}  # by root: the layers that take it
        self.moved: dict[Node, list[Node]] = {}  # by root: the values, moved or not, that layers and operators take
        self.eight: set[Node] = set()  # roots that other operators take too

    def sites(self) -> tuple[Site, ...]:
        for node in self.exported.graph.nodes:
            if node.op != "call_function":
                continue
            if node in self.layers:
                layer = self.layers[node]
                root = self._take(data_input(node))
                self.takers.setdefault(root, []).append(layer)
                if layer.kind in _OUTPUT_KINDS and not self.paper:
                    self._give(node)
            elif not self.paper and (operands := self._operands(node)):
                for operand in operands:
                    self.eight.add(self._take(operand))
                self._give(node)
        found = []
        for root in sorted(self.moved, key=list(self.exported.graph.nodes).index):
            found += self._of(root)
        return tuple(found)

    def _of(self, root: Node) -> list[Site]:
        takers = self.takers.get(root, [])
        nodes = list(dict.fromkeys([root, *self.moved[root]]))
        widths = {self.bits[layer.weight] for layer in takers}
        others = any(not self._is_taken(user, root) for value in nodes for user in value.users)
        alone = root not in self.eight and len(widths) == 1 and not others
        if self.paper and not alone:
            return [Site(self.uses[layer.node], 0, self.bits[layer.weight]) for layer in takers]
        return [Site(self.names.get(root.name, root.name), OUTPUT, min(widths) if alone else 8)]

    def _is_taken(self, user: Node, root: Node) -> bool:
        """Return whether a user of a value is a layer, or leads to nothing but layers through moves."""
        if user in self.layers:
            return self._root(data_input(user)) is root
        return moves(user, self.state) and bool(user.users) and all(self._is_taken(u, root) for u in user.users)

    def _take(self, value: Node) -> Node:
        """Note that an operator takes a quantized value; returns its root."""
        root = self._root(value)
        self.moved.setdefault(root, []).append(value)
        return root

    def _give(self, node: Node) -> None:
        """Note that an operator's output is quantized, behind the clamps that a quantizer absorbs."""
        while "clamps" in self.fused and len(node.users) == 1:
            user = next(iter(node.users))
            if not row_of(user).clamps or user.args[0] is not node:
                break
            node = user
        self._take(node)

    def _operands(self, node: Node) -> list[Node]:
        """Return an operator's activations if the target computes it on codes and one of them is quantized."""
        row = row_of(node)
        candidates: Sequence[Any] = ()
        if row.sums and "sums" in self.fused and not node.kwargs:
            candidates = [a for a in node.args if not _is_number(a)]
        elif (
            (row.bends and "bends" in self.fused)
            or (row.pools and "pools" in self.fused)
            or (row.averages and "averages" in self.fused and _is_spatial(node))
        ):
            candidates = node.args[:1]
        elif row.joins and "joins" in self.fused:
            candidates = node.args[0]  # type: ignore[assignment]
        operands = [a for a in candidates if isinstance(a, Node)]
        if len(operands) < len(candidates) or not all(is_float_activation(a) and a not in self.state for a in operands):
            return []
        return operands if any(self._root(a) in self.moved for a in operands) else []

    def _root(self, value: Node) -> Node:
        while moves(value, self.state):
            value = value.args[0]  # type: ignore[assignment]
        return value


def _is_number(argument: Any) -> bool:
    """Return whether an argument is a number that a sum or a product of codes can take: it has a scale."""
    return isinstance(argument, int | float) and 0 < abs(argument) < math.inf


def _is_spatial(node: Node) -> bool:
    """Return whether a mean is over all axes of an image but batch and channels."""
    value = value_of(node.args[0])  # type: ignore[arg-type]
    axes = node.args[1]
    if not isinstance(axes, Sequence) or value.ndim not in (3, 4):
        return False
    return {a % value.ndim for a in axes if isinstance(a, int)} == set(range(2, value.ndim))
