"""From the float program to an ONNX graph whose weights are still open.

torch.onnx writes the graph; every parameter and buffer is then turned into a graph input, so that the optimizer sees
its shape but not its values and can fold none of it away. Whatever is written for a weight later, float initializer or
packed codes, takes the place of that input under the same name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import numpy_helper
from onnxscript import optimizer, values, version_converter

from qcompress.errors import SourceError
from qcompress.graph.marks import site_op
from qcompress.graph.program import FloatProgram
from qcompress.graph.quiet import quiet_torch
from qcompress_exporters.onnx_format.names import ShortNames
from qcompress_exporters.onnx_format.opsets import BASE_OPSET, ir_version

_FOLD_INPUT_LIMIT: Final = 1024
_FOLD_OUTPUT_LIMIT: Final = 4096

# A mark of the program, as a node: what stands there is decided when the grids are known.
DOMAIN: Final = "qcompress"
MARK: Final = "Site"
_SCHEMA: Final = onnx.defs.OpSchema(
    MARK, DOMAIN, 1,
    inputs=[onnx.defs.OpSchema.FormalParameter("x", "T")],
    outputs=[onnx.defs.OpSchema.FormalParameter("y", "T")],
    type_constraints=[("T", ["tensor(float)"], "")],
    attributes=[onnx.defs.OpSchema.Attribute("index", onnx.defs.OpSchema.AttrType.INT, "")],
)  # fmt: skip
if not onnx.defs.has(MARK, DOMAIN):  # schemas outlive a module
    onnx.defs.register_schema(_SCHEMA)
_OPSET: Final = values.Opset(DOMAIN, 1)


def _mark(x: Any, index: int) -> Any:
    return _OPSET.Site(x, index=index)


@dataclass(frozen=True)
class Trace:
    """An ONNX graph with open weights.

    Args:
        base: the graph at BASE_OPSET; its inputs are the program's own, then one for each tensor of the state.
        state_names: the tensors of the state that the graph uses.
        notes: what a user should be told.
    """

    base: onnx.ModelProto
    state_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    _converted: dict[tuple[int, bool], onnx.ModelProto] = field(default_factory=dict)

    def at_opset(self, opset: int, *, marked: bool = False) -> onnx.ModelProto:
        """A fresh copy of the graph at an opset that is not lower than BASE_OPSET; `marked`: with its marks."""
        if (opset, marked) not in self._converted:
            model = ir.from_proto(self.base)
            if not marked:
                _drop_marks(model.graph)
            if opset != BASE_OPSET:
                with quiet_torch():
                    version_converter.convert_version(model, opset)
                if model.opset_imports.get("") != opset:
                    raise SourceError(f"The graph cannot be written at opset {opset}: name an older --target.")
            proto = ir.to_proto(model)
            proto.ir_version = ir_version(opset)
            self._converted[opset, marked] = tidy(proto, self.state_names)
        copy = onnx.ModelProto()
        copy.CopyFrom(self._converted[opset, marked])
        return copy

    @property
    def marks(self) -> int:
        """How many sites the program is marked with."""
        return 1 + max((n.attribute[0].i for n in self.base.graph.node if n.domain == DOMAIN), default=-1)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the open tensors, by qualified name."""
        shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in self.base.graph.input}
        return {name: shapes[name] for name in self.state_names}


def trace(program: FloatProgram) -> Trace:
    """Lower a program to ONNX.

    Args:
        program: BatchNorm already folded where it shall be.

    Returns:
        The graph, each tensor of `program.state()` an input under its qualified name.

    Raises:
        SourceError: torch.onnx has no translation for an operator; names it.
    """
    with quiet_torch():
        try:
            exported = torch.onnx.export(
                program.exported, dynamo=True, optimize=False, verbose=False, opset_version=BASE_OPSET,
                custom_translation_table={site_op: _mark},
            )  # fmt: skip
        except Exception as e:
            raise SourceError(_failure(e)) from e
        assert exported is not None
        model = exported.model
        graph = model.graph
        for name in list(graph.initializers):
            value = graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)
        optimizer.optimize(model, input_size_limit=_FOLD_INPUT_LIMIT, output_size_limit=_FOLD_OUTPUT_LIMIT)
    _pool_means(graph)
    _fold_pads(graph)
    optimizer.remove_unused_nodes(model)
    for value in list(graph.inputs)[len(program.input_names) :]:
        if not value.uses() and not value.is_graph_output():
            graph.inputs.remove(value)
    state_names = tuple(str(v.name) for v in list(graph.inputs)[len(program.input_names) :])
    _name_inputs_and_outputs(graph, program)
    return Trace(ir.to_proto(model), state_names, program.notes)


