"""A traced graph in the form that everything else reads: pruned, out of place, with names for inputs and outputs."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputSpec, OutputKind, TensorArgument
from torch.fx import Node

from qcompress.errors import ConfigError, SourceError
from qcompress.graph.composites import without_composites
from qcompress.graph.constants import compute_weights
from qcompress.graph.in_place import out_of_place, without_mutations
from qcompress.graph.lengths import LengthRange
from qcompress.graph.nodes import row_of
from qcompress.graph.options import ProgramOptions
from qcompress.graph.program import (
    STATE_KINDS,
    FloatProgram,
    copy_graph,
    identity,
    rebuild,
    sizes,
    state_nodes,
    tensor_of,
    user_inputs,
    value_of,
)
from qcompress.graph.random_operators import check_repeatable
from qcompress.graph.recurrent import with_own_layers, with_torchs_layers
from qcompress.graph.value_names import axis_names, input_names, is_tokens, output_names
from qcompress.graph.views import with_contiguous_views
from qcompress.kinds import COUNTER


def canonical(
    exported: ExportedProgram,
    options: ProgramOptions,
    notes: tuple[str, ...],
    *,
    one_batch: bool,
    ranges: Mapping[str, LengthRange] | None = None,
) -> FloatProgram:
    """Drop what the graph does not use and all in-place operators, and name tied tensors, inputs and outputs.

    Args:
        exported: as torch.export returned it.
        options: the user's names.
        notes: notes so far.
        one_batch: whether every dynamic first axis is the batch; if not, those of another symbol get their own names.
        ranges: lengths that the program takes, by symbol; None: it was not asked for others.
    """
    for node in user_inputs(exported):
        if not isinstance(node.meta.get("val"), torch.Tensor):
            raise SourceError(
                f"The model's input {node.name} must be a tensor, got {type(node.meta.get('val')).__name__}: "
                "wrap the model in a module whose forward takes tensors only."
            )
    notes = (
        *notes,
        *(
            f"The model changes its buffer {n} as it runs; the file keeps its present value."
            for n in _mutated(exported)
        ),
    )
    _check_outputs(exported)
    exported = out_of_place(_prune(without_mutations(with_own_layers(exported))))
    exported = _prune(with_torchs_layers(exported))
    check_repeatable(exported.graph)
    exported = with_contiguous_views(without_composites(exported))
    if options.computes and (computed := compute_weights(exported)) is not exported:
        exported = _prune(computed)
    exported = exported if options.shares else _with_own_tensors(exported)
    state = _checked_state(exported)
    inputs = _check_names(options.input_names, input_names(exported), "--input-names", "inputs")
    clash = sorted(state & set(inputs))
    if clash:
        raise SourceError(f"{clash[0]} names both an input and a tensor of the model: rename one of them in the model.")
    taken = state | set(inputs)
    names = tuple(f"{n}_output" if n in taken else n for n in output_names(exported))
    outputs = _check_names(options.output_names, names, "--output-names", "outputs")
    if doubled := sorted(set(outputs) & taken):
        raise ConfigError(
            f"--output-names: {doubled[0]} names an input or a tensor of the model already: name another."
        )
    nodes = dict(zip(inputs, user_inputs(exported), strict=True))
    _check_dynamic(options, {name: value_of(node).ndim for name, node in nodes.items()})
    dynamic = axis_names(nodes, options.dynamic or {}, one_batch=one_batch)
    notes = (*notes, *_size_notes(nodes, dynamic, options, ranges))
    stuck = [f"{name}:{axis}" for name, axis in options.dynamic or {} if axis and (name, axis) not in dynamic]
    if stuck:
        notes = (*notes, f"The model allows no other size of {', '.join(stuck)}: it stays fixed despite --dynamic.")
    return FloatProgram(exported, inputs, outputs, dynamic, notes)


def _size_notes(
    nodes: Mapping[str, Node],
    dynamic: Mapping[tuple[str, int], str],
    options: ProgramOptions,
    ranges: Mapping[str, LengthRange] | None,
) -> list[str]:
    """Return notes on what stays fixed, and on lengths that have limits."""
    if not dynamic:
        shapes = ", ".join(f"{n} {sizes(node)}" for n, node in nodes.items())
        if options.fixed_batch is not None:
            return [f"Exported with a fixed batch: {shapes}."]
        return [f"The model takes one batch size only: it is exported with fixed inputs ({shapes})."]
    notes = []
    if not any(axis == 0 for _, axis in dynamic):
        batch = next((sizes(node)[0] for node in nodes.values() if sizes(node)), None)
        notes.append(f"The model takes one batch size only: {batch}.")
    for symbol, limits in (ranges or {}).items():
        named = [n for n, node in nodes.items() if any(str(size) == symbol for size in value_of(node).shape)]
        if named and limits.is_limited:
            notes.append(f"Lengths of {', '.join(named)} may be {limits}.")
    fixed = [f"{n} ({sizes(node)[1]})" for n, node in nodes.items() if is_tokens(value_of(node)) and sizes(node)[1]]
    if fixed and options.dynamic is None:
        why = "it was exported with it" if ranges is None else "no other could be traced"
        notes.append(f"The length of {', '.join(fixed)} stays fixed: {why}.")
    return notes


def _check_outputs(exported: ExportedProgram) -> None:
    """Refuse outputs that a file cannot return: values that are not tensors, and the model's own tensors."""
    own = {node.name: name for node, name in state_nodes(exported).items()}
    specs = [s for s in exported.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT]
    for name, spec in zip(output_names(exported), specs, strict=True):
        if not isinstance(spec.arg, TensorArgument):
            value = getattr(spec.arg, "value", None)
            raise SourceError(
                f"The model's output {name} must be a tensor, got {value!r}: wrap the model in a module whose forward "
                "returns tensors only."
            )
        if spec.arg.name in own:
            raise SourceError(
                f"The model's output {name} must be computed from its inputs, but it is the model's own tensor "
                f"{own[spec.arg.name]}: wrap the model in a module whose forward leaves it out."
            )


