"""The float program: one ATen graph that runs the model, for every kind of torch source.

Layer kinds, BatchNorm folding and layer inputs are read from that graph; the user's module is never touched.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputSpec, TensorArgument
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from qcompress.errors import ConfigError, DataError, did_you_mean
from qcompress.graph.conversion import numpy_dtype, to_numpy, to_torch
from qcompress.graph.options import unnamed

Arrays = Mapping[str, npt.NDArray[Any]]
_ORIGINS: Final = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")
STATE_KINDS: Final = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@dataclass(frozen=True, slots=True)
class FloatProgram:
    """A float model as one graph without in-place operators, and the names of its inputs and outputs.

    Args:
        exported: the graph; its parameters are inputs under their qualified names.
        input_names: one per user input, in the graph's order.
        output_names: one per user output.
        dynamic: name of each dynamic axis, by (input name, axis).
        notes: notes for the user (switched to eval mode, a fixed batch).
    """

    exported: ExportedProgram
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dynamic: Mapping[tuple[str, int], str]
    notes: tuple[str, ...] = ()

    def state(self) -> dict[str, torch.Tensor]:
        """Return the parameters, buffers and constants that the graph uses, by qualified name, in the graph's order."""
        return {spec.target: tensor_of(self.exported, spec) for _, spec in _state_inputs(self.exported) if spec.target}

    def aliases(self) -> dict[str, tuple[str, ...]]:
        """Return the further names of tied tensors, by the name that `state` uses."""
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name, value in self.exported.state_dict.items():
            groups.setdefault(identity(value), []).append(name)
        return {
            name: others
            for name, value in self.state().items()
            if (others := tuple(n for n in groups.get(identity(value), []) if n != name))
        }

    @property
    def fixed_batch(self) -> int | None:
        """Return the only batch size that the program takes; None if it takes any."""
        if any(axis == 0 for _, axis in self.dynamic):
            return None
        return next((int(value_of(n).shape[0]) for n in user_inputs(self.exported) if value_of(n).ndim), None)

    def with_state(self, values: Arrays) -> "FloatProgram":
        """Return the program with other values for some tensors; shapes and dtypes stay.

        Args:
            values: arrays by qualified name.
        """
        state, constants = dict(self.exported.state_dict), dict(self.exported.constants)
        for name, value in values.items():
            home = state if name in state else constants
            if name not in home:
                raise ConfigError(f"The program has no tensor {name!r}.{did_you_mean(name, self.state())}")
            old = home[name]
            new = to_torch(value).to(old.dtype)
            if new.shape != old.shape:
                raise ConfigError(f"{name} must have shape {list(old.shape)}, got {list(new.shape)}.")
            home[name] = torch.nn.Parameter(new, False) if isinstance(old, torch.nn.Parameter) else new
        return replace(self, exported=rebuild(self.exported, state=state, constants=constants))

    def without_origins(self) -> "FloatProgram":
        """Return the program without its origins: source files, line numbers, classes and sample inputs."""
        module = copy_graph(self.exported)
        for node in module.graph.nodes:
            for key in _ORIGINS:
                node.meta.pop(key, None)
        return replace(self, exported=rebuild(self.exported, module=module, keep_examples=False))

    def module(self) -> torch.nn.Module:
        """Return a plain module that runs the program, with its parameters under their qualified names."""
        module: torch.nn.Module = self.exported.module(check_guards=False)
        return module

    def bind(self, arrays: Arrays) -> list[npt.NDArray[Any]]:
        """Return the program's inputs, in order, from named arrays.

        A single input may also be called `x`, several may be called `x0`, `x1`, … by their positions.

        Raises:
            DataError: an input is missing, or has the wrong shape or dtype.
        """
        bound = []
        positions = unnamed(len(self.input_names))
        for name, position, node in zip(self.input_names, positions, user_inputs(self.exported), strict=True):
            key = name if name in arrays else position
            if key not in arrays:
                hint = " An array y holds labels: give the input another name." if name == "y" else ""
                raise DataError(
                    f"The model's inputs are {', '.join(self.input_names)}; the data has "
                    f"{', '.join(sorted(arrays)) or 'no arrays'}: {name} is missing.{hint}"
                )
            bound.append(_check_input(name, np.asarray(arrays[key]), node))
        return bound

    def random_inputs(self, batch: int = 2) -> dict[str, npt.NDArray[Any]]:
        """Return normal random floats, and zeros for integers, in the inputs' shapes; the same ones each time.

        Args:
            batch: how many samples; other dynamic axes have the sizes of the trace.
        """
        samples = next((label for (_, axis), label in self.dynamic.items() if axis == 0), None)
        random = np.random.default_rng(0)
        inputs = {}
        for name, node in zip(self.input_names, user_inputs(self.exported), strict=True):
            shape = [
                batch if samples is not None and self.dynamic.get((name, axis)) == samples else size
                for axis, size in enumerate(traced_sizes(node))
            ]
            dtype = numpy_dtype(value_of(node).dtype)
            values = random.standard_normal(shape) if dtype.kind == "f" else np.zeros(shape)
            inputs[name] = values.astype(dtype)
        return inputs

    def run(self, arrays: Arrays, device: str = "cpu") -> dict[str, npt.NDArray[Any]]:
        """Run the program on one batch.

        Args:
            arrays: inputs by name, as for `bind`.
            device: `cpu` or `cuda`.

        Returns:
            Outputs by name.
        """
        return self.runner(device)(arrays)

    def runner(self, device: str = "cpu") -> "Runner":
        """Return a runner for many batches, which builds the module once."""
        module = self.module() if device == "cpu" else copy.deepcopy(self.module()).to(device)
        return Runner(self, module, device)


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs a program batch by batch; see `FloatProgram.runner`."""

    program: FloatProgram
    module: torch.nn.Module
    device: str

    def __call__(self, arrays: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs of one batch by name."""
        flat = [to_torch(a).to(self.device) for a in self.program.bind(arrays)]
        args, kwargs = pytree.tree_unflatten(flat, self.program.exported.call_spec.in_spec)
        with torch.no_grad():
            out = self.module(*args, **kwargs)
        tensors = pytree.tree_leaves(out)
        return {n: to_numpy(t) for n, t in zip(self.program.output_names, tensors, strict=True)}


