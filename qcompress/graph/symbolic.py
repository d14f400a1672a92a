"""Kinds of a module's weights without an example input: its forward is run on symbols, which have no values.

Where a forward branches on values or shapes, that fails. Then the types of the layers decide, and each module that
holds further parameters is traced by itself, if need be with a guess which way it branches.
"""

import copy
import inspect
import operator as python
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.fx.node import map_arg
from torch.nn import functional

from qcompress.graph.module_types import parameter_call
from qcompress.graph.nodes import as_value, operator_name
from qcompress.graph.operators import OPERATORS
from qcompress.graph.quiet import quiet_torch
from qcompress.graph.weights import Call, Tensor, Value, kinds_of_calls

# The overload that represents all overloads of an operator: a symbol has no dtype or shape to choose by.
_OVERLOADS: Final[Mapping[str, str]] = {name.partition(".")[0]: name for name in reversed(list(OPERATORS))}
# Methods and attributes that are an operator of another name.
_OTHER_NAMES: Final[Mapping[str, str]] = {"T": "numpy_T", "float": "to"}
# Functions that order their arguments in another way than the operator.
_OTHER_ORDER: Final[Mapping[Any, tuple[str, ...]]] = {
    functional.embedding: ("indices", "weight"),
    functional.embedding_bag: ("indices", "weight"),
}

_MOST_GUESSES: Final = 1000
_MARK: Final = "."  # tells qualified names from the names of nodes, which may be equal


def kinds_of(module: nn.Module) -> dict[str, str]:
    """Return the kind of every parameter and buffer by its qualified name, each name of a tied one included.

    Args:
        module: not modified; its forward is run on symbols, in eval mode.

    >>> kinds_of(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Linear(4, 2)))["0.weight"]
    'depthwise'
    """
    state = _state(module)
    kinds = _traced_kinds(module, "", state)
    if kinds is None:
        kinds = kinds_of_calls(_calls_by_type(module, ""), _by_type(state))
        for prefix, part in module.named_modules():
            path = f"{prefix}." if prefix else ""
            own = [path + name for name, value in part.named_parameters(recurse=False) if value.ndim > 1]
            if any(state[name].name not in kinds for name in own):
                guesses = (_traced_kinds(part, path, state, branch) for branch in (None, False, True))
                kinds = {**next((found for found in guesses if found is not None), {}), **kinds}
    return {name: kinds.get(tensor.name, "other") for name, tensor in state.items()}


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by each of their names: module by module, parameters before buffers."""
    found: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        for listing in (part.named_parameters, part.named_buffers):
            for name, value in listing(prefix, recurse=False, remove_duplicate=False):
                found[name] = Tensor(first.setdefault(id(value), name), tuple(value.shape))
    return found


def _traced_kinds(
    module: nn.Module, path: str, state: Mapping[str, Tensor], branch: bool | None = None
) -> dict[str, str] | None:
    """Return the kinds of the weights that a module's forward uses; None if it cannot be run on symbols.

    Args:
        module: the model or a part of it.
        path: prefix of the names of its tensors in the model.
        state: the model's tensors.
        branch: assumed value of conditions on symbols; None if such a condition makes the trace fail.
    """
    try:
        shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
        own = copy.deepcopy(module, shared).eval()  # a forward may keep values in its module
        required = inspect.signature(own.forward).parameters.values()
        defaults = {p.name: p.default for p in required if isinstance(p.default, type(None) | bool | int | float | str)}
        with quiet_torch(), torch.no_grad():
            graph = _Tracer(own, branch).trace(own, defaults)
    except (Exception, SystemExit):  # whatever the forward does with symbols
        return None
    held = {n.name: state[path + n.target] for n in graph.nodes if n.op == "get_attr" and path + n.target in state}
    return kinds_of_calls(_calls(graph, own, path), {**_by_type(state), **held})


class _Tracer(fx.Tracer):
    """Traces a module, with known shapes for values that depend on its own tensors only."""

    proxy_buffer_attributes = True

    def __init__(self, module: nn.Module, branch: bool | None) -> None:
        super().__init__(param_shapes_constant=True)
        self._branch, self._guesses = branch, 0
        self._held = {name: t.to("meta") for name, t in (*module.named_parameters(), *module.named_buffers())}

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node that holds its value on the meta device, if that depends on no input."""
        node = super().create_node(*args, **kwargs)
        try:
            node.meta["val"] = self._value(node)
        except Exception:
            node.meta["val"] = None
        return node

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Iterate over the parts of a value whose number is known."""
        parts = obj.node.meta["val"]
        if not isinstance(parts, list | tuple):
            return super().iter(obj)
        return iter([obj[i] for i in range(len(parts))])  # type: ignore[index]

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Guess a condition; a loop that waits for another answer is given up."""
        self._guesses += 1
        if self._branch is None or self._guesses > _MOST_GUESSES:
            return super().to_bool(obj)
        return self._branch

    def _value(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self._held.get(str(node.target))
        if node.op not in ("call_function", "call_method") or any(n.meta["val"] is None for n in node.all_input_nodes):
            return None
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _calls(graph: fx.Graph, module: nn.Module, path: str) -> Iterator[Call]:
    """Yield the calls of a symbolic trace; those of layers that were not looked into, by their types."""
    for node in graph.nodes:
        if node.op == "call_module":
            yield from _calls_by_type(module.get_submodule(str(node.target)), f"{path}{node.target}.")
            continue
        name = _operator_of(node)
        if name is None:
            continue
        order = _OTHER_ORDER.get(node.target) or _argument_names(name)
        given = {**dict(zip(order, node.args, strict=False)), **node.kwargs}
        yield Call(name, {key: as_value(argument) for key, argument in given.items()}, (node.name,))


def _operator_of(node: fx.Node) -> str | None:
    """Return the operator that a node of a symbolic trace represents; None if it is not in the table."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op != "call_function":
        return None
    elif isinstance(node.target, OpOverload):
        return operator_name(node)
    elif node.target is getattr:
        name = str(node.args[1])
    else:
        name = getattr(node.target, "__name__", "")
    if node.target is python.getitem and not _is_basic(node.args[1]):
        return None
    return _OVERLOADS.get(_OTHER_NAMES.get(name, name))


def _is_basic(index: Any) -> bool:
    """Return whether indexing returns a view: by numbers, slices, None and ellipses, not by tensors or lists."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is ... or isinstance(part, int | slice) for part in parts)


def _argument_names(name: str) -> tuple[str, ...]:
    head, _, overload = name.partition(".")
    found = getattr(getattr(torch.ops.aten, head, None), overload, None)
    return tuple(a.name for a in found._schema.arguments) if isinstance(found, OpOverload) else ("self", "item")


def _by_type(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by their names in `_calls_by_type`."""
    return {_MARK + name: tensor for name, tensor in state.items()}


def _calls_by_type(module: nn.Module, path: str) -> Iterator[Call]:
    """Yield the calls of a module and of all in it, judged by their types."""
    for prefix, part in module.named_modules():
        for name, value in part.named_parameters(recurse=False):
            qualified = f"{path}{prefix}.{name}" if prefix else f"{path}{name}"
            call = parameter_call(vars(part), name, Value(_MARK + qualified, value.ndim))
            if call is not None:
                yield call
