"""The source of a torch.export.ExportedProgram in memory."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, final

import numpy as np

from qcompress.errors import SourceError
from qcompress.graph.options import ProgramOptions
from qcompress.sources.base import SourceTensor
from qcompress.sources.memory.module import digest_of, lazy_tensor

if TYPE_CHECKING:
    import torch

    from qcompress.graph.program import FloatProgram


@final
class ExportedProgramSource:
    """An exported program in memory.

    Args:
        exported: only read.

    Raises:
        SourceError: it holds no tensor.
    """

    path: Path | None = None
    label = "exported program"

    def __init__(self, exported: "torch.export.ExportedProgram") -> None:
        self._exported = exported
        if not any(True for _ in self.tensors()):
            raise SourceError("no tensor found in the exported program: it has no weights.")

    @property
    def original_bytes(self) -> int:
        """Return the bytes of its tensors, tied ones once."""
        return sum(t.array.size * np.dtype(t.array.dtype).itemsize for t in self.tensors())

    @property
    def sha256(self) -> str:
        """Return the SHA-256 over names, dtypes, shapes and bytes."""
        return digest_of(self.tensors())

    def tensors(self) -> Iterator[SourceTensor]:
        """Yield every parameter, buffer and constant, tied ones once."""
        import torch

        from qcompress.graph.program import identity

        named = {**self._exported.state_dict, **self._exported.constants}
        tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
        groups: dict[object, list[str]] = {}
        for name, tensor in tensors.items():
            groups.setdefault(identity(tensor), []).append(name)
        kinds = self._kinds({name: first for first, *rest in groups.values() for name in (first, *rest)})
        for first, *rest in groups.values():
            yield SourceTensor(first, kinds.get(first, "other"), lazy_tensor(tensors[first], first), tuple(rest))

    def _kinds(self, first_names: Mapping[str, str]) -> dict[str, str]:
        from qcompress.graph.nodes import calls
        from qcompress.graph.program import state_nodes, value_of
        from qcompress.graph.weights import Tensor, kinds_of_calls

        parameters = {*self._exported.graph_signature.parameters}
        state = {
            node.name: Tensor(
                first_names.get(name, name), tuple(value.shape), value.is_floating_point(), name in parameters
            )
            for node, name in state_nodes(self._exported).items()
            if (value := value_of(node)) is not None
        }
        return kinds_of_calls(calls(self._exported.graph), state)

    def program(self, options: ProgramOptions) -> "FloatProgram":
        """Return the program as a float program."""
        from qcompress.graph.tracing import from_exported

        return from_exported(self._exported, options)