def copy_graph(exported: ExportedProgram) -> GraphModule:
    """Return a copy of a program's graph that may be changed; nodes keep their names, tensors are not copied."""
    module: GraphModule = copy.deepcopy(exported.graph_module)
    for old, new in zip(exported.graph.nodes, module.graph.nodes, strict=True):
        new.name = old.name  # copying renames nodes that are named like a builtin, such as `input`
    return module


def rebuild(
    exported: ExportedProgram,
    *,
    module: GraphModule | None = None,
    specs: list[InputSpec] | None = None,
    outputs: list[OutputSpec] | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
    constants: Mapping[str, Any] | None = None,
    keep_examples: bool = True,
) -> ExportedProgram:
    """Return the program with some of its parts replaced; tensors are shared, not copied."""
    module = module or exported.graph_module
    old = exported.graph_signature
    returned = module.graph.output_node().args[0]
    returned_specs = [
        replace(spec, arg=TensorArgument(name=node.name)) if isinstance(node, Node) else spec
        for spec, node in zip(old.output_specs if outputs is None else outputs, returned, strict=True)  # type: ignore[arg-type]
    ]
    signature = ExportGraphSignature(list(specs if specs is not None else old.input_specs), returned_specs)
    return ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=signature,
        state_dict=dict(state if state is not None else exported.state_dict),
        range_constraints=dict(exported.range_constraints),
        module_call_graph=list(exported.module_call_graph),
        example_inputs=exported.example_inputs if keep_examples else None,
        constants=dict(constants if constants is not None else exported.constants),
        verifiers=exported.verifiers,
    )


def state_nodes(exported: ExportedProgram) -> dict[Node, str]:
    """Return the inputs of the graph that are state, and the qualified name of each."""
    return {node: spec.target or "" for node, spec in _state_inputs(exported)}


def _state_inputs(exported: ExportedProgram) -> Iterator[tuple[Node, InputSpec]]:
    by_name = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    for spec in exported.graph_signature.input_specs:
        if spec.kind in STATE_KINDS:
            yield by_name[spec.arg.name], spec


def user_inputs(exported: ExportedProgram) -> list[Node]:
    """Return the inputs of the graph that are the user's."""
    by_name = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    return [by_name[s.arg.name] for s in exported.graph_signature.input_specs if s.kind == InputKind.USER_INPUT]


def tensor_of(exported: ExportedProgram, spec: InputSpec) -> torch.Tensor:
    """Return the tensor of an input that is state."""
    name = spec.target or ""
    value = exported.state_dict[name] if name in exported.state_dict else exported.constants[name]
    assert isinstance(value, torch.Tensor)
    return value


def identity(value: torch.Tensor) -> tuple[Any, ...]:
    """Return a key that two names share if they are one tensor: the same view of the same memory."""
    if value.numel() == 0:
        return (id(value),)
    return value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride(), value.dtype


def sizes(node: Node) -> list[int | None]:
    """Return the shape of a value; None for dynamic axes, not for symbolic ones that can have one size only."""
    return [s if isinstance(s, int) else s.node.maybe_as_int() for s in value_of(node).shape]


def traced_sizes(node: Node) -> list[int]:
    """Return the shape that a value had in the trace, dynamic axes included."""
    return [s if isinstance(s, int) else int(s.node.hint) for s in value_of(node).shape]


def value_of(node: Node) -> torch.Tensor:
    """Return the tensor that represents a node's value, with its shape and dtype."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value


def is_float_activation(node: Node) -> bool:
    """Return whether a node's value is a float32 tensor with axes."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.ndim > 0


def _check_input(name: str, value: npt.NDArray[Any], node: Node) -> npt.NDArray[Any]:
    wanted = value_of(node)
    shape = sizes(node)
    if value.ndim != len(shape) or any(s is not None and s != g for s, g in zip(shape, value.shape, strict=True)):
        text = ", ".join("any" if s is None else str(s) for s in shape)
        raise DataError(f"Input {name} must have shape [{text}], got {list(value.shape)}.")
    dtype = numpy_dtype(wanted.dtype)
    if value.dtype == dtype:
        return value
    if np.issubdtype(value.dtype, np.floating) and np.issubdtype(dtype, np.floating):
        return value.astype(dtype)
    if np.issubdtype(value.dtype, np.integer) and np.issubdtype(dtype, np.integer):
        return value.astype(dtype)
    raise DataError(f"Input {name} must be {dtype}, got {value.dtype}: convert it, or pass a --transform that does.")
