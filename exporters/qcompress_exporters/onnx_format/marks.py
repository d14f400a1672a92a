"""Marks of activation sites, as nodes: what stands there is decided when the grids are known."""

from typing import Any, Final

import onnx
import onnx_ir as ir
from onnxscript import values

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


def translate_mark(x: Any, index: int) -> Any:
    """Return the mark that torch.onnx writes for a site of the program."""
    return _OPSET.Site(x, index=index)


def is_mark(node: ir.Node) -> bool:
    """Return whether a node marks a site."""
    return node.domain == DOMAIN


def site_of(mark: ir.Node) -> int:
    """Return the index of the site that a mark stands at."""
    return mark.attributes["index"].as_int()
