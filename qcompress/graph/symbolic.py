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
from torch.nn.utils.parametrize import ParametrizationList

from qcompress.graph.module_types import computed_by_hook, parameter_call
from qcompress.graph.nodes import as_value, operator_name
from qcompress.graph.operators import OPERATORS
from qcompress.graph.quiet import quiet_torch
from qcompress.graph.weights import Call, Tensor, Value, kinds_of_calls
from qcompress.kinds import LAYER_WEIGHT_KINDS

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
        by_type = kinds_of_calls(_calls_by_type(module, ""), _by_type(state))
        known = {name: kind for name, kind in by_type.items() if kind in LAYER_WEIGHT_KINDS}
        kinds = by_type
        for prefix, part in module.named_modules():
            path = f"{prefix}." if prefix else ""
            own = [path + name for name, value in part.named_parameters(recurse=False) if value.ndim > 1]
            if any(state[name].name not in known for name in own):
                guesses = (_traced_kinds(part, path, state, branch) for branch in (None, False, True))
                kinds = {**kinds, **next((found for found in guesses if found is not None), {}), **known}
    return {name: kinds.get(tensor.name, "other") for name, tensor in state.items()}


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by each of their names: module by module, parameters before buffers."""
    found: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        for listing in (part.named_parameters, part.named_buffers):
            for name, value in listing(prefix, recurse=False, remove_duplicate=False):
                is_float, is_parameter = value.is_floating_point(), isinstance(value, nn.Parameter)
                found[name] = Tensor(first.setdefault(id(value), name), tuple(value.shape), is_float, is_parameter)
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
            part, own = module.get_submodule(str(node.target)), f"{path}{node.target}."
            if isinstance(part, ParametrizationList):
                yield Call("", {source: Value(f"{_MARK}{own}{source}") for source in _tensors(part)}, (node.name,))
            yield from _calls_by_type(part, own)
        if node.op not in ("call_function", "call_method"):
            continue
        name = _operator_of(node)
        order = _OTHER_ORDER.get(node.target) or _argument_names(name)
        positions = [str(i) for i in range(len(node.args))]
        given = {**dict(zip([*order, *positions[len(order) :]], node.args, strict=False)), **node.kwargs}
        yield Call(name, {key: as_value(argument) for key, argument in given.items()}, (node.name,))


def _operator_of(node: fx.Node) -> str:
    """Return the operator that a call of a symbolic trace represents; empty if it is not in the table."""
    if node.op == "call_method":
        name = str(node.target)
    elif isinstance(node.target, OpOverload):
        return operator_name(node)
    elif node.target is getattr:
        name = str(node.args[1])
    else:
        name = getattr(node.target, "__name__", "")
    if node.target is python.getitem and not _is_basic(node.args[1]):
        return ""
    return _OVERLOADS.get(_OTHER_NAMES.get(name, name), "")


def _is_basic(index: Any) -> bool:
    """Return whether indexing returns a view: by numbers, slices, None and ellipses, not by tensors or lists."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is ... or isinstance(part, int | slice) for part in parts)


def _argument_names(name: str) -> tuple[str, ...]:
    head, _, overload = name.partition(".")
    found = getattr(getattr(torch.ops.aten, head, None), overload, None)
    if isinstance(found, OpOverload):
        return tuple(a.name for a in found._schema.arguments)
    return ("self", "item") if name == "getitem" else ()


def _by_type(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by their names in `_calls_by_type`."""
    return {_MARK + name: tensor for name, tensor in state.items()}


def _calls_by_type(module: nn.Module, path: str) -> Iterator[Call]:
    """Yield the calls of a module and of all in it, judged by their types."""
    for prefix, part in module.named_modules():
        if isinstance(part, ParametrizationList):
            continue
        own = f"{path}{prefix}." if prefix else path
        sources, ranks = _computed_parameters(part)
        for name, names in sources.items():  # by no operator of the table
            given = {source: Value(f"{_MARK}{own}{source}") for source in names}
            yield Call("", given, (f"{_MARK}{own}{name}",))
        for name, rank in ranks.items():
            value = Value(f"{_MARK}{own}{name}", rank)
            yield parameter_call(vars(part), name, value) or Call("", {name: value}, ())


def _tensors(part: nn.Module) -> dict[str, torch.Tensor]:
    return dict(part.named_parameters()) | dict(part.named_buffers())


def _computed_parameters(part: nn.Module) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Return the tensors that parameters of a module are computed from before it runs, and all parameters' ranks."""
    ranks = {name: value.ndim for name, value in part.named_parameters(recurse=False)}
    sources: dict[str, list[str]] = {}
    for name, parametrization in getattr(part, "parametrizations", {}).items():
        tensors = _tensors(parametrization)
        sources[name] = [f"parametrizations.{name}.{source}" for source in tensors]
        ranks[name] = max(value.ndim for value in tensors.values())
    buffers = [name for name, _ in part.named_buffers(recurse=False)]
    for held in [*ranks]:
        if (name := computed_by_hook(held, ranks)) is not None:
            sources[name] = [n for n in (*ranks, *buffers) if n.startswith(f"{name}_")]
            ranks[name] = ranks.pop(held)
    return sources, ranks
