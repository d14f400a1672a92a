"""`qcompress inspect MODEL`: names, kinds and shapes of all tensors."""

from typing import Any

from qcompress.errors import SourceError
from qcompress.kinds import UNKNOWN, WEIGHT_KINDS
from qcompress.sources.base import Source, SourceTensor
from qcompress_cli.inputs import options
from qcompress_cli.inputs.open_model import open_model
from qcompress_cli.inputs.project import run_options
from qcompress_cli.terminal.console import Ui, new_table
from qcompress_cli.terminal.numbers import counted, shape_text
from qcompress_cli.terminal.text import printable


@options.command("inspect")
@options.model_argument
@options.arch_options
@options.common_options
def command(json: bool, quiet: bool, **params: Any) -> None:
    """List the tensors of MODEL with their kinds and shapes. The [name."…"] patterns of a plan match these names."""
    ui = Ui(json=json, quiet=quiet)
    source = open_model(run_options(params), ui)
    tensors = list(source.tensors())
    if not tensors:
        raise SourceError(f"No tensor found in {source.label}; a model file must hold at least one.")
    ui.emit(_as_dict(source, tensors))
    table = new_table("name", ["kind", "shape", "dtype", "count"], left=["kind", "dtype"])
    for tensor in tensors:
        array = tensor.array
        table.add_row(printable(tensor.name), tensor.kind, shape_text(array.shape), array.dtype, f"{array.size:,}")
        for alias in tensor.aliases:
            table.add_row(f"{printable(alias)} (tied to {printable(tensor.name)})")
    ui.show(table)
    ui.show("", _summary(tensors))


def _summary(tensors: list[SourceTensor]) -> str:
    if any(tensor.kind == UNKNOWN for tensor in tensors):
        return f"{counted(len(tensors), 'tensor')}; a bare state dict does not tell all kinds; add --arch."
    weights = [tensor for tensor in tensors if tensor.kind in WEIGHT_KINDS]
    return f"{counted(len(tensors), 'tensor')}, {len(weights)} of them weights that a plan can compress."


def _as_dict(source: Source, tensors: list[SourceTensor]) -> dict[str, Any]:
    return {
        "format_version": 1,
        "model": source.label,
        "original_bytes": source.original_bytes,
        "sha256": source.sha256,
        "tensors": [
            {
                "name": tensor.name,
                "kind": tensor.kind,
                "shape": list(tensor.array.shape),
                "dtype": tensor.array.dtype,
                "count": tensor.array.size,
                "aliases": list(tensor.aliases),
            }
            for tensor in tensors
        ],
    }
