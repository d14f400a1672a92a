"""Finds the weights that a graph uses: one search for a live graph, the JSON of a `.pt2`, and a symbolic trace.

Each of these forms is read as a sequence of `Call`s, so that all commands agree on the kinds of a model.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qcompress.artifacts.granularity import output_axis
from qcompress.graph.operators import kind_of_conv, operator


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of a graph as an argument of a call.

    Args:
        name: its name in the graph.
        rank: its number of axes; None if the form of the graph does not say.
    """

    name: str
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One operator that a graph runs.

    Args:
        operator: its name, as in `operators.OPERATORS`.
        arguments: by their names in its schema, in order: a Value, a list of them, or a constant.
        outputs: names of the tensors that it returns.
    """

    operator: str
    arguments: Mapping[str, Any]
    outputs: tuple[str, ...]

    def values(self, argument: str) -> list[Value]:
        """Return the tensors of one argument."""
        given = self.arguments.get(argument)
        return [v for v in (given if isinstance(given, list | tuple) else [given]) if isinstance(v, Value)]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a model's state.

    Args:
        name: qualified name; the first one where tensors are tied.
        shape: its shape.
    """

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Use:
    """One use of a weight.

    Args:
        weight: qualified name of the tensor.
        kind: kind of the layer that uses it.
        axis: the weight's axis that counts output channels.
        call: the call that uses it.
    """

    weight: str
    kind: str
    axis: int
    call: Call


def weight_uses(calls: Iterable[Call], state: Mapping[str, Tensor]) -> Iterator[Use]:
    """Yield every use of a weight by a layer, in the order of the calls.

    A weight may arrive through views, parts and transposes; a tensor of fewer than two axes is not a weight.

    Args:
        calls: the graph, in the order in which it runs.
        state: the model's own tensors, by their names in the graph.

    >>> calls = [Call("t.default", {"self": Value("w", 2)}, ("t",)),
    ...          Call("mm.default", {"self": Value("x", 2), "mat2": Value("t", 2)}, ("y",))]
    >>> [(use.weight, use.kind, use.axis) for use in weight_uses(calls, {"w": Tensor("fc.weight", (2, 3))})]
    [('fc.weight', 'linear', 0)]
    """
    origins = {name: (tensor, False) for name, tensor in state.items()}  # (its origin, whether it is transposed)
    for call in calls:
        row = operator(call.operator)
        if row.hands_on or row.transposes:
            first = next(iter(call.arguments.values()), None)
            if isinstance(first, Value) and first.name in origins and (row.hands_on or first.rank == 2):
                tensor, transposed = origins[first.name]
                origins |= dict.fromkeys(call.outputs, (tensor, transposed != row.transposes))
        elif row.layer is not None:
            for value in (v for argument in row.layer.weights for v in call.values(argument)):
                if value.name not in origins:
                    continue
                tensor, transposed = origins[value.name]
                if len(tensor.shape) > 1:
                    kind = row.layer.kind
                    if kind == "conv":
                        arguments = call.arguments
                        kind = kind_of_conv(tensor.shape, arguments.get("groups", 1), arguments.get("transposed"))
                    axis = int(row.layer.holds_in_out != transposed) if kind == "linear" else output_axis(kind)
                    yield Use(tensor.name, kind, axis, call)


def kinds_of_calls(calls: Iterable[Call], state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the kind of each weight by its qualified name, in the order of first use; the first use counts."""
    kinds: dict[str, str] = {}
    for use in weight_uses(calls, state):
        kinds.setdefault(use.weight, use.kind)
    return kinds
