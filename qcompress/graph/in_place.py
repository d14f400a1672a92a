"""A graph without writes: every in-place operator becomes the one that computes the same and returns a new value.

In a traced graph, later nodes read the result of an in-place operator. So its functional twin can take its place, under
the same name, unless something still reads the old value or shares its memory: a view taken before the write, or the
value behind a written view. Then torch's own functionalization rewrites the whole graph.
"""

import itertools
from typing import Any, Final

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Graph, Node

from qcompress.graph.nodes import operator_name, row_of
from qcompress.graph.operators import OPERATORS, functional_name
from qcompress.graph.program import copy_graph, rebuild
from qcompress.graph.quiet import quiet_torch

_MUTATIONS: Final = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION, OutputKind.USER_INPUT_MUTATION)


def out_of_place(exported: ExportedProgram) -> ExportedProgram:
    """Return the same program without in-place operators; its writes to inputs and buffers are dropped.

    Args:
        exported: not modified. Nodes keep their names and their order unless functionalization has to rewrite them.
    """
    if any(_writes(node) for node in exported.graph.nodes):
        module = copy_graph(exported)
        if _replaced(module.graph):
            module.graph.lint()
            module.recompile()
            exported = rebuild(exported, module=module)
        else:
            exported = _functionalized(exported)
    return without_mutations(exported)


def _functionalized(exported: ExportedProgram) -> ExportedProgram:
    module = copy_graph(exported)
    for node in list(module.graph.nodes):
        if row_of(node).drops:  # outside of training it returns its very input, of which torch takes no account
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.recompile()
    with quiet_torch():
        functional: ExportedProgram = rebuild(exported, module=module).run_decompositions({})
    return functional


def _replaced(graph: Graph) -> bool:
    """Put the twin in the place of each in-place operator; returns False at the first one that must not be replaced."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    shared: dict[Node, set[Node]] = {}  # by node: all nodes that may hold the same memory, itself included
    for node in graph.nodes:
        if _writes(node):
            twin, target = _twin(node), node.args[0] if node.args else None
            if twin is None or not isinstance(target, Node) or not _keeps_dtype(node, target):
                return False
            readers = {user for value in shared[target] for user in value.users}
            if any(position[reader] > position[node] for reader in readers):
                return False
            node.target = twin
        shared[node] = {node}
        for value in _sources(node):
            shared[node] |= shared[value]
        for value in shared[node]:
            shared[value] = shared[node]
    return True


def _writes(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _twin(node: Node) -> OpOverload | None:
    """Return the operator that computes the same as an in-place one and writes to no argument, if there is one."""
    name = functional_name(operator_name(node))
    if name is None:
        return None
    head, _, overload = name.partition(".")
    found = getattr(getattr(torch.ops.aten, head, None), overload, None)
    return found if isinstance(found, OpOverload) and not found._schema.is_mutable else None


def _keeps_dtype(node: Node, target: Node) -> bool:
    """Return whether the twin has the dtype of the written value, and not a wider one of another argument."""
    dtypes = [v.dtype for n in node.all_input_nodes if isinstance(v := n.meta.get("val"), torch.Tensor)]
    own = target.meta["val"].dtype
    return all(torch.promote_types(own, dtype) == own for dtype in dtypes)


def _sources(node: Node) -> list[Node]:
    """Return the inputs of a node whose memory its result may share."""
    if node.op == "placeholder" or not _holds_tensors(node.meta.get("val")):
        return []
    name = operator_name(node)
    if not isinstance(node.target, OpOverload):
        return node.all_input_nodes
    schema = node.target._schema
    if any(returned.alias_info is not None for returned in schema.returns):
        given = {**dict(zip((a.name for a in schema.arguments), node.args, strict=False)), **node.kwargs}
        return [v for a in schema.arguments if a.alias_info and isinstance(v := given.get(a.name), Node)]
    if name in OPERATORS and OPERATORS[name].is_fresh:
        return []
    # Operators that are composed of others may return an input or a view of it, whatever their schema says.
    composite = node.target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return node.all_input_nodes if composite else []


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor | list | tuple)


def without_mutations(exported: ExportedProgram) -> ExportedProgram:
    """Return the same program without the outputs that hand back new values of its inputs and buffers."""
    specs = exported.graph_signature.output_specs
    kept = [spec.kind not in _MUTATIONS for spec in specs]
    if all(kept):
        return exported
    module = copy_graph(exported)
    output = module.graph.output_node()
    returned: Any = output.args[0]
    output.args = (tuple(itertools.compress(returned, kept)),)
    module.recompile()
    return rebuild(exported, module=module, outputs=list(itertools.compress(specs, kept)))
