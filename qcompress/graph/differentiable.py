"""A runner of a program that gets its tensors as arguments, so that gradients reach them and the inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Interpreter

from qcompress.graph.program import FloatProgram, state_nodes


class Differentiable(Interpreter):
    """Runs a program; subclasses see the values in between by overriding `run_node`.

    Args:
        program: not modified.
    """

    def __init__(self, program: FloatProgram) -> None:
        super().__init__(program.exported.graph_module)
        self._names = state_nodes(program.exported)
        self._placeholders = program.exported.graph.find_nodes(op="placeholder")

    def outputs(self, state: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[Any]:
        """Return the program's outputs.

        Args:
            state: tensors by qualified name.
            inputs: in the program's order.
        """
        left = iter(inputs)
        return list(self.run(*[state[self._names[n]] if n in self._names else next(left) for n in self._placeholders]))
