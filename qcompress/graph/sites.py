"""Which activations are quantized: one function for post-hoc export, for training and for parity.

A site is a value of the float program. Where it stands is decided by what onnxruntime computes in integers; which grid
it gets is decided elsewhere. Sites are marked in the graph by an operator that does nothing, `qcompress::site`, so that
calibration, the fake-quantized reference and the ONNX graph all speak of the same values.
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
from qcompress.graph.layers import Layer, data_input, layers
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
from qcompress.graph.tensors import to_numpy, to_torch

aten = torch.ops.aten

Placement = Literal["deploy", "paper"]
PLACEMENTS: Final[tuple[Placement, ...]] = ("deploy", "paper")
OUTPUT: Final = -1  # index of a site that is a value itself; 0: the input of a layer

_OPERATORS: Any = torch.library.Library("qcompress", "FRAGMENT")  # type: ignore[no-untyped-call]
if not hasattr(torch.ops.qcompress, "site"):  # torch keeps operators for the life of the process
    _OPERATORS.define("site(Tensor x, int index) -> Tensor")
    _OPERATORS.impl("site", lambda x, index: x.clone(), "CompositeExplicitAutograd")
site_op: Final = torch.ops.qcompress.site.default

# Kinds of layers that have an input site; those with an output site of their own.
LAYER_KINDS: Final = ("conv", "depthwise", "conv_transpose", "linear")
_OUTPUT_KINDS: Final = ("conv", "depthwise", "conv_transpose")

# What a quantizer behind it absorbs: monotone clamps.
_CLAMPS: Final = (
    aten.relu.default, aten.relu_.default, aten.relu6.default, aten.relu6_.default, aten.hardtanh.default,
    aten.hardtanh_.default, aten.clamp.default, aten.clamp_.default, aten.clamp_min.default,
)  # fmt: skip
# What gives parts of a value, as a list.
_SPLITS: Final = (
    aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default,
)  # fmt: skip
# What moves values and changes none: its output is on its input's grid.
_MOVES: Final = (
    *_SPLITS,
    aten.slice.Tensor, aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.squeeze.dim,
    aten.squeeze.dims, aten.unsqueeze.default, aten.permute.default, aten.transpose.int, aten.t.default,
    aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.max_pool1d.default,
    aten.max_pool2d.default, aten.dropout.default, aten._unsafe_view.default, aten.feature_dropout.default,
    aten.unflatten.int, aten.expand.default, aten.select.int, aten.flip.default, aten.pixel_shuffle.default,
    aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec,
)  # fmt: skip
_PADS: Final = (aten.pad.default, aten.constant_pad_nd.default)
_SUMS: Final = (aten.add.Tensor, aten.add_.Tensor, aten.mul.Tensor, aten.mul_.Tensor)
_POOLS: Final = (
    aten.avg_pool1d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
)  # fmt: skip
_MEANS: Final = (aten.mean.dim,)
_JOINS: Final = (aten.cat.default, aten.concat.default)


@dataclass(frozen=True, slots=True)
class Site:
    """One quantized value.

    Args:
        name: of the value (its node in the graph, or the program's input), or the layer's weight for its input.
        index: OUTPUT for a value, 0 for the input of the layer.
        bits: width that it is quantized to.
    """

    name: str
    index: int
    bits: int

    @property
    def key(self) -> tuple[str, int]:
        """What an `ActivationGrid` calls it."""
        return self.name, self.index


def activation_sites(
    program: FloatProgram, activation_bits: Mapping[str, int], placement: Placement = "deploy"
) -> tuple[Site, ...]:
    """The values of a program that are quantized, in the order in which the graph computes them.

    Args:
        program: BatchNorm already folded.
        activation_bits: bits of its input for each layer, by its weight's qualified name; a layer that is not there
            takes float activations.
        placement: `deploy`: all that onnxruntime fuses: inputs of layers, outputs of convolutions, and operands and
            outputs of sums, products, pooling and concatenation in between; those at 8 bits. `paper`: inputs of
            layers alone.

    Returns:
        Sites. A value that layers of one width take, and nothing else, has that width. Any other has 8 bits: operands
        of sums keep them, and at `deploy` a value has one grid whoever takes it, since a second quantizer for a layer
        that wants fewer bits costs more time than fewer bits can save. At `paper` such a layer has its own.

    Raises:
        ConfigError: an unknown placement.
    """
    if placement not in PLACEMENTS:
        raise ConfigError(f"placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}.")
    return _Finder(program, activation_bits, placement).sites()


def layer_input_sites(program: FloatProgram, weights: Iterable[str]) -> tuple[Site, ...]:
    """A site at the input of each named layer: where `dynamic8` quantizes at run time, at 8 bits."""
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
        self.takers: dict[Node, list[Layer]] = {}  # by root: the layers that take it
        self.moved: dict[Node, list[Node]] = {}  # by root: the values that layers and operators take
        self.eight: set[Node] = set()  # roots that something else takes, too, or that are outputs

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
        """Whether a use of a value is a layer's, or leads to one through moves alone."""
        if user in self.layers:
            return self._root(data_input(user)) is root
        return _moves(user, self.state) and bool(user.users) and all(self._is_taken(u, root) for u in user.users)

    def _take(self, value: Node) -> Node:
        """A value that must be quantized where it is taken; returns the value that it was moved from."""
        root = self._root(value)
        self.moved.setdefault(root, []).append(value)
        return root

    def _give(self, node: Node) -> None:
        """An output that must be quantized, behind the clamp that a quantizer absorbs."""
        while len(node.users) == 1 and (user := next(iter(node.users))).target in _CLAMPS and user.args[0] is node:
            node = user
        self._take(node)

    def _operands(self, node: Node) -> list[Node]:
        """The activations that an operator takes, if onnxruntime computes it in integers behind integers."""
        target = node.target
        candidates: Sequence[Any] = ()
        if target in _SUMS and not node.kwargs:
            candidates = node.args
        elif target in _POOLS or (target in _MEANS and _is_spatial(node)):
            candidates = node.args[:1]
        elif target in _JOINS:
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
    """Whether a node moves the values of an activation and changes none, but for zeros that it may add."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node) or node.args[0] in state:
        return False
    if node.target is operator.getitem:
        return node.args[0].target in _SPLITS and _moves(node.args[0], state)
    if node.target in _PADS:
        mode = node.args[2] if node.target is aten.pad.default and len(node.args) > 2 else "constant"
        value = node.args[3 if node.target is aten.pad.default else 2 :]
        return mode == "constant" and not any(value) and not node.kwargs
    return node.target in _MOVES


def mark(program: FloatProgram, sites: Iterable[tuple[str, int]]) -> FloatProgram:
    """The same program with `qcompress::site(x, i)` at the value of site i, and behind it wherever values are moved.

    Args:
        program: the one that the sites were found in.
        sites: their keys.

    Raises:
        ConfigError: a site that the program does not have.
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
            raise ConfigError(f"The program has no activation {name!r}: it is another one than the grids are for.")
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
    """The site that each layer's input is quantized at, by the layer's weight (further uses: by their nodes).

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
    """The weight of the layer behind which each site stands, where it stands behind one."""
    behind = {use.node: use.weight for use in layers(marked)}
    found: dict[int, str] = {}
    for node in marked.exported.graph.nodes:
        if node.target is site_op and node.args[1] not in found:
            value = node.args[0]
            while value not in behind and value.target in (*_CLAMPS, *_MOVES, operator.getitem):
                value = value.args[0]
            if value in behind:
                found[node.args[1]] = behind[value]
    return found


def _places(root: Node, state: Container[Node]) -> list[Node]:
    """A value and, behind it, everything that holds the same values: not what a padding gives, whose zeros are new."""
    found = [] if root.target in _SPLITS else [root]
    for user in root.users:
        if _moves(user, state) and user.args[0] is root and user.target not in _PADS:
            found += _places(user, state)
    return found


Visit = Callable[[int, npt.NDArray[np.float32], bool], npt.NDArray[np.float32]]


def rounding(grids: Sequence[SiteGrid]) -> Visit:
    """The visit that puts the value at each site's first place on its grid.

    Args:
        grids: of the sites, in the order of their indices.
    """

    def visit(index: int, value: npt.NDArray[np.float32], first: bool) -> npt.NDArray[np.float32]:
        return grids[index].dequantize(grids[index].quantize(value)) if first else value

    return visit


class MarkedRunner:
    """Runs a program with marks and lets a visitor see and replace the value at each.

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
        """Outputs by name for one batch.

        Args:
            arrays: inputs by name.
            visit: (index of the site, value, whether this is the site's first place) -> the value to go on with.
        """
        inputs = iter(self.program.bind(arrays))
        flat = [to_torch(next(inputs)).to(self._device) if s is None else s for s in self._state]
        visiting = _Visiting(self.program.exported, visit)
        try:
            with torch.no_grad():
                out = visiting.run(*flat)
        except Exception:
            if visiting.refused is not None:  # as it was raised: the interpreter writes the graph's node into it
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
        """A mark goes to the visitor, anything else is run."""
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
    """Every use of a weight by its name; further uses of the same weight by those of their nodes."""
    found: dict[str, Layer] = {}
    for use in layers(program):
        if use.kind in LAYER_KINDS:
            found[use.node.name if use.weight in found else use.weight] = use
    return found


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.ndim > 0


def _is_spatial(node: Node) -> bool:
    """A mean over all axes of an image but batch and channels."""
    value = value_of(node.args[0])  # type: ignore[arg-type]
    axes = node.args[1]
    if not isinstance(axes, Sequence) or value.ndim not in (3, 4):
        return False
    return {a % value.ndim for a in axes if isinstance(a, int)} == set(range(2, value.ndim))
