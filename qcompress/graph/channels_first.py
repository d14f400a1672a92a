"""Weights of grouped transposed convolutions with their output channels as the first axis.

Such a weight is [in, out / groups, ...]: no axis of it counts output channels, which are (group, out / groups).
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from qcompress.graph.layers import layers
from qcompress.graph.nodes import arguments, operator_name, row_of
from qcompress.graph.program import FloatProgram, copy_graph, rebuild, state_nodes


def channels_first(program: FloatProgram, weights: Collection[str]) -> FloatProgram:
    """Return a program that stores some weights of grouped transposed convolutions as [out, in / groups, ...].

    The graph brings them into the form that the operator takes. Weights with further uses, and constants,
    stay as they are.

    Args:
        program: not modified.
        weights: qualified names.
    """
    exported = program.exported
    names = {name: node for node, name in state_nodes(exported).items()}
    found: dict[Node, tuple[str, int]] = {}
    for layer in layers(program):
        groups = arguments(layer.node).get("groups", 1)
        weight = names[layer.weight]
        if (
            layer.kind == "conv_transpose"
            and layer.weight in weights
            and groups > 1
            and layer.weight in exported.state_dict
            and [*weight.users] == [layer.node]
        ):
            found[weight] = layer.weight, groups
    if not found:
        return program
    module, state = copy_graph(exported), dict(exported.state_dict)
    copies = dict(zip(exported.graph.nodes, module.graph.nodes, strict=True))
    for weight, (name, groups) in found.items():
        placeholder, (layer_node,) = copies[weight], copies[weight].users
        stored, steps = _moved(state[name], groups)
        placeholder.meta["val"] = weight.meta["val"].new_empty(stored.shape)
        value = placeholder
        with module.graph.inserting_before(layer_node):
            for operator, *given in steps:
                node = module.graph.call_function(operator, (value, *given))
                node.meta["val"] = operator(value.meta["val"], *given)
                value = node
        layer_node.replace_input_with(placeholder, value)
        state[name] = torch.nn.Parameter(stored, False)
    module.graph.lint()
    module.recompile()
    return replace(program, exported=rebuild(exported, module=module, state=state))


def stored_channels_first(program: FloatProgram) -> list[str]:
    """Return the weights that `channels_first` has moved."""
    found = []
    for node, name in state_nodes(program.exported).items():
        users = [node]
        for operator in ("view.default", "permute.default", "reshape.default"):
            users = [u for user in users for u in user.users if operator_name(u) == operator]
        layers = [
            u for user in users for u in user.users if (layer := row_of(u).layer) and layer.kind == "conv_transpose"
        ]
        if any(arguments(layer).get("groups", 1) > 1 for layer in layers):
            found.append(name)
    return found


def _moved(weight: torch.Tensor, groups: int) -> tuple[torch.Tensor, list[tuple[Any, ...]]]:
    """Return the weight as [out, in / groups, ...], and the calls that undo this."""
    inputs, outputs, *kernel = weight.shape
    order = [0, 2, 1, *range(3, 3 + len(kernel))]
    grouped = weight.detach().reshape(groups, inputs // groups, outputs, *kernel)
    stored = grouped.permute(order).reshape(groups * outputs, inputs // groups, *kernel).contiguous()
    aten = torch.ops.aten
    return stored, [
        (aten.view.default, [groups, outputs, inputs // groups, *kernel]),
        (aten.permute.default, order),
        (aten.reshape.default, [inputs, outputs, *kernel]),
    ]
