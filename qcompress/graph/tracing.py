"""Tracing of a model into a float program: once, with a batch of 2 and dynamic lengths, where the model allows it."""

import copy
import inspect
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from qcompress.errors import ConfigError, DataError, SourceError, did_you_mean
from qcompress.graph.axes import Axes, batch_axes, dynamic_axes, resized
from qcompress.graph.canonical import canonical, is_odd_float
from qcompress.graph.configurations import eager_attention, traceable
from qcompress.graph.conversion import to_torch
from qcompress.graph.lengths import LengthRange, length_axes, length_ranges, without_others
from qcompress.graph.nodes import arguments, row_of
from qcompress.graph.options import ProgramOptions, unnamed
from qcompress.graph.program import (
    Arrays,
    FloatProgram,
    copy_graph,
    rebuild,
    sizes,
    traced_sizes,
    user_inputs,
    value_of,
)
from qcompress.graph.quantized_modules import check_not_quantized
from qcompress.graph.quiet import quiet_torch
from qcompress.graph.recurrent import RecurrentLayers, with_torchs_layers
from qcompress.graph.value_names import axis_names, input_names

TRACE_BATCH: Final = 2  # torch.export specializes a batch of 1
_TRAINING: Final = ("training", "train")  # arguments that switch operators to training mode


def from_module(module: torch.nn.Module, options: ProgramOptions) -> FloatProgram:
    """Trace a module.

    Args:
        module: any module that torch.export can trace; not modified (its training flags are restored).
        options: example inputs (required), names, dynamic axes.

    Raises:
        ConfigError: there are no example inputs.
        SourceError: torch.export cannot trace the model; the message names the line of the user's code. Or the model
            is quantized already.
    """
    if not options.inputs:
        raise ConfigError(
            "Tracing the model needs an example input: pass --input-shape 1,3,32,32 (the first number is the batch), "
            "or data (--data, --calibration)."
        )
    training = [m for m in module.modules() if m.training]
    notes: tuple[str, ...] = ()
    if module.training:
        notes += ("The model was in training mode; it is exported in eval mode.",)
    inputs = options.inputs
    check_not_quantized(module)
    tensors = (*module.parameters(), *module.buffers())
    odd = sorted({str(t.dtype).removeprefix("torch.") for t in tensors if is_odd_float(t.dtype)})
    if odd:
        notes += (f"The model holds {', '.join(odd)}; it is exported in float32.",)
        module = copy.deepcopy(module).float()
        inputs = {n: v.astype(np.float32) if v.dtype.kind == "f" else v for n, v in inputs.items()}
    module.eval()
    try:
        with traceable(module) as switched:
            args, kwargs = _arguments(module, inputs)
            notes += switched
            try:
                return _trace(module, args, kwargs, options, notes)
            except SourceError:
                with eager_attention(module) as is_offered:
                    if not is_offered:
                        raise
                    eager = "The model is exported with eager attention, because it could not be traced with its own."
                    return _trace(module, args, kwargs, options, (*notes, eager))
    finally:
        for m in training:
            m.training = True


def from_exported(exported: ExportedProgram, options: ProgramOptions) -> FloatProgram:
    """Make an exported program a float program; a fixed batch becomes dynamic, by tracing the program again.

    Raises:
        SourceError: the program has inputs that are not tensors.
    """
    exported, notes = _in_eval_mode(exported)
    nodes = user_inputs(exported)
    given = options.input_names  # a wrong number of names is refused below, where the model's own are known
    names = given if given is not None and len(given) == len(nodes) else input_names(exported)
    dynamic = {
        (n, axis) for n, node in zip(names, nodes, strict=True) for axis, s in enumerate(sizes(node)) if s is None
    }
    is_as_wanted = any(axis == 0 for _, axis in dynamic) and set(options.dynamic or {}) <= dynamic
    if options.fixed_batch is not None:
        batch = next((sizes(node)[0] for node in nodes if sizes(node)), None)
        is_as_wanted = not dynamic and options.fixed_batch in ("example", batch)
    if is_as_wanted:
        return canonical(exported, options, notes, one_batch=False)
    flat = [_example(node, options, i) for i, node in enumerate(nodes)]
    args, kwargs = pytree.tree_unflatten(flat, exported.call_spec.in_spec)
    kept = axis_names(dict(zip(names, nodes, strict=True)), options.dynamic or {}, one_batch=False)
    kept |= dict(options.dynamic or {})
    again = replace(options, input_names=names, dynamic=kept)
    try:
        return _trace(exported.module(check_guards=False), args, kwargs, again, notes)
    except SourceError:
        stays = "The program's inputs stay fixed: it cannot be traced otherwise."
        return canonical(exported, options, (*notes, stays), one_batch=False)


