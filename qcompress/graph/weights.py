"""Finds the weights that a graph uses: one search for a live graph, the JSON of a `.pt2`, and a symbolic trace.

Each of these forms is read as a sequence of `Call`s, so that all commands agree on the kinds of a model.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from qcompress.artifacts.granularity import output_axis
from qcompress.graph.operators import kind_of_conv, operator
from qcompress.kinds import kind_without_layer

_MOST_SOURCES: Final = 64  # that are remembered for one value: a hostile graph may add up thousands


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
        return _values(self.arguments.get(argument))

    def all_values(self) -> list[Value]:
        """Return the tensors of all arguments."""
        return [value for argument in self.arguments.values() for value in _values(argument)]


def _values(argument: Any) -> list[Value]:
    return [v for v in (argument if isinstance(argument, list | tuple) else [argument]) if isinstance(v, Value)]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a model's state.

    Args:
        name: qualified name; the first one where tensors are tied.
        shape: its shape.
        is_float: whether its values are floats.
        is_parameter: whether it is a parameter, not a buffer or a constant.
    """

    name: str
    shape: tuple[int, ...]
    is_float: bool = True
    is_parameter: bool = True


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

    A weight may arrive through views, parts and transposes. A tensor of fewer than two axes is not a weight, and a
    stack of matrices is not that of a layer: no axis of it counts output channels.

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
                kind, rank = row.layer.kind, len(tensor.shape) if value.rank is None else value.rank
                if len(tensor.shape) > 1 and not (kind == "linear" and rank > 2):
                    if kind == "conv":
                        arguments = call.arguments
                        kind = kind_of_conv(tensor.shape, arguments.get("groups", 1), arguments.get("transposed"))
                    axis = int(row.layer.holds_in_out != transposed) if kind == "linear" else output_axis(kind)
                    yield Use(tensor.name, kind, axis, call)


def kinds_of_calls(calls: Iterable[Call], state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the kind of each tensor that the calls use, by its qualified name, in the order of first use.

    The first use of a weight counts. A weight that is computed from tensors alone goes by the largest parameter of
    them, as in `constants.compute_weights`; the others are then no tensors of their own.

    >>> calls = [Call("mul.Tensor", {"self": Value("w"), "other": Value("mask")}, ("masked",)),
    ...          Call("linear.default", {"input": Value("x"), "weight": Value("masked")}, ("y",)),
    ...          Call("add.Tensor", {"self": Value("y"), "other": Value("table")}, ("z",))]
    >>> kinds_of_calls(calls, {name: Tensor(name, (2, 3)) for name in ("w", "mask", "table")})
    {'w': 'linear', 'mask': 'other', 'table': 'parameter'}
    """
    calls = list(calls)
    fixed, computed = _fixed_values(calls, state)
    running = [call for call in calls if not call.outputs or not all(name in fixed for name in call.outputs)]
    handing_on = [call for call in calls if call.outputs and all(name in fixed for name in call.outputs)]
    found: dict[str, str] = {}
    for call in running:
        for first, *others in (fixed[value.name] for value in call.all_values() if value.name in fixed):
            found[first.name] = kind_without_layer(first.shape) if first.is_float else "other"
            for tensor in others:
                found.setdefault(tensor.name, "other")
    kinds: dict[str, str] = {}
    given = {**state, **{name: fixed[name][0] for name in computed}}
    for use in weight_uses([c for c in handing_on if c.outputs[0] not in computed] + running, given):
        kinds.setdefault(use.weight, use.kind)
    return kinds | {name: kind for name, kind in found.items() if name not in kinds}


def _fixed_values(calls: Iterable[Call], state: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, ...]], set[str]]:
    """Return the values that depend on the state alone, and those among them that are no part or view of a tensor.

    Returns:
        The tensors that each value depends on by its name, the largest float parameter first; and names.
    """
    fixed: dict[str, tuple[Tensor, ...]] = {name: (tensor,) for name, tensor in state.items()}
    computed: set[str] = set()
    for call in calls:
        given = call.all_values()
        if not given or any(value.name not in fixed for value in given):
            continue
        row = operator(call.operator)
        sources = {tensor.name: tensor for value in given for tensor in fixed[value.name]}.values()
        largest_first = tuple(sorted(sources, key=lambda t: (not t.is_float, not t.is_parameter, -math.prod(t.shape))))
        fixed |= dict.fromkeys(call.outputs, largest_first[:_MOST_SOURCES])
        if given[0].name in computed or not (row.hands_on or (row.transposes and given[0].rank in (None, 2))):
            computed.update(call.outputs)
    return fixed, computed
