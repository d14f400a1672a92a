"""Recurrent layers as matrix products whose inputs can be read: the sequence, and the states before each step.

The gates of a step are `W_ih x + b_ih + W_hh h + b_hh`: two products for each layer and direction of an operator, which
goes through all of them at once. So it is run here for one layer and direction at a time.

Shape suffixes: T = steps, B = batch, H = units of a state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from qcompress.graph.nodes import arguments

# Values of an operator's arguments by name, one dict for each batch, in the float (0) or the compressed program (1).
Given = Callable[[int], list[dict[str, Any]]]
Sequences = list[list[torch.Tensor]]  # of both programs, one tensor for each batch


@dataclass(frozen=True, slots=True)
class Product:
    """A product of a recurrent layer.

    Args:
        weight: its weight.
        bias: its bias; None: no bias.
        inputs: what it takes in both programs; the same list while they do not differ.
    """

    weight: Node
    bias: Node | None
    inputs: Sequences


def reach_products(node: Node, given: Given, settle: Callable[[Product], None]) -> None:
    """Reach the products of an operator in the order in which they are computed.

    Args:
        node: calls one of torch's recurrent operators.
        given: returns the values of its arguments; those of the compressed program change with every weight settled.
        settle: called for each product.
    """
    options = given(0)[0]
    directions = 2 if options["bidirectional"] else 1
    steps_first = [[_steps_first(values) for values in given(net)] for net in (0, 1)]
    sequences = steps_first if _differ(*steps_first) else [steps_first[0]] * 2
    nodes: Any = arguments(node)["params"]
    size = len(nodes) // (options["num_layers"] * directions)
    for layer in range(options["num_layers"]):
        found: list[Sequences] = []
        for number in range(layer * directions, (layer + 1) * directions):
            own = slice(number * size, (number + 1) * size)
            weights, biases = nodes[own][:2], nodes[own][2:4] if options["has_biases"] else (None, None)
            run = _Direction(node.target, number, own, reverse=number % directions == 1)
            settle(Product(weights[0], biases[0], sequences))
            after = [run.over(sequences[net], given(net)) for net in (0, 1)]
            before = [list(map(run.before, after[net], given(net))) for net in (0, 1)]
            settle(Product(weights[1], biases[1], before))
            found.append([after[0], run.over(sequences[1], given(1))])
        sequences = [[torch.cat(parts, -1) for parts in zip(*(f[net] for f in found), strict=True)] for net in (0, 1)]


def _steps_first(values: dict[str, Any]) -> torch.Tensor:
    x: torch.Tensor = values["input"]
    return x.transpose(0, 1) if values["batch_first"] else x


def _differ(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    return any(x.data_ptr() != y.data_ptr() for x, y in zip(left, right, strict=True))


@dataclass(frozen=True, slots=True)
class _Direction:
    """One layer of an operator in one direction.

    Args:
        operator: the operator.
        number: of its states: layer * directions + direction.
        params: its parameters among those of the operator.
        reverse: whether it goes through the sequence from the end.
    """

    operator: Any
    number: int
    params: slice
    reverse: bool

    def over(self, sequences: Sequence[torch.Tensor], given: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
        """Return the states after each step, for all batches."""
        return list(map(self.after, sequences, given))

    def after(self, x_TBK: torch.Tensor, values: dict[str, Any]) -> torch.Tensor:
        """Return the states after each step of a sequence, in its order."""
        own = slice(self.number, self.number + 1)
        first = values["hx"]
        state = [part[own] for part in first] if isinstance(first, list | tuple) else first[own]
        x_TBK = x_TBK.flip(0) if self.reverse else x_TBK
        options = values["has_biases"], 1, 0.0, False, False, False
        found_TBH: torch.Tensor = self.operator(x_TBK, state, list(values["params"][self.params]), *options)[0]
        return found_TBH.flip(0) if self.reverse else found_TBH

    def before(self, after_TBH: torch.Tensor, values: dict[str, Any]) -> torch.Tensor:
        """Return the states before each step, from those after it."""
        first = values["hx"]
        start = (first[0] if isinstance(first, list | tuple) else first)[self.number : self.number + 1]
        return torch.cat([after_TBH[1:], start] if self.reverse else [start, after_TBH[:-1]])