def input_names_of(program: FloatProgram) -> tuple[str, ...]:
    """Return the model's own names for its inputs, which example inputs may use whatever the program calls them."""
    return input_names(program.exported)


def with_fewer_dynamic_axes(program: FloatProgram) -> Iterator[tuple[FloatProgram, str]]:
    """Yield a program with fixed lengths, then with fixed inputs of one sample, and what each is called.

    A program without the inputs with which it was traced, such as a saved one, has zeros for them; nothing is yielded
    if their lengths are unknown, too.
    """
    batch = {key: label for key, label in program.dynamic.items() if label == _batch_label(program)}
    nodes = user_inputs(program.exported)
    if program.exported.example_inputs is not None:
        args, kwargs = program.exported.example_inputs
    elif batch == program.dynamic and program.dynamic:
        zeros = [_example(node, ProgramOptions(), i) for i, node in enumerate(nodes)]
        args, kwargs = pytree.tree_unflatten(zeros, program.exported.call_spec.in_spec)
    else:
        return
    options = ProgramOptions(
        input_names=program.input_names, output_names=program.output_names, dynamic=batch, computes=False, shares=True
    )
    tries = [(options, "fixed lengths")] if batch != program.dynamic else []
    if program.dynamic:
        tries.append((replace(options, dynamic=None, fixed_batch=1), "a fixed batch of 1"))
    for fewer, what in tries:
        try:
            found = _trace(program.module(), args, kwargs, fewer, ())
        except SourceError:
            continue
        if list(found.state()) == list(program.state()):
            yield found, what


def _batch_label(program: FloatProgram) -> str | None:
    return next((label for (_, axis), label in program.dynamic.items() if axis == 0), None)


def _trace(
    module: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: ProgramOptions,
    notes: tuple[str, ...],
) -> FloatProgram:
    """Trace with a batch of 2 and dynamic axes, or with the example as it is if the model allows no dynamic batch."""
    names = list(inspect.signature(module.forward).parameters)[: len(args)]
    names += [f"argument_{i}" for i in range(len(names), len(args))]
    arguments = dict(zip(names, args, strict=True)) | dict(kwargs)
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    if options.fixed_batch is not None:
        return canonical(_fixed(module, leaves, spec, options.fixed_batch), options, notes, one_batch=True)
    fixed: ExportedProgram | None = None
    for axes in batch_axes(leaves):
        of_two = [resized(value, axis, TRACE_BATCH) for value, axis in zip(leaves, axes, strict=True)]
        try:
            exported, ranges = _with_lengths(module, arguments, of_two, spec, axes, options)
        except Exception:
            continue
        if any(sizes(node)[:1] == [None] for node in user_inputs(exported)):
            return canonical(exported, options, notes, one_batch=True, ranges=ranges)
        fixed = fixed or exported
    try:
        fixed = _fixed(module, leaves, spec)
    except SourceError:
        if fixed is None:
            raise
    return canonical(fixed, options, notes, one_batch=True, ranges={})


def _with_lengths(
    module: torch.nn.Module,
    arguments: Mapping[str, Any],
    leaves: Sequence[Any],
    spec: pytree.TreeSpec,
    batch: Sequence[int | None],
    options: ProgramOptions,
) -> tuple[ExportedProgram, dict[str, LengthRange]]:
    """Trace with dynamic axes: the batch, those that the user named or else lengths of tokens, if the model allows it.

    Returns:
        The program, and the lengths that it takes, by symbol.
    """
    args, kwargs = pytree.tree_unflatten(leaves, spec)

    def export(lengths: Axes) -> ExportedProgram:
        dims = dynamic_axes(arguments, batch, lengths, options)
        return _export(module, args, kwargs, dims if kwargs else tuple(dims.values()))

    lengths = length_axes(leaves, batch) if options.dynamic is None else ()
    while any(lengths):
        try:
            exported = export(lengths)
        except Exception:
            break
        kept = without_others(exported, lengths)
        if kept == lengths:
            ranges = length_ranges(module, exported, leaves, spec, lengths)
            if ranges is None:
                break
            return exported, ranges
        lengths = kept
    return export(tuple(frozenset[int]() for _ in leaves)), {}