def _mutated(exported: ExportedProgram) -> list[str]:
    """Return the buffers that the program writes to."""
    state = state_nodes(exported)
    written = set(exported.graph_signature.buffers_to_mutate.values())
    for node in exported.graph.nodes:
        if node.args and node.args[0] in state and getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            written.add(state[node.args[0]])
    return sorted(name for name in written if not name.endswith(COUNTER))


def _checked_state(exported: ExportedProgram) -> set[str]:
    """Return the names of the program's tensors; refuses dtypes that cannot be exported."""
    state = {name: tensor_of(exported, spec) for spec in exported.graph_signature.input_specs if (name := spec.target)}
    for name, value in state.items():
        if is_odd_float(value.dtype) and (value.dtype != torch.float64 or value.ndim > 1):
            raise SourceError(
                f"{name} must be float32, got {str(value.dtype).removeprefix('torch.')}: export the program of "
                "model.float(), with float32 inputs."
            )
    return set(state)


def _with_own_tensors(exported: ExportedProgram) -> ExportedProgram:
    """Return the program with copies of its tensors, tied ones still tied: no one else's training reaches it."""
    copies: dict[tuple[Any, ...], torch.Tensor] = {}

    def own(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        same = identity(value)
        if same not in copies:
            copy_of = value.detach().clone()
            copies[same] = torch.nn.Parameter(copy_of, False) if isinstance(value, torch.nn.Parameter) else copy_of
        return copies[same]

    state = {name: own(value) for name, value in exported.state_dict.items()}
    constants = {name: own(value) for name, value in exported.constants.items()}
    return rebuild(exported, state=state, constants=constants)


def _check_dynamic(options: ProgramOptions, ranks: Mapping[str, int]) -> None:
    for name, axis in options.dynamic or {}:
        if name not in ranks:
            raise ConfigError(f"--dynamic: the model has no input {name!r}; it has {', '.join(ranks)}.")
        if axis >= ranks[name]:
            raise ConfigError(f"--dynamic: input {name} has {ranks[name]} axes, so it has no axis {axis}.")


def _check_names(given: tuple[str, ...] | None, default: tuple[str, ...], flag: str, what: str) -> tuple[str, ...]:
    if given is None:
        return default
    if len(given) != len(default) or len(set(given)) != len(given):
        raise ConfigError(
            f"{flag} must be {len(default)} different names (the {what}: {', '.join(default)}), got {','.join(given)}."
        )
    return given


def _prune(exported: ExportedProgram) -> ExportedProgram:
    """Drop unused nodes and state, and let tied tensors enter once, under their first name."""
    module = copy_graph(exported)
    # A dropout counts as impure, since it draws random numbers; outside of training it does not.
    module.graph.eliminate_dead_code(lambda node: node.is_impure() and not row_of(node).drops)
    by_name = {n.name: n for n in module.graph.nodes if n.op == "placeholder"}
    first_name: dict[tuple[Any, ...], str] = {}
    for name, value in exported.state_dict.items():
        first_name.setdefault(identity(value), name)
    kept: dict[tuple[Any, ...], Node] = {}
    specs: list[InputSpec] = []
    for spec in exported.graph_signature.input_specs:
        node = by_name[spec.arg.name]
        if spec.kind not in STATE_KINDS:
            specs.append(spec)
            continue
        same = identity(tensor_of(exported, spec))
        if same in kept:
            node.replace_all_uses_with(kept[same])
        if not node.users:
            module.graph.erase_node(node)
            continue
        kept.setdefault(same, node)
        specs.append(replace(spec, target=first_name.get(same, spec.target)))
    module.recompile()
    return rebuild(exported, module=module, specs=specs)


def is_odd_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype != torch.float32