def _drop_marks(graph: ir.Graph) -> None:
    for node in list(graph):
        if node.domain != DOMAIN:
            continue
        value, marked = _input(node, 0), node.outputs[0]
        if marked.is_graph_output():
            name = marked.name
            if value.is_graph_input() or value.is_graph_output():  # it has a name to keep
                identity = ir.Node("", "Identity", [value])
                _replace(graph, node, [identity])
                identity.outputs[0].name = name
                continue
            value.name = name
        marked.replace_all_uses_with(value, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _pool_means(graph: ir.Graph) -> None:
    """A mean over all axes but batch and channels is a GlobalAveragePool, which runtimes can compute in integers."""
    for node in list(graph):
        if node.op_type != "ReduceMean" or node.domain:
            continue
        data = _input(node, 0)
        rank = 0 if data.shape is None else len(data.shape)
        axes = _constant(node, 1)
        if rank not in (3, 4) or axes is None or {int(a) % rank for a in axes} != set(range(2, rank)):
            continue
        keep = node.attributes.get("keepdims")
        pool = ir.Node("", "GlobalAveragePool", [data])
        new = [pool]
        if keep is not None and keep.as_int() == 0:
            new.append(ir.Node("", "Flatten", [pool.outputs[0]]))
        _replace(graph, node, new)


def _fold_pads(graph: ir.Graph) -> None:
    """Let a convolution do the padding with zeros in front of it; drop padding by nothing."""
    for node in list(graph):
        if node.op_type != "Pad" or node.domain:
            continue
        mode = node.attributes.get("mode")
        pads, fill = _constant(node, 1), _constant(node, 2)
        if pads is None or (mode is not None and mode.as_string() != "constant") or len(node.inputs) > 3:
            continue
        users = [use.node for use in node.outputs[0].uses()]
        rank = len(pads) // 2
        if not pads.any():
            _replace(graph, node, [], _input(node, 0))
        elif (
            users
            and not node.outputs[0].is_graph_output()
            and (len(node.inputs) < 3 or node.inputs[2] is None or (fill is not None and not fill.any()))
            and (pads >= 0).all()
            and not pads[[0, 1, rank, rank + 1]].any()
            and all(u.op_type == "Conv" and u.inputs[0] is node.outputs[0] and _pads_itself(u) for u in users)
        ):
            added = [int(p) for p in (*pads[2:rank], *pads[rank + 2 :])]
            for user in users:
                old = user.attributes["pads"].as_ints() if "pads" in user.attributes else [0] * len(added)
                user.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(old, added, strict=True)])
            _replace(graph, node, [], _input(node, 0))


def _pads_itself(conv: ir.Node) -> bool:
    auto = conv.attributes.get("auto_pad")
    return auto is None or auto.as_string() == "NOTSET"


def _replace(graph: ir.Graph, node: ir.Node, new: list[ir.Node], value: ir.Value | None = None) -> None:
    """Nodes, or a value that is there already, in place of a node with one output."""
    graph.insert_before(node, new)
    value = value or new[-1].outputs[0]
    if new:
        value.shape, value.type = node.outputs[0].shape, node.outputs[0].type
    node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _input(node: ir.Node, position: int) -> ir.Value:
    value = node.inputs[position]
    assert value is not None
    return value


def _constant(node: ir.Node, position: int) -> Any:
    """The value of an input that is constant, flat; None where it is not, or is not there."""
    value = node.inputs[position] if len(node.inputs) > position else None
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if constant is None else constant.numpy().ravel()


def _name_inputs_and_outputs(graph: ir.Graph, program: FloatProgram) -> None:
    """The program's own names, and the names of its dynamic axes."""
    inputs, outputs = list(graph.inputs)[: len(program.input_names)], list(graph.outputs)
    symbols: dict[str, str] = {}
    for name, value in zip(program.input_names, inputs, strict=True):
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and (name, axis) in program.dynamic:
                symbols.setdefault(str(size.value), program.dynamic[name, axis])
        value.name = name
    for position, (name, value) in enumerate(zip(program.output_names, outputs, strict=True)):
        if value in graph.inputs or value in outputs[:position]:
            node = ir.Node("", "Identity", [value])
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.append(node)
            graph.outputs[position] = node.outputs[0]
            value = node.outputs[0]
        value.name = name
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([_rename(d, symbols) for d in value.shape])


