"""Weights that are computed from the model's own tensors alone: masked, normalized, scaled, joined, updated.

They are computed once, so that what a layer takes is a tensor of the program, which can be compressed.
"""

import operator as python
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from qcompress.graph.nodes import row_of
from qcompress.graph.program import copy_graph, rebuild, state_nodes, tensor_of


def compute_weights(exported: ExportedProgram) -> ExportedProgram:
    """Return a program in which tensors take the place of what is computed from its state alone.

    Such a value takes the place of the largest float parameter that it is computed from (or else float buffer), under
    its name. It stays an operator where it would take more memory than the tensors that nothing else uses.

    Args:
        exported: without in-place operators. Tensors that it no longer needs stay, without users.
    """
    state, tensors = _state(exported)
    replaced = _replaced(exported.graph, tensors)
    if not replaced:
        return exported
    fixed, values = _fixed(exported.graph, tensors), _computed(exported.graph, replaced.values(), tensors)
    module = copy_graph(exported)
    copies = dict(zip(exported.graph.nodes, module.graph.nodes, strict=True))
    parameters, constants = dict(exported.state_dict), dict(exported.constants)
    for owner, root in replaced.items():
        copies[owner].meta["val"] = root.meta["val"]
        copies[root].replace_all_uses_with(copies[owner])
        name, value = state[owner], values[root].contiguous().clone()
        home = parameters if name in parameters else constants
        home[name] = torch.nn.Parameter(value, False) if isinstance(home[name], torch.nn.Parameter) else value
    for node in reversed(fixed):  # checks of what is computed no more would keep its tensors
        if copies[node].op != "placeholder" and not copies[node].users:
            module.graph.erase_node(copies[node])
    module.recompile()
    return rebuild(exported, module=module, state=parameters, constants=constants)


def uncomputed(exported: ExportedProgram) -> list[str]:
    """Return the names under which `compute_weights` would put tensors in the place of what is computed."""
    state, tensors = _state(exported)
    return [state[owner] for owner in _replaced(exported.graph, tensors)]


def _state(exported: ExportedProgram) -> tuple[dict[Node, str], dict[Node, torch.Tensor]]:
    """Return names and tensors of the state, by their nodes."""
    state = state_nodes(exported)
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    return state, {node: tensor_of(exported, specs[node.name]) for node in state}


def _replaced(graph: Graph, state: Mapping[Node, torch.Tensor]) -> dict[Node, Node]:
    """Return the values that tensors take the place of, by the state whose place they take."""
    fixed = _fixed(graph, state)
    used = {node: _whole(node, fixed) for node in fixed if any(user not in fixed for user in node.users)}
    roots = [node for node in dict.fromkeys(used.values()) if node not in state]
    behind = _behind(fixed, {*roots})
    users: dict[Node, set[Node]] = {node: set() for node in state}
    for node, whole in used.items():
        is_returned = any(user.op == "output" for user in node.users)
        for leaf in {whole} if whole in state else behind[whole]:
            users.setdefault(leaf, set()).add(node if is_returned else whole)
    found = {}
    for root in roots:
        freed = [leaf for leaf in behind[root] if users[leaf] == {root} and leaf in state]
        floats = [leaf for leaf in freed if state[leaf].is_floating_point()]
        value = root.meta["val"]
        if not (floats and isinstance(value, torch.Tensor) and value.is_floating_point()):
            continue
        if value.nbytes <= sum(state[leaf].nbytes for leaf in freed):
            found[max(floats, key=lambda leaf: (isinstance(state[leaf], torch.nn.Parameter), state[leaf].numel()))] = (
                root
            )
    return found


def _fixed(graph: Graph, state: Collection[Node]) -> dict[Node, None]:
    """Return the nodes that depend on the state alone, in the order in which the graph runs them."""
    fixed: dict[Node, None] = {}
    for node in graph.nodes:
        if node in state or (_is_deterministic(node) and all(n in fixed for n in node.all_input_nodes)):
            fixed[node] = None
    return fixed


def _is_deterministic(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if isinstance(node.target, OpOverload):
        return torch.Tag.nondeterministic_seeded not in node.target.tags
    return node.target is python.getitem


def _whole(node: Node, fixed: Collection[Node]) -> Node:
    """Return the tensor that a value is a part or a view of, as far as layers see through that; else the value."""
    whole = node
    while node.op == "call_function":
        first, row = node.all_input_nodes[:1], row_of(node)
        if not first or not (row.hands_on or (row.transposes and node.meta["val"].ndim == 2)):
            break
        node = first[0]
        whole = node if isinstance(node.meta["val"], torch.Tensor) else whole
    return whole


def _behind(fixed: Iterable[Node], roots: Collection[Node]) -> dict[Node, dict[Node, None]]:
    """Return the state and the roots that each node depends on; one root is not looked through for another."""
    found: dict[Node, dict[Node, None]] = {}
    for node in fixed:
        found[node] = {node: None} if node.op == "placeholder" else {}
        for given in node.all_input_nodes:
            found[node] |= {given: None} if given in roots else found[given]
    return found


def _computed(graph: Graph, roots: Iterable[Node], state: Mapping[Node, torch.Tensor]) -> dict[Node, torch.Tensor]:
    """Return the values of some nodes, and of those behind them."""
    needed = {*roots}
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    values: dict[Node, Any] = dict(state)
    with torch.no_grad():
        for node in graph.nodes:
            if node in needed and node not in state:
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
    return values
