"""Attributes that change nothing go."""

from typing import Any, Final, final

import numpy as np
import onnx
import onnx_ir as ir

from qcompress_exporters.onnx_format.passes.replace import constant_of

# Attributes whose default depends on the rank, so that the schema cannot state it.
_ONES: Final = ("strides", "dilations")
_ZEROS: Final = ("pads", "output_padding")
_WINDOWED: Final = ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool")


@final
class DropDefaultAttributes(ir.passes.InPlacePass):
    """Removes attributes that have their default or no effect, and sorts the others; at every depth."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run the pass."""
        modified = False
        for node in model.graph.all_nodes():
            if node.domain:
                continue
            schema = onnx.defs.get_schema(node.op_type, model.graph.opset_imports[""])
            kept = [a for _, a in sorted(node.attributes.items()) if not _is_default(node, a, schema)]
            modified |= len(kept) < len(node.attributes)
            node.attributes.clear()
            node.attributes.update({a.name: a for a in kept})
        return ir.passes.PassResult(model, modified=modified)


def _is_default(node: ir.Node, attribute: ir.Attr, schema: onnx.defs.OpSchema) -> bool:
    if node.op_type in _WINDOWED:
        if attribute.name in _ONES:
            return set(attribute.as_ints()) <= {1}
        if attribute.name in _ZEROS:
            return set(attribute.as_ints()) <= {0}
        if attribute.name == "kernel_shape" and node.op_type in ("Conv", "ConvTranspose"):
            return True  # it is the weight's own shape
    if node.op_type == "Reshape" and attribute.name == "allowzero":
        shape = constant_of(node, 1)
        # It says what a 0 in the shape means.
        return attribute.as_int() == 0 or (shape is not None and bool(shape.all()))
    declared = schema.attributes.get(attribute.name)
    if declared is None or not declared.default_value.name:
        return False
    default = ir.serde.deserialize_attribute(declared.default_value)
    return attribute.type == default.type and np.array_equal(_value(attribute), _value(default))


def _value(attribute: ir.Attr) -> Any:
    value = np.asarray(attribute.value)
    return value.astype(np.float32) if value.dtype.kind == "f" else value  # which is what a file holds
