"""Float programs whose tensors live in a module: to train them, and to learn from them."""

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qcompress.finetune.live_graph import LiveGraph
from qcompress.graph.marks import mark
from qcompress.graph.program import FloatProgram


class Holder(nn.Module):
    """Holds some tensors of a program; it computes nothing."""


def held(program: FloatProgram) -> nn.Module:
    """Returns a module with copies of a program's parameters and buffers under their qualified names.

    Tied tensors stay tied: the program names them once. The module has no forward.
    """
    root = Holder()
    for name, value in program.state().items():
        path, _, attribute = name.rpartition(".")
        home: nn.Module = root
        for part in path.split(".") if path else ():
            if part not in home._modules:
                home.add_module(part, Holder())
            home = home.get_submodule(part)
        if isinstance(value, nn.Parameter):
            home.register_parameter(attribute, nn.Parameter(value.detach().clone()))
        else:
            home.register_buffer(attribute, value.detach().clone())
    return root


@final
class Teacher(nn.Module):
    """A float program that does not train; its tensors move with the module.

    Args:
        program: the program.
        names: names of its inputs in calls, in its order; None: its own.
    """

    def __init__(self, program: FloatProgram, names: Sequence[str] | None = None) -> None:
        super().__init__()
        self._program, self._graph = program, LiveGraph(mark(program, []))
        self._inputs = tuple(names or program.input_names)
        self._names = {name: f"tensor_{i}" for i, name in enumerate(program.state())}
        for name, value in program.state().items():
            self.register_buffer(self._names[name], value.detach().clone())

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Returns the program's outputs for its inputs, by position in its order or by name."""
        inputs: Sequence[Tensor] = args or [kwargs[name] for name in self._inputs]
        tensors = {name: getattr(self, key) for name, key in self._names.items()}
        outputs = self._graph.function(*self._graph.arguments(tensors, inputs, (), {}, training=False))
        return pytree.tree_unflatten(outputs, self._program.exported.call_spec.out_spec)
