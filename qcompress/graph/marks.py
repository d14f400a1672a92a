"""Marks: the operator `qcompress::site`, which does nothing, marks every quantized activation in the graph.

Calibration, the fake-quantized reference and the ONNX graph all read these marks, so they quantize the same values.
"""

import operator
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node

from qcompress.artifacts import SiteGrid
from qcompress.errors import ConfigError, QCompressError
from qcompress.graph.conversion import to_numpy, to_torch
from qcompress.graph.layers import data_input, layers, named_uses, pads
from qcompress.graph.nodes import moves, row_of
from qcompress.graph.program import (
    Arrays,
    FloatProgram,
    copy_graph,
    is_float_activation,
    rebuild,
    state_nodes,
    tensor_of,
    user_inputs,
)
from qcompress.graph.sites import OUTPUT

_OPERATORS: Any = torch.library.Library("qcompress", "FRAGMENT")  # type: ignore[no-untyped-call]
if not hasattr(torch.ops.qcompress, "site"):  # torch keeps operators for the life of the process
    _OPERATORS.define("site(Tensor x, int index) -> Tensor")
    _OPERATORS.impl("site", lambda x, index: x.clone(), "CompositeExplicitAutograd")
site_op: Final = torch.ops.qcompress.site.default


def mark(program: FloatProgram, sites: Iterable[tuple[str, int]]) -> FloatProgram:
    """Return the program with `qcompress::site(x, i)` at the value of site i, and behind each move of that value.

    Args:
        program: the program in which the sites were found.
        sites: their keys.

    Raises:
        ConfigError: the program has no such site.
    """
    module = copy_graph(program.exported)
    nodes = {n.name: n for n in module.graph.nodes}
    for own, node in zip(program.input_names, user_inputs(program.exported), strict=True):
        nodes[own] = nodes[node.name]
    uses = {name: nodes[use.node.name] for name, use in named_uses(program).items()}
    state = {nodes[node.name] for node in state_nodes(program.exported)}
    last_input = [n for n in module.graph.nodes if n.op == "placeholder"][-1]

    def insert(after: Node, index: int, users: Callable[[Node], bool]) -> None:
        with module.graph.inserting_after(last_input if after.op == "placeholder" else after):
            marked = module.graph.call_function(site_op, (after, index))
        marked.meta["val"] = after.meta["val"]
        after.replace_all_uses_with(marked, delete_user_cb=lambda user: user is not marked and users(user))

    for index, (name, kind) in sorted(enumerate(sites), key=lambda entry: entry[1][1]):  # values before inputs
        table = nodes if kind == OUTPUT else uses
        if name not in table or (kind == OUTPUT and not is_float_activation(nodes[name])):
            raise ConfigError(
                f"No activation {name!r} in this model: the activation grids belong to a different model."
            )
        if kind == OUTPUT:
            for node in _places(nodes[name], state):
                given = node.op == "placeholder"  # as an output of the program it stays what it is
                insert(node, index, lambda user, given=given: not (given and user.op == "output"))  # type: ignore[misc]
        else:
            layer = uses[name]
            insert(data_input(layer), index, lambda user, layer=layer: user is layer)  # type: ignore[misc]
    module.graph.lint()
    module.recompile()
    return replace(program, exported=rebuild(program.exported, module=module))


def input_sites(marked: FloatProgram) -> dict[str, int]:
    """Return the site of each layer's input, by the layer's weight; further uses of a weight by their nodes.

    Args:
        marked: from `mark`.
    """
    state = state_nodes(marked.exported)
    found = {}
    for name, use in named_uses(marked).items():
        value = data_input(use.node)
        while moves(value, state):
            value = value.args[0]  # type: ignore[assignment]
        if value.target is site_op:
            index = value.args[1]
            assert isinstance(index, int)
            found[name] = index
    return found


