"""Integer compute: the marks of a graph become quantizers, and which of its layers can take int8 weights.

The rules that onnxruntime's fusions follow were measured, not read: unsigned activations, 0-d scales, a weight zero
point that is written out, int32 biases whose scale is exactly float32(s_x * s_w), a quantizer behind every
convolution. What merely moves values (Slice, Pad, Reshape, MaxPool, ...) moves codes, so that it needs no quantizers of
its own; clamps in front of a quantizer become a clamp of its codes, or nothing. Both are exact.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx

from qcompress.artifacts import (
    ActivationGrid,
    Artifact,
    FloatWeight,
    IntegerWeight,
    PalettizedWeight,
    SiteGrid,
    ThresholdGrid,
)
from qcompress_exporters.onnx_format.digests import tensor_digest
from qcompress_exporters.onnx_format.edit import GraphEditor, attribute
from qcompress_exporters.onnx_format.encodings.base import GraphWriter
from qcompress_exporters.onnx_format.encodings.integer import write_int8
from qcompress_exporters.onnx_format.trace import DOMAIN

Floats = npt.NDArray[np.float32]

_CLAMPS: Final = ("Relu", "Clip")
_RESHAPES: Final = ("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity")
_MOVES: Final = (*_RESHAPES, "Transpose", "Slice", "MaxPool", "Expand", "Split", "Gather", "DepthToSpace", "Resize")
_LAYERS: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_INT32: Final = 2**31 - 1
_INT16: Final = 2**15 - 1
# Why a layer stays in float that would not if its input's offset were a zero point.
PADDED: Final = "its input has a free offset, which only unpadded layers can take up"
SHARED: Final = "something else takes its input's free offset"
COMPARED: Final = "its output is compared with thresholds, which takes floats"
_NO_INTEGERS: Final[Mapping[type[Artifact], str]] = {
    PalettizedWeight: "its palette is not on an int8 grid",
    IntegerWeight: "its grid has blocks, a zero point, or codes above 127",
}
_LOWEST: Final = float(np.finfo(np.float32).min)


@dataclass(frozen=True, slots=True)
class Quantized:
    """A value that is dequantized from codes.

    Args:
        codes: name of the uint8 value.
        index: of its site.
        grid: its site's grid.
        scale: name of the grid's scale.
    """

    codes: str
    index: int
    grid: SiteGrid
    scale: str

    @property
    def zero_point(self) -> int:
        """The code that dequantizes to 0, before a free offset is added."""
        z = self.grid.zero_point
        return z if z is not None else _unsigned(self.grid)

    @property
    def offset(self) -> Floats:
        """The free offset; 0 for a grid with a zero point."""
        return np.zeros((), np.float32) if self.grid.zero_point is not None else self.grid.offset


@dataclass(frozen=True, slots=True)
class Layer:
    """One use of a weight by a node.

    Args:
        node: the node.
        weight: qualified name.
        transpose: the Transpose between the weight and the node, if there is one.
        alone: whether no other node uses the weight.
    """

    node: onnx.NodeProto
    weight: str
    transpose: onnx.NodeProto | None
    alone: bool


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A weight that integer kernels can take.

    Args:
        name: qualified name.
        codes: int8, the weight's shape.
        scale: float32, 0-d or one for each output channel.
        axis: of the output channels.
    """

    name: str
    codes: npt.NDArray[np.int8]
    scale: Floats
    axis: int


@dataclass(frozen=True, slots=True)
class IntegerLayer:
    """A layer that can be computed in integers.

    Args:
        layer: the node and its weight.
        source: its input.
        weight: its weight.
        bias: float64 [O], free offsets of the input and of what quantizes the output folded in; None: no bias.
        bias_name: the open tensor that the bias came from.
    """

    layer: Layer
    source: Quantized
    weight: Int8Weight
    bias: npt.NDArray[np.float64] | None
    bias_name: str


