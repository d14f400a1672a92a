"""A torch.export.ExportedProgram in memory."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from qcompress.errors import SourceError
from qcompress.graph.options import ProgramOptions
from qcompress.sources.base import SourceTensor
from qcompress.sources.memory.module import digest_of, lazy_tensor
from qcompress.sources.pt2.kinds import graph_kinds

if TYPE_CHECKING:
    import torch

    from qcompress.graph.program import FloatProgram


@final
class ExportedProgramSource:
    """An exported program in memory.

    Args:
        exported: is read, never changed.

    Raises:
        SourceError: it has no tensor.
    """

    path: Path | None = None
    label = "exported program"

    def __init__(self, exported: "torch.export.ExportedProgram") -> None:
        self._exported = exported
        if not any(True for _ in self.tensors()):
            raise SourceError("no tensor found in the exported program: it has no weights.")

    @property
    def original_bytes(self) -> int:
        """Bytes of its tensors, tied ones once."""
        return sum(t.array.size * np.dtype(t.array.dtype).itemsize for t in self.tensors())

    @property
    def sha256(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes."""
        return digest_of(self.tensors())

    def tensors(self) -> Iterator[SourceTensor]:
        """Every parameter, buffer and constant, tied ones once."""
        import torch

        named = {**self._exported.state_dict, **self._exported.constants}
        tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
        kinds = graph_kinds(_as_json(self._exported), {name: tuple(t.shape) for name, t in tensors.items()})
        groups: dict[object, list[str]] = {}
        for name, t in tensors.items():
            where = t.untyped_storage().data_ptr() if t.numel() else id(t)
            groups.setdefault((where, t.storage_offset(), t.shape, t.stride(), t.dtype), []).append(name)
        for first, *rest in groups.values():
            kind = next((kinds[name] for name in (first, *rest) if name in kinds), "other")
            yield SourceTensor(first, kind, lazy_tensor(tensors[first], first), tuple(rest))

    def program(self, options: ProgramOptions) -> "FloatProgram":
        """The program itself."""
        from qcompress.graph.tracing import from_exported

        return from_exported(self._exported, options)


def _as_json(exported: "torch.export.ExportedProgram") -> Mapping[str, Any]:
    """The part of torch's own serialized form that the kinds are read from."""
    import torch

    signature = exported.graph_signature
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    nodes = []
    for node in exported.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            names = [a.name for a in node.target._schema.arguments]
            arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            inputs = [{"name": name, "arg": _argument(value)} for name, value in arguments.items()]
            outputs = [{"as_tensor": {"name": node.name}}]
            nodes.append({"target": f"torch.ops.{node.target}", "inputs": inputs, "outputs": outputs})
    specs = [{"parameter": {"arg": {"name": k}, "parameter_name": v}} for k, v in lifted.items()]
    return {"graph": {"nodes": nodes}, "signature": {"input_specs": specs}}


def _argument(value: Any) -> dict[str, Any]:
    import torch

    if isinstance(value, torch.fx.Node):
        return {"as_tensor": {"name": value.name}}
    if isinstance(value, list | tuple) and all(isinstance(v, torch.fx.Node) for v in value):
        return {"as_tensors": [{"name": v.name} for v in value]}
    return {"as_bool": value} if isinstance(value, bool) else {"as_int": value} if isinstance(value, int) else {}