def padded_inputs(marked: FloatProgram) -> set[int]:
    """Return the sites of the program's inputs that only layers use which pad them with zeros.

    Such a layer computes in float if the offset of its input is free.

    Args:
        marked: from `mark`.
    """
    padded = {use.node for use in layers(marked) if pads(use.node)}
    given = user_inputs(marked.exported)
    sites = [node for node in marked.exported.graph.nodes if node.target is site_op and node.args[0] in given]
    return {node.args[1] for node in sites if node.users and padded.issuperset(node.users)}


def output_layers(marked: FloatProgram) -> dict[int, str]:
    """Return the weight of the layer whose output each site quantizes; sites that follow no layer are left out."""
    behind = {use.node: use.weight for use in layers(marked)}
    found: dict[int, str] = {}
    for node in marked.exported.graph.nodes:
        if node.target is site_op and node.args[1] not in found:
            value = node.args[0]
            while value not in behind and _keeps_order(value):
                value = value.args[0]
            if value in behind:
                found[node.args[1]] = behind[value]
    return found


def _keeps_order(node: Node) -> bool:
    """Return whether a value is its first argument clamped, moved, or a part of it."""
    row = row_of(node)
    return row.clamps or row.moves or node.target is operator.getitem


def _places(root: Node, state: Container[Node]) -> list[Node]:
    """Return a value and its moved copies; a padded value is not one of them, since its zeros are new."""
    found = [] if row_of(root).splits else [root]
    for user in root.users:
        if moves(user, state) and user.args[0] is root and not row_of(user).pads:
            found += _places(user, state)
    return found


Visit = Callable[[int, npt.NDArray[np.float32], bool], npt.NDArray[np.float32]]


def rounding(grids: Sequence[SiteGrid]) -> Visit:
    """Return the visitor that rounds each site's value to its grid, at the site's first mark.

    Args:
        grids: one for each site, in the order of their indices.
    """

    def visit(index: int, value: npt.NDArray[np.float32], first: bool) -> npt.NDArray[np.float32]:
        return grids[index].dequantize(grids[index].quantize(value)) if first else value

    return visit


class MarkedRunner:
    """Runs a marked program and lets a visitor see and replace the value at each mark.

    Args:
        program: from `mark`.
        device: `cpu` or `cuda`.
    """

    def __init__(self, program: FloatProgram, device: str = "cpu") -> None:
        self.program, self._device = program, device
        exported = program.exported
        by_name = {s.arg.name: s for s in exported.graph_signature.input_specs}
        state = state_nodes(exported)
        self._state = [
            tensor_of(exported, by_name[n.name]).detach().to(device) if n in state else None
            for n in exported.graph.nodes
            if n.op == "placeholder"
        ]

    def __call__(self, arrays: Arrays, visit: Visit) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs of one batch by name.

        Args:
            arrays: inputs by name.
            visit: (index of the site, value, whether this is the site's first mark) -> the value to go on with.
        """
        inputs = iter(self.program.bind(arrays))
        flat = [to_torch(next(inputs)).to(self._device) if s is None else s for s in self._state]
        visiting = _Visiting(self.program.exported, visit)
        try:
            with torch.no_grad():
                out = visiting.run(*flat)
        except Exception:
            if visiting.refused is not None:  # with its own message: the interpreter adds the graph's node to it
                raise type(visiting.refused)(visiting.message) from None
            raise
        return {n: to_numpy(t) for n, t in zip(self.program.output_names, out, strict=True)}


class _Visiting(Interpreter):
    def __init__(self, exported: ExportedProgram, visit: Visit) -> None:
        super().__init__(exported.graph_module)
        self._visit, self._seen = visit, set[int]()
        self.refused: QCompressError | None = None
        self.message = ""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Hand the value at a mark to the visitor; run any other operator."""
        if target is not site_op:
            return super().call_function(target, args, kwargs)
        value, index = args
        first = index not in self._seen
        self._seen.add(index)
        try:
            seen = self._visit(index, to_numpy(value), first)
        except QCompressError as e:
            self.refused, self.message = e, str(e)
            raise
        return torch.empty_like(value).copy_(to_torch(seen))