def _fixed(
    module: torch.nn.Module, leaves: Sequence[Any], spec: pytree.TreeSpec, batch: int | Literal["example"] = "example"
) -> ExportedProgram:
    """Trace with the example as it is, or else with its first sample: a model may take a batch of 1 only.

    Args:
        module: the model.
        leaves: the example inputs.
        spec: of its arguments.
        batch: how many samples of the example; `example`: all.
    """
    guesses = batch_axes(leaves)
    tries = [list(leaves)]
    if batch != "example":
        tries = [[resized(value, axis, batch) for value, axis in zip(leaves, axes, strict=True)] for axes in guesses]
    elif any(axis is not None and len(value) > 1 for value, axis in zip(leaves, guesses[0], strict=True)):
        tries.append([resized(value, axis, 1) for value, axis in zip(leaves, guesses[0], strict=True)])
    failures: list[Exception] = []
    for values in tries:
        args, kwargs = pytree.tree_unflatten(values, spec)
        try:
            return _export(module, args, kwargs, None)
        except Exception as e:
            failures.append(e)
    first = failures[0]
    raise first if isinstance(first, SourceError) else SourceError(_export_failure(first)) from first


def _export(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    with quiet_torch(), torch.no_grad(), RecurrentLayers():  # our own error reports a failure
        try:
            return with_torchs_layers(torch.export.export(module, args, kwargs, dynamic_shapes=shapes))
        except SystemExit as e:
            raise SourceError(f"The model's forward ends the process (sys.exit({e.code!r})): it must return.") from e


def _arguments(module: torch.nn.Module, inputs: Arrays) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Bind arrays to forward's arguments: by name, by position, or several to one dict."""
    tensors = {name: to_torch(value) for name, value in inputs.items()}
    parameters = [p for p in inspect.signature(module.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
    names = [p.name for p in parameters]
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return list(tensors.values()), {}
    by_position = len(tensors) == 1 or (tuple(tensors) == unnamed(len(tensors)) and len(tensors) <= len(names))
    if by_position and not set(tensors) & set(names):
        return list(tensors.values()), {}
    if len(required) == 1 and not set(tensors) & set(names):
        return [tensors], {}
    unknown = sorted(set(tensors) - set(names))
    lacking = [n for n in required if n not in tensors]
    if lacking or unknown:
        faults = [f"{n} is missing." for n in lacking]
        faults += [f"{n} is not an argument.{did_you_mean(n, names)}" for n in unknown]
        raise DataError(
            f"The model's forward takes {', '.join(names)}; the example inputs are {', '.join(tensors)}: "
            + " ".join(faults)
        )
    positional: list[Any] = []
    for name in names:  # positional as far as there is no gap: torch.export then keeps forward's order
        if name not in tensors:
            break
        positional.append(tensors[name])
    rest = {n: tensors[n] for n in names[len(positional) :] if n in tensors}
    return positional, rest


def _example(node: Node, options: ProgramOptions, index: int) -> torch.Tensor:
    """Return an input for tracing an exported program again: the user's, or zeros of the shape of the first trace."""
    given = dict(options.inputs or {})
    named = given.get(node.name, list(given.values())[index] if index < len(given) else None)
    if named is not None:
        return to_torch(named)
    value = value_of(node)
    return torch.zeros(traced_sizes(node), dtype=value.dtype)


def _in_eval_mode(exported: ExportedProgram) -> tuple[ExportedProgram, tuple[str, ...]]:
    """Switch a program that was exported in training mode to eval mode: its BatchNorms and dropouts."""
    trained = [n for n in exported.graph.nodes if n.op == "call_function" and _training_argument(n) is not None]
    if not trained:
        return exported, ()
    module = copy_graph(exported)
    for node in module.graph.nodes:
        position = _training_argument(node) if node.op == "call_function" else None
        if position is not None:
            node.update_arg(position, False)
    module.graph.lint()
    module.recompile()
    return rebuild(exported, module=module), ("The program was exported in training mode; it is used in eval mode.",)


def _training_argument(node: Node) -> int | None:
    """Return the position of an argument `training=True`; None if the node has no such argument."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return None
    if row_of(node).normalizes and arguments(node).get("running_mean") is None:
        return None  # nothing is stored, so it always takes the statistics of the batch
    for position, argument in enumerate(schema.arguments):
        if argument.name in _TRAINING and position < len(node.args) and node.args[position] is True:
            return position
    return None


def _export_failure(error: Exception) -> str:
    """Return one message for a failure of torch.export: the first line of its reason, and the user's line."""
    package = str(Path(torch.__file__).parent)
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith((package, "<")) and "qcompress" not in Path(f.filename).parts
    ]
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    return f"torch.export cannot trace the model{where}: {reason} Change that line so that it can be traced."
