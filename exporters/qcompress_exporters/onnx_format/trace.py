"""From the float program to an ONNX graph whose weights are still open.

torch.onnx writes the graph; every parameter and buffer is then turned into a graph input, so that the optimizer sees
its shape but not its values and can fold none of it away. Whatever is written for a weight later, float initializer or
packed codes, takes the place of that input under the same name.
"""

import re
from dataclasses import dataclass, field
from typing import Final

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer, version_converter

from qcompress.errors import SourceError
from qcompress.graph.marks import site_op
from qcompress.graph.nodes import line_of
from qcompress.graph.program import FloatProgram
from qcompress.graph.quiet import quiet_torch
from qcompress.graph.recurrent import with_own_layers
from qcompress.user_code import causes, one_line
from qcompress_exporters.onnx_format.marks import is_mark, site_of, translate_mark
from qcompress_exporters.onnx_format.names import reserved_names
from qcompress_exporters.onnx_format.opsets import BASE_OPSET, ir_version
from qcompress_exporters.onnx_format.passes.default_attributes import DropDefaultAttributes
from qcompress_exporters.onnx_format.passes.drop_marks import DropMarks
from qcompress_exporters.onnx_format.passes.fold_pads import FoldPads
from qcompress_exporters.onnx_format.passes.name_ends import NameEnds
from qcompress_exporters.onnx_format.passes.order_loops import OrderLoops
from qcompress_exporters.onnx_format.passes.pool_means import PoolMeans
from qcompress_exporters.onnx_format.passes.quick_rules import quick_rules
from qcompress_exporters.onnx_format.passes.shorten_names import ShortenNames
from qcompress_exporters.onnx_format.passes.strip import Strip
from qcompress_exporters.onnx_format.recurrent import TRANSLATIONS, check_recurrent

_FOLD_INPUT_LIMIT: Final = 1024
_FOLD_OUTPUT_LIMIT: Final = 4096
_UNTRANSLATED: Final = re.compile(r"OpOverload\(op='([\w.]+)', overload='(\w+)'\)")
_CONSTANT_LIMIT: Final = 1 << 20  # elements of a constant that is compared with others


@dataclass(frozen=True)
class Trace:
    """An ONNX graph with open weights.

    Args:
        base: the graph at BASE_OPSET; its inputs are the program's own, then one for each tensor of the state.
        state_names: the tensors of the state that the graph uses.
        notes: notes for the user.
    """

    base: ir.Model
    state_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    _converted: dict[tuple[int, bool], ir.Model] = field(default_factory=dict)

    def at_opset(self, opset: int, *, marked: bool = False) -> ir.Model:
        """Return a fresh copy of the graph, tidied, at an opset that is not lower than BASE_OPSET.

        Args:
            opset: of the copy.
            marked: whether the copy has the marks of the program's sites.
        """
        if (opset, marked) not in self._converted:
            model = self.base.clone()
            with quiet_torch():
                if not marked:
                    DropMarks()(model)
                if opset != BASE_OPSET:
                    version_converter.convert_version(model, opset)
                if model.opset_imports.get("") != opset:
                    raise SourceError(f"The graph cannot be written at opset {opset}: name an older --target.")
                model.ir_version = ir_version(opset)
                self._converted[opset, marked] = _tidied(model, self.state_names, self.marks if marked else 0)
        return self._converted[opset, marked].clone()

    @property
    def marks(self) -> int:
        """How many sites the program is marked with."""
        return 1 + max((site_of(node) for node in self.base.graph if is_mark(node)), default=-1)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the open tensors, by qualified name."""
        shapes = {v.name: v.shape for v in self.base.graph.inputs}
        return {name: tuple(shape.numpy()) for name in self.state_names if (shape := shapes[name]) is not None}


class UntranslatedError(SourceError):
    """torch.onnx cannot write a program."""


def trace(program: FloatProgram) -> Trace:
    """Lower a program to ONNX.

    Args:
        program: BatchNorm already folded where it shall be.

    Returns:
        The graph, each tensor of `program.state()` an input under its qualified name.

    Raises:
        UntranslatedError: torch.onnx has no translation for an operator; names it.
        SourceError: a layer cannot be written as ONNX.
    """
    check_recurrent(program)
    with quiet_torch():
        try:
            exported = torch.onnx.export(
                with_own_layers(program.exported), dynamo=True, optimize=False, verbose=False, opset_version=BASE_OPSET,
                custom_translation_table={site_op: translate_mark, **TRANSLATIONS},
            )  # fmt: skip
        except Exception as e:
            raise UntranslatedError(_failure(e, program)) from e
        assert exported is not None
        model = exported.model
        graph = model.graph
        for name in list(graph.initializers):
            value = graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)
        with quick_rules():
            optimizer.optimize(model, input_size_limit=_FOLD_INPUT_LIMIT, output_size_limit=_FOLD_OUTPUT_LIMIT)
        ir.passes.Sequential(PoolMeans(), FoldPads(), OrderLoops(), common.RemoveUnusedNodesPass())(model)
    for value in list(graph.inputs)[len(program.input_names) :]:
        if not value.uses() and not value.is_graph_output():
            graph.inputs.remove(value)
    state_names = tuple(str(v.name) for v in list(graph.inputs)[len(program.input_names) :])
    NameEnds(program)(model)
    return Trace(model, state_names, program.notes)


def _tidied(model: ir.Model, state_names: tuple[str, ...], marks: int) -> ir.Model:
    """Drop what runtimes do not need; of the inner values, only those of `state_names` keep their names.

    None gets a name that a file for integer compute gives to a value of its own.
    """
    return ir.passes.Sequential(
        common.ClearMetadataAndDocStringPass(),
        common.DeduplicateInitializersPass(_CONSTANT_LIMIT),
        common.RemoveUnusedOpsetsPass(),
        DropDefaultAttributes(),
        Strip(),
        ShortenNames(state_names, reserved_names(state_names, marks)),
    )(model).model


def _failure(error: BaseException, program: FloatProgram) -> str:
    """Return one message for a failure of torch.onnx: the operator, the user's line, or the first cause."""
    chain = causes(error)
    reason = one_line(chain[-1])
    missing = {f"{name}.{overload}" for name, overload in _UNTRANSLATED.findall(" ".join(str(e) for e in chain))}
    if not missing:
        return f"torch.onnx cannot write the model: {reason}. Write that part with other operators."
    lines = (line_of(node) for node in program.exported.graph.nodes if str(node.target) in missing)
    where = next((f" (at {line})" for line in lines if line is not None), "")
    named = ", ".join(sorted(missing))
    return f"torch.onnx has no translation for {named}{where}: write that part with other operators."