def _rename(dim: Any, symbols: Mapping[str, str]) -> Any:
    if not isinstance(dim, ir.SymbolicDim) or dim.value is None:
        return dim
    return re.sub(r"[A-Za-z_]\w*", lambda m: symbols.get(m[0], m[0]), str(dim.value))


def tidy(model: onnx.ModelProto, keep: tuple[str, ...]) -> onnx.ModelProto:
    """Drop what a runtime does not need: names, types of inner values, notes, attributes that say the default.

    Args:
        model: changed in place.
        keep: names of values that stay as they are, beside those of inputs and outputs.

    Returns:
        The same model.
    """
    graph = model.graph
    fixed = {*keep, *(v.name for v in graph.input), *(v.name for v in graph.output)}
    names = ShortNames(fixed)
    opset = next(o.version for o in model.opset_import if o.domain == "")
    for message in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        message.ClearField("doc_string")
        message.ClearField("metadata_props")
    del graph.value_info[:]
    graph.name = "g"
    model.producer_name, model.producer_version = "qcompress", ""
    _deduplicate(graph)
    used = {o.domain for o in graph.node}
    for entry in [o for o in model.opset_import if o.domain and o.domain not in used]:
        model.opset_import.remove(entry)
    renamed: dict[str, str] = {"": ""}
    for node in graph.node:
        node.ClearField("name")
        node.ClearField("overload")
        _drop_defaults(node, opset)
    _rename_values(graph, fixed, names, renamed)
    return model


def _rename_values(graph: onnx.GraphProto, fixed: set[str], names: ShortNames, renamed: dict[str, str]) -> None:
    """Give every inner value a short name, those of subgraphs included."""

    def short(name: str) -> str:
        if name not in renamed:
            renamed[name] = name if name in fixed else names.new()
        return renamed[name]

    for tensor in graph.initializer:
        tensor.name = short(tensor.name)
    for node in graph.node:
        node.input[:] = [short(n) for n in node.input]
        node.output[:] = [short(n) for n in node.output]
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                for value in (*inner.input, *inner.output):
                    value.name = short(value.name)
                del inner.value_info[:]
                _rename_values(inner, fixed, names, renamed)


def _deduplicate(graph: onnx.GraphProto) -> None:
    """Let equal constants be one initializer."""
    first: dict[bytes, str] = {}
    same: dict[str, str] = {}
    kept = []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        key = repr((tensor.data_type, values.shape)).encode() + values.tobytes()
        if key in first:
            same[tensor.name] = first[key]
        else:
            first[key] = tensor.name
            kept.append(tensor)
    if same and not any(a.HasField("g") or a.graphs for n in graph.node for a in n.attribute):
        for node in graph.node:
            node.input[:] = [same.get(n, n) for n in node.input]
        del graph.initializer[:]
        graph.initializer.extend(kept)


# Attributes whose default depends on the rank, so that the schema cannot state it.
_ONES: Final = ("strides", "dilations")
_ZEROS: Final = ("pads", "output_padding")
_WINDOWED: Final = ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool")


def _drop_defaults(node: onnx.NodeProto, opset: int) -> None:
    if node.domain:
        return
    schema = onnx.defs.get_schema(node.op_type, opset)
    kept = []
    for attribute in node.attribute:
        declared = schema.attributes.get(attribute.name)
        value = onnx.helper.get_attribute_value(attribute)
        default = None
        if declared is not None and declared.default_value.name:
            default = onnx.helper.get_attribute_value(declared.default_value)
        if node.op_type in _WINDOWED:
            if attribute.name in _ONES:
                default = [1] * len(value)
            elif attribute.name in _ZEROS:
                default = [0] * len(value)
            elif attribute.name == "kernel_shape" and node.op_type in ("Conv", "ConvTranspose"):
                continue  # it is the weight's own shape
        if default is None or not np.array_equal(np.asarray(default), np.asarray(value)):
            kept.append(attribute)
    del node.attribute[:]
    node.attribute.extend(sorted(kept, key=lambda a: a.name))


def _failure(error: Exception) -> str:
    text = str(error)
    operators = sorted(set(re.findall(r"(?:aten|prims)\.\w+(?:\.\w+)?", text)))
    what = f" It has no translation for {', '.join(operators[:3])}." if operators else ""
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return f"torch.onnx cannot write the model: {first}{what} Write that part with other operators."
