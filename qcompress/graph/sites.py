"""The activations that are quantized: one function serves post-hoc export, training and parity.

A site is a value of the float program. Its place follows from what onnxruntime computes in integers; its grid is chosen
elsewhere. An operator that does nothing, `qcompress::site`, marks the sites in the graph, so that calibration, the
fake-quantized reference and the ONNX graph quantize the same values.
"""

import operator
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node

from qcompress.artifacts import SiteGrid
from qcompress.errors import ConfigError, QCompressError
from qcompress.graph.conversion import to_numpy, to_torch
from qcompress.graph.layers import Layer, data_input, layers
from qcompress.graph.nodes import arguments, row_of
from qcompress.graph.program import (
    Arrays,
    FloatProgram,
    copy_graph,
    rebuild,
    state_nodes,
    tensor_of,
    user_inputs,
    value_of,
)

Placement = Literal["deploy", "paper"]
PLACEMENTS: Final[tuple[Placement, ...]] = ("deploy", "paper")
OUTPUT: Final = -1  # index of a site that is a value itself; 0: the input of a layer

_OPERATORS: Any = torch.library.Library("qcompress", "FRAGMENT")  # type: ignore[no-untyped-call]
if not hasattr(torch.ops.qcompress, "site"):  # torch keeps operators for the life of the process
    _OPERATORS.define("site(Tensor x, int index) -> Tensor")
    _OPERATORS.impl("site", lambda x, index: x.clone(), "CompositeExplicitAutograd")
site_op: Final = torch.ops.qcompress.site.default

# Kinds of layers that have a site at their input, and those that have one at their output.
LAYER_KINDS: Final = ("conv", "depthwise", "conv_transpose", "linear")
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
    program: FloatProgram, activation_bits: Mapping[str, int], placement: Placement = "deploy"
) -> tuple[Site, ...]:
    """Return the values of a program that are quantized, in the order in which the graph computes them.

    Args:
        program: with BatchNorm folded.
        activation_bits: bits of each layer's input, by the qualified name of its weight; all other layers take float
            activations.
        placement: `deploy`: everything that onnxruntime fuses: inputs of layers, outputs of convolutions, and, at 8
            bits, operands and outputs of the sums, products, poolings and concatenations in between. `paper`: inputs
            of layers only.

    Returns:
        Sites. A value that only layers of one width take has that width; any other has 8 bits. Operands of sums keep 8,
        and at `deploy` a value has one grid for all its users: a second quantizer costs more time than fewer bits save.
        At `paper`, each layer quantizes such a value for itself.

    Raises:
        ConfigError: the placement is unknown.
    """
    if placement not in PLACEMENTS:
        raise ConfigError(f"placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}.")
    return _Finder(program, activation_bits, placement).sites()


def layer_input_sites(program: FloatProgram, weights: Iterable[str]) -> tuple[Site, ...]:
    """Return a site of 8 bits at the input of each named layer: `dynamic8` quantizes there at run time."""
    wanted = set(weights)
    return tuple(Site(name, 0, 8) for name, use in _uses(program).items() if use.weight in wanted)


class _Finder:
    """The state of one search; see `activation_sites`."""

    def __init__(self, program: FloatProgram, activation_bits: Mapping[str, int], placement: Placement) -> None:
        self.exported = program.exported
        self.bits = activation_bits
        self.paper = placement == "paper"
        self.state = state_nodes(program.exported)
        self.names = dict(zip((s.name for s in user_inputs(program.exported)), program.input_names, strict=True))
        self.uses = {use.node: name for name, use in _uses(program).items()}
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
        return _moves(user, self.state) and bool(user.users) and all(self._is_taken(u, root) for u in user.users)

    def _take(self, value: Node) -> Node:
        """Note that an operator takes a quantized value; returns its root."""
        root = self._root(value)
        self.moved.setdefault(root, []).append(value)
        return root

    def _give(self, node: Node) -> None:
        """Note that an operator's output is quantized, behind the clamps that a quantizer absorbs."""
        while len(node.users) == 1 and row_of(user := next(iter(node.users))).clamps and user.args[0] is node:
            node = user
        self._take(node)

    def _operands(self, node: Node) -> list[Node]:
        """Return an operator's activations if onnxruntime computes it in integers and one of them is quantized."""
        row = row_of(node)
        candidates: Sequence[Any] = ()
        if row.sums and not node.kwargs:
            candidates = node.args
        elif row.pools or (row.averages and _is_spatial(node)):
            candidates = node.args[:1]
        elif row.joins:
            candidates = node.args[0]  # type: ignore[assignment]
        operands = [a for a in candidates if isinstance(a, Node)]
        if len(operands) < len(candidates) or not all(_is_float(a) and a not in self.state for a in operands):
            return []
        return operands if any(self._root(a) in self.moved for a in operands) else []

    def _root(self, value: Node) -> Node:
        while _moves(value, self.state):
            value = value.args[0]  # type: ignore[assignment]
        return value


def _moves(node: Node, state: Container[Node]) -> bool:
    """Return whether a node moves the values of an activation and changes none; it may add zeros."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node) or node.args[0] in state:
        return False
    row = row_of(node)
    if node.target is operator.getitem:
        return row_of(node.args[0]).splits and _moves(node.args[0], state)
    if row.pads:
        given = arguments(node)
        return given.get("mode", "constant") == "constant" and not given.get("value") and not node.kwargs
    return row.moves


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
    uses = {name: nodes[use.node.name] for name, use in _uses(program).items()}
    state = {nodes[node.name] for node in state_nodes(program.exported)}
    last_input = [n for n in module.graph.nodes if n.op == "placeholder"][-1]

    def insert(after: Node, index: int, users: Callable[[Node], bool]) -> None:
        with module.graph.inserting_after(last_input if after.op == "placeholder" else after):
            marked = module.graph.call_function(site_op, (after, index))
        marked.meta["val"] = after.meta["val"]
        after.replace_all_uses_with(marked, delete_user_cb=lambda user: user is not marked and users(user))

    for index, (name, kind) in sorted(enumerate(sites), key=lambda entry: entry[1][1]):  # values before inputs
        table = nodes if kind == OUTPUT else uses
        if name not in table or (kind == OUTPUT and not _is_float(nodes[name])):
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
    for name, use in _uses(marked).items():
        value = data_input(use.node)
        while _moves(value, state):
            value = value.args[0]  # type: ignore[assignment]
        if value.target is site_op:
            index = value.args[1]
            assert isinstance(index, int)
            found[name] = index
    return found


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
    """Return a value and all that it is moved to; a padded value is not one of them, since its zeros are new."""
    found = [] if row_of(root).splits else [root]
    for user in root.users:
        if _moves(user, state) and user.args[0] is root and not row_of(user).pads:
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


def _uses(program: FloatProgram) -> dict[str, Layer]:
    """Return every use of a weight in LAYER_KINDS by the weight's name; further uses of one by their nodes' names."""
    found: dict[str, Layer] = {}
    for use in layers(program):
        if use.kind in LAYER_KINDS:
            found[use.node.name if use.weight in found else use.weight] = use
    return found


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.ndim > 0


def _is_spatial(node: Node) -> bool:
    """Return whether a mean is over all axes of an image but batch and channels."""
    value = value_of(node.args[0])  # type: ignore[arg-type]
    axes = node.args[1]
    if not isinstance(axes, Sequence) or value.ndim not in (3, 4):
        return False
    return {a % value.ndim for a in axes if isinstance(a, int)} == set(range(2, value.ndim))