@dataclass(slots=True)
class Lowering:
    """A marked graph on its way to integers: the graph, what writes tensors, and what is known so far.

    Args:
        graph: the nodes.
        writer: of weights and constants.
        artifacts: one for each open tensor.
        grids: one for each site, in the order of the marks' indices.
        opset: of the file.
    """

    graph: GraphEditor
    writer: GraphWriter
    artifacts: Mapping[str, Artifact]
    grids: Sequence[SiteGrid]
    opset: int
    encodings: dict[str, str] = field(default_factory=dict)
    quantized: dict[str, Quantized] = field(default_factory=dict)
    _written: dict[tuple[str, bytes], tuple[str, str]] = field(default_factory=dict)
    _named: set[int] = field(default_factory=set)
    _transposed: dict[str, str] = field(default_factory=dict)
    _taken_off: dict[str, float] = field(default_factory=dict)
    _compared: set[str] = field(default_factory=set)
    _biases: dict[str, str] = field(default_factory=dict)

    # --- activations

    def quantize(self) -> None:
        """Write quantizers at all marks."""
        for node in self.graph:
            if node.domain == DOMAIN:
                self._site(node)

    def _site(self, node: onnx.NodeProto) -> None:
        value, index = node.input[0], attribute(node, "index")
        output, grid = node.output[0], self.grids[index]
        self.graph.remove(node)
        if value in self.quantized and self.quantized[value].index == index:
            self._alias(output, value)
            self._push_down(value)
            return
        value, output = self._above_reshapes(value, output)
        if isinstance(grid, ThresholdGrid):
            key = value, repr((grid.scale.tobytes(), grid.thresholds.tobytes())).encode()
            write = partial(self._reached, value, grid, index)
        else:
            value, low, high = self._absorb_clamps(value, grid)
            key = value, repr((grid.scale.tobytes(), grid.offset.tobytes(), low, high, grid.signed)).encode()
            write = partial(self._codes, value, grid, index, low, high)
        if key not in self._written:
            self._written[key] = write()
        elif index not in self._named:  # another site of the same value and grid: the same codes by its name
            self._named.add(index)
            self.graph.add("Identity", [self._written[key][0]], code_name(index))
        codes, scale = self._written[key]
        self._dequantize(Quantized(codes, index, grid, scale), output)
        self._push_down(output)

    def _reached(self, value: str, grid: ThresholdGrid, index: int) -> tuple[str, str]:
        """How many thresholds a value reaches, as uint8 codes, called as in `_codes`; and their scale.

        A comparison and a choice for each threshold: onnxruntime runs them 2 to 5 times as fast as one comparison with
        all of them and a sum over their axis, which takes 50 to 900 bytes less.
        """
        name = None if index in self._named else code_name(index)
        scale = self.writer.tensor(grid.scale, None if index in self._named else code_scale_name(index))
        self._named.add(index)
        self._compared.add(value)
        codes = self._code(0)
        for count, threshold in enumerate(grid.thresholds, 1):
            below = self.graph.add("Less", [value, self._constant(threshold)])
            codes = self.graph.add("Where", [below, codes, self._code(count)], name if count == grid.levels else None)
        return codes, scale

    def _codes(self, value: str, grid: ActivationGrid, index: int, low: int, high: int) -> tuple[str, str]:
        """uint8 codes in [low, high], called `q<index>` where this is the first place of the site; and their scale."""
        if grid.zero_point is None:
            value = self.graph.add("Sub", [value, self._constant(grid.offset)])
            self._taken_off[value] = float(grid.offset)
            zero = _unsigned(grid)
        else:
            zero = grid.zero_point
        name = None if index in self._named else code_name(index)
        self._named.add(index)
        clamped = low > 0 or high < 255
        scale = self._constant(grid.scale)
        codes = self.graph.add("QuantizeLinear", [value, scale, self._code(zero)], None if clamped else name)
        if not clamped:
            return codes, scale
        ends = [self._code(low) if low > 0 else "", *([self._code(high)] if high < 255 else [])]
        return self.graph.add("Clip", [codes, *ends], name), scale

    def _dequantize(self, value: Quantized, output: str) -> None:
        self.graph.add("DequantizeLinear", [value.codes, value.scale, self._code(value.zero_point)], output)
        self.quantized[output] = value

    def _alias(self, old: str, new: str) -> None:
        if old in self.graph.outputs:
            self.graph.add("Identity", [new], old)
        self.graph.replace(old, new)

    def _above_reshapes(self, value: str, output: str) -> tuple[str, str]:
        """Quantize in front of what only reshapes: there stands the operator that a quantizer fuses with."""
        while (
            (node := self.graph.producer(value)) is not None
            and node.op_type in _RESHAPES
            and value not in self.graph.outputs
            and not self.graph.users(value)  # the mark is out already
            and not self._is_open(node.input[0])
        ):
            self.graph.set_output(node, output)
            value, output = node.input[0], self.graph.new_name()
            self.graph.set_input(node, 0, output)
        return value, output

    def _is_open(self, value: str) -> bool:
        return value in self.artifacts

    def _absorb_clamps(self, value: str, grid: ActivationGrid) -> tuple[str, int, int]:
        """The value in front of the clamps that a quantizer alone takes, and the codes that they leave.

        Rounding is monotone, so that clamping before it equals clamping to the rounded ends after it.
        """
        ends = (-np.inf, np.inf)
        while (
            (node := self.graph.producer(value)) is not None
            and node.op_type in _CLAMPS
            and not self.graph.users(value)
            and value not in self.graph.outputs
            and (clamp := self._ends(node)) is not None
        ):
            ends = (float(np.clip(clamp[0], *ends)), float(np.clip(clamp[1], *ends)))
            value = node.input[0]
            self.graph.remove(node)
        low, high = (int(grid.quantize(np.float32(end).reshape(1))[0]) for end in ends)
        return value, low, high

    def _ends(self, clamp: onnx.NodeProto) -> tuple[float, float] | None:
        if clamp.op_type == "Relu":
            return 0.0, np.inf
        ends = [-np.inf, np.inf]
        for position, name in enumerate(clamp.input[1:]):
            constant = self.graph.constant(name) if name else None
            if name and constant is None:
                return None
            ends[position] = ends[position] if constant is None else float(constant)
        return (ends[0], ends[1]) if ends[0] <= ends[1] else None

    def _push_down(self, value: str) -> None:
        """Let what moves a dequantized value move its codes."""
        source = self.quantized[value]
        for user in self.graph.users(value):
            if not self._moves_codes(user, value, source):
                continue
            if user.op_type == "Pad":
                self.graph.set_input(user, 2, self._code(source.zero_point))
            self.graph.set_input(user, 0, source.codes)
            for position, output in enumerate(list(user.output)):
                codes = self.graph.new_name()
                self.graph.set_output(user, codes, position)
                self._dequantize(replace(source, codes=codes), output)
                self._push_down(output)
        self.graph.drop_unused(value)

    def _moves_codes(self, node: onnx.NodeProto, value: str, source: Quantized) -> bool:
        if node.domain or list(node.input).count(value) != 1 or node.input[0] != value:
            return False
        if (len(node.output) != 1 and node.op_type != "Split") or "" in node.output:
            return False
        if node.op_type == "Resize":
            return bool(attribute(node, "mode", b"nearest") == b"nearest")
        if node.op_type == "Pad":
            fill = self.graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
            given = len(node.input) > 2 and bool(node.input[2])
            zero = not given or (fill is not None and not fill.any())
            return attribute(node, "mode", b"constant") == b"constant" and zero and source.grid.zero_point is not None
        return node.op_type in _MOVES

    # --- layers

    def layers(self) -> dict[str, list[Layer]]:
        """The uses of each weight that layers have; a weight that anything else takes, too, is not there."""
        found: dict[str, list[Layer]] = {}
        for name in self.artifacts:
            uses = [use for user in self.graph.users(name) for use in self._uses(user, name)]
            if uses and None not in uses:
                found[name] = [Layer(*use, alone=len(uses) == 1) for use in uses if use is not None]
        return found

    def _uses(self, node: onnx.NodeProto, name: str) -> list[tuple[onnx.NodeProto, str, onnx.NodeProto | None] | None]:
        if node.op_type in _LAYERS and not node.domain and len(node.input) > 1 and node.input[1] == name:
            return [(node, name, None)]
        if node.op_type != "Transpose" or attribute(node, "perm", [1, 0]) != [1, 0]:
            return [None]
        users = self.graph.users(node.output[0])
        if node.output[0] in self.graph.outputs or not all(
            u.op_type in ("Gemm", "MatMul") and u.input[1] == node.output[0] for u in users
        ):
            return [None]
        return [(u, name, node) for u in users]

    def integer_layer(self, layer: Layer) -> IntegerLayer | str:
        """What a layer is in integers, or why it cannot be."""
        node, source = layer.node, self.quantized.get(layer.node.input[0])
        if node.op_type == "ConvTranspose":
            return "onnxruntime has no integer kernel for transposed convolutions"
        if source is None:
            return "its input is not quantized"
        weight = self.int8(layer)
        if isinstance(weight, str):
            return weight
        taken_off = self.taken_off(layer)
        if node.op_type == "Conv" and self.requantizer(node if taken_off is None else taken_off[0]) is None:
            return COMPARED if self._is_compared(node.output[0]) else "its output is not quantized by itself"
        bias_name = node.input[2] if len(node.input) > 2 else ""
        bias = None
        if bias_name:
            artifact_of_bias = self.artifacts.get(bias_name)
            if artifact_of_bias is None or artifact_of_bias.shape != (weight.codes.shape[weight.axis],):
                return "its bias is no vector of the model's"
            bias = artifact_of_bias.dequantize().astype(np.float64)
        if source.grid.zero_point is None:
            if any(attribute(node, "pads", [])) or attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
                return PADDED
            bias = _folded(bias, source.grid, weight)
        if taken_off is not None:
            bias = (0.0 if bias is None else bias) - np.full(weight.codes.shape[weight.axis], taken_off[1])
        found = IntegerLayer(layer, source, weight, bias, bias_name)
        if bias is not None and np.abs(bias / bias_scale(found)).max(initial=0) > _INT32:
            return "its bias does not fit 32 bits at the scale of its products"
        return found

    def int8(self, layer: Layer) -> Int8Weight | str:
        """A layer's weight for integer kernels, or why there is none."""
        artifact = self.artifacts[layer.weight]
        values = artifact.integers()
        if values is None:
            return artifact.reason if isinstance(artifact, FloatWeight) else _NO_INTEGERS[type(artifact)]
        codes, scale, scale_axis = values
        axis = self._output_axis(layer)
        if scale.ndim and scale_axis != axis:
            return "its scales are not along its output channels"
        if any(a.name in ("alpha", "beta", "transA") for a in layer.node.attribute):
            return "its product is scaled"
        return Int8Weight(layer.weight, codes, scale, axis)

    def _output_axis(self, layer: Layer) -> int:
        if layer.node.op_type == "Conv":
            return 0
        transposed = layer.transpose is not None
        if layer.node.op_type == "Gemm":
            return int((attribute(layer.node, "transB", 0) == 0) != transposed)
        return 0 if transposed else 1

    def taken_off(self, layer: Layer) -> tuple[onnx.NodeProto, float] | None:
        """The Sub that alone takes what a layer gives, and a free offset that the layer's bias can take off instead."""
        user = self.graph.only_user(layer.node.output[0])
        if user is None or layer.node.op_type == "MatMul" or not layer.alone or self.requantizer(user) is None:
            return None
        offset = self._taken_off.get(user.output[0])
        return None if offset is None else (user, offset)

    def fold_behind(self, layer: Layer) -> None:
        """Drop the Sub behind a layer whose bias has what it takes off."""
        found = self.taken_off(layer)
        if found is not None:
            self.graph.replace(found[0].output[0], layer.node.output[0])
            self.graph.remove(found[0])

    def requantizer(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The QuantizeLinear that alone takes what a node gives."""
        user = self.graph.only_user(node.output[0])
        return user if user is not None and user.op_type == "QuantizeLinear" else None

    def _is_compared(self, value: str) -> bool:
        """Whether thresholds alone take a value, or a clamp of it."""
        while value not in self._compared:
            user = self.graph.only_user(value)
            if user is None or user.op_type not in _CLAMPS:
                return False
            value = user.output[0]
        return all(user.op_type == "Less" for user in self.graph.users(value)) and value not in self.graph.outputs

    def add_offsets(self, takes_offset: Callable[[onnx.NodeProto], bool]) -> set[str]:
        """Add a free offset back to a dequantized value, unless all its users are layers that fold it.

        Args:
            takes_offset: whether a node is such a layer.

        Returns:
            The values that have their offsets.
        """
        by_site: dict[int, list[str]] = {}
        for value, source in self.quantized.items():
            if source.grid.zero_point is None and self.graph.producer(value) is not None:
                by_site.setdefault(source.index, []).append(value)
        added: set[str] = set()
        for values in by_site.values():
            users = [user for value in values for user in self.graph.users(value)]
            if not all(takes_offset(user) for user in users) or self.graph.outputs & set(values):
                added.update(values)
        for value in sorted(added):
            source, node, plain = self.quantized.pop(value), self.graph.producer(value), self.graph.new_name()
            assert node is not None
            self.graph.set_output(node, plain)
            self.graph.add("Add", [plain, self._constant(source.grid.offset)], value)
        return added

    def shield(self, layer: Layer) -> None:
        """Keep a float layer from standing directly between a dequantizer and a quantizer.

        onnxruntime would quantize its weights by itself (`WeightBiasQuantization`); a maximum with the lowest float,
        which changes nothing, stops it.
        """
        if layer.node.input[0] not in self.quantized:
            return
        stack, seen = [layer.node.output[0]], set[str]()
        while stack:
            value = stack.pop()
            for user in self.graph.users(value):
                output = user.output[0] if user.output else ""
                if user.op_type == "QuantizeLinear" and user.input[0] == value:
                    lowest = self._constant(np.float32(_LOWEST))
                    self.graph.set_input(user, 0, self.graph.add("Max", [value, lowest]))
                elif user.op_type in ("Relu", "Clip", "Add", "LeakyRelu") and output not in seen:
                    seen.add(output)
                    stack.append(output)

    # --- tensors

    def _constant(self, value: Any) -> str:
        return self.writer.constant(np.asarray(value, np.float32))

    def _code(self, value: int) -> str:
        return self.writer.constant(np.asarray(value, np.uint8))

    def write_weight(self, weight: Int8Weight, *, kernel_order: bool) -> tuple[str, str]:
        """The int8 codes of a weight and its scale, written once.

        Args:
            weight: the weight.
            kernel_order: [in, out] for a matrix, as products take it, instead of the weight's own order.

        Returns:
            Names of both values. The codes go by the weight's qualified name, the scale by that and `_scale`.
        """
        name, scale = weight.name, scale_name(weight.name)
        if name not in self.encodings:
            self.encodings[name] = write_int8(self.writer, self.artifacts[name], name, self.opset)
            self.sign(name, weight.codes)
            self.writer.tensor(weight.scale, scale)
            self.sign(scale, weight.scale)
        if not kernel_order or weight.axis != 0:
            return name, scale
        if name not in self._transposed:
            self._transposed[name] = self.writer.node("Transpose", [name], perm=[1, 0])
        return self._transposed[name], scale

    def write_bias(self, layer: IntegerLayer, values: npt.NDArray[Any]) -> str:
        """A layer's bias as it is computed with.

        By its qualified name where no other site's layers take it; else by that of the weight and the site:
        `bias_name`, or `offset_name` for an offset that is added behind a product.
        """
        alone = layer.layer.node.op_type == "MatMul"  # the bias is added behind it
        apart = (offset_name if alone else bias_name)(layer.weight.name, layer.source.index)
        if apart in self._biases:
            return self._biases[apart]
        own = layer.bias_name
        if own and own not in self.graph.outputs and all(self._reads(u, layer) for u in self.graph.users(own)):
            name = own
            self.encodings[name] = str(values.dtype)
        else:
            name = apart
        self._biases[apart] = name
        self.writer.tensor(values, name)
        self.sign(name, values)
        return name

    def _reads(self, node: onnx.NodeProto, layer: IntegerLayer) -> bool:
        """Whether a node has the site and the weight of a layer."""
        source = self.quantized.get(node.input[0])
        return node is layer.layer.node or (
            source is not None
            and source.index == layer.source.index
            and any(use.node is node for use in self.layers().get(layer.weight.name, []))
        )

    def sign(self, name: str, values: npt.NDArray[Any]) -> None:
        """Let the tensor that was written last carry its digest."""
        self.writer.sign_last(tensor_digest(name, values))


def code_name(index: int) -> str:
    """What the codes of a site are called in a file.

    >>> code_name(7)
    'q7'
    """
    return f"q{index}"


def code_scale_name(index: int) -> str:
    """What the scale of a site's codes is called in a file where no quantizer has it.

    >>> code_scale_name(7)
    's7'
    """
    return f"s{index}"


def scale_name(weight: str) -> str:
    """What the scale of a weight is called in a file.

    >>> scale_name("fc.weight")
    'fc.weight_scale'
    """
    return f"{weight}_scale"


def bias_name(weight: str, site: int) -> str:
    """What a bias is called that a weight's layer does not have to itself, behind the input at a site.

    >>> bias_name("fc.weight", 3)
    'fc.weight_bias3'
    """
    return f"{weight}_bias{site}"


def offset_name(weight: str, site: int) -> str:
    """What the share of a free offset in a product is called, where it is added by itself.

    >>> offset_name("fc.weight", 3)
    'fc.weight_offset3'
    """
    return f"{weight}_offset{site}"


def pair_saturation(weight: Int8Weight, largest: int) -> float:
    """Share of pairs of weights whose products with some pair of inputs add up to what 16 bits do not hold.

    Without VNNI, x86 adds two neighbouring products of uint8 with int8 in 16 bits, and saturates (vpmaddubsw).

    Args:
        weight: of a layer; its neighbours are input channels, one at a time in depthwise layers.
        largest: code of an input.

    >>> codes = np.array([[127, 2, 100, 100], [-63, -63, -127, 127]], np.int8)
    >>> pair_saturation(Int8Weight("fc.weight", codes, np.float32(1), 0), largest=255)
    0.5
    """
    codes = np.moveaxis(weight.codes, 1 - weight.axis if weight.codes.ndim == 2 else 1, -1).astype(np.int32)
    pairs = codes[..., : codes.shape[-1] // 2 * 2].reshape(-1, 2)
    highest, lowest = (largest * pairs.clip(*ends).sum(1) for ends in ((0, None), (None, 0)))
    return float(np.mean((highest > _INT16) | (lowest < -_INT16 - 1))) if len(pairs) else 0.0


def bias_scale(layer: IntegerLayer) -> Floats:
    """float32(s_x * s_w), 0-d or [O]: what onnxruntime takes the scale of an int32 bias to be, whatever is written."""
    return np.asarray(layer.source.grid.scale * layer.weight.scale, np.float32)


def _folded(bias: npt.NDArray[np.float64] | None, grid: SiteGrid, weight: Int8Weight) -> npt.NDArray[np.float64]:
    """bias + beta * s_w * sum(w_bar): exact where no padding is seen.

    Source: LSQ+ (Bhalgat et al. 2020), eq. 5.
    """
    others = tuple(i for i in range(weight.codes.ndim) if i != weight.axis)
    total_O = weight.codes.sum(axis=others, dtype=np.int64) * weight.scale.astype(np.float64)
    return np.asarray((0.0 if bias is None else bias) + float(grid.offset) * total_O, np.float64)


def _unsigned(grid: SiteGrid) -> int:
    """What is added to the codes of a grid with a free offset to store them unsigned."""
    return (grid.levels + 1) // 2 if isinstance(grid, ActivationGrid) and grid.signed else 0
