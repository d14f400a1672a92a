"""What the zoo measures of one net in one mode: whether its file computes what it should, its bytes, its operators."""

import re
import resource
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from zoo_nets.net import SAMPLES, Example, Net

from qcompress.compressed.model import CompressedModel
from qcompress.data.dataset import Dataset, as_dataset
from qcompress.errors import SourceError
from qcompress.graph.options import ProgramOptions
from qcompress.graph.program import FloatProgram
from qcompress.graph.tracing import from_module
from qcompress.metrics.similarity import is_constant, sqnr_db
from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.settings import PosthocSettings
from qcompress_exporters import build, validate
from qcompress_exporters.parity.differences import output_error, output_limit
from qcompress_exporters.parity.sessions import optimized, run, session
from qcompress_exporters.report import Built, ExportReport

Arrays = dict[str, npt.NDArray[Any]]

W4, W8A8 = "W4", "W8A8"
MODES = (W4, W8A8)
TOLERANCE = 1e-3  # largest difference over the spread of the outputs, between two ways to compute in float32
SAMPLES_REPLAYED = 2  # whose activations are compared code by code with the float program's, rounded alike
BATCHES = (1, 2, 3)
LENGTH = "length"
PATHS = re.compile(r"/\S*/(?=(benchmarks|site-packages)/)")  # where this machine keeps files

OK = "ok"
REASONS = {
    OK: "the file is written, loads, and computes what it should at all batches and lengths that it takes",
    "not traceable": "torch.export cannot trace the module, and no setting of ours can help",
    "data-dependent": "what the module computes depends on the values of its inputs: a loop, a branch or a shape",
    "operator not in ONNX": "torch.onnx has no translation for an operator of the module",
    "runtime refuses": "onnxruntime cannot load the file, or cannot run it at a batch or length that it promises",
    "wrong output": f"the file differs from what it should compute by more than {TOLERANCE:g} of the outputs' spread; "
    "in W8A8, a check of `validate` fails, in the session without fusions",
    "no integer layer": "W8A8 was asked for, and all layers compute in float",
    "time limit": "the net took longer than it may",
    "ended": "the process ended without a result, for example for lack of memory",
    "error": "any other error: a fault of the tool, or of the zoo",
}


def modes(net: Net) -> tuple[str, ...]:
    """Return the modes in which a net is measured."""
    return MODES if net.convolutional else (W4,)


class WrongOutputError(Exception):
    """A file does not compute what it should."""


@dataclass(frozen=True)
class Record:
    """The figures of one net in one mode.

    Args:
        net: its name.
        mode: `W4` or `W8A8`.
        outcome: a key of REASONS.
        detail: the error's message; empty if there is none.
        parameters: number of the module's parameters.
        nbytes: of the file.
        ideal: bytes of packed codes, tables, scales, and tensors left in float.
        left_float: share of the file's bytes that are tensors left in float, int32 biases excluded.
        largest_float: the largest of these tensors.
        batches: batch sizes that the file was run with.
        lengths: `any`, if the file takes two other lengths; `fixed`, if it takes only its own; empty if there is none.
        difference: the largest difference over the spread, of the float program from the user's module and, in W4,
            of the file from the module with the decoded weights.
        sqnr: of the file's outputs against the user's float module, in dB.
        int8: number of operators that compute in 8-bit integers in onnxruntime.
        float_between: number of operators that compute in float on a path between two of these.
        seconds: CPU seconds of the process.
        notes: what the tool says about the file.
    """

    net: str
    mode: str
    outcome: str
    detail: str = ""
    parameters: int = 0
    nbytes: int = 0
    ideal: int = 0
    left_float: float = 0.0
    largest_float: str = ""
    batches: tuple[int, ...] = ()
    lengths: str = ""
    difference: float | None = None
    sqnr: float | None = None
    int8: int = 0
    float_between: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


def measured(net: Net, mode: str) -> Record:
    """Return the figures of a net in a mode; a failure is an outcome, not an exception."""
    try:
        torch.manual_seed(0)
        with torch.no_grad():
            example = net.make()
        return figures(net, mode, example)
    except Exception as e:
        text = PATHS.sub("", " ".join(str(e).split())) or type(e).__name__
        known = isinstance(e, (SourceError, WrongOutputError, NoIntegerLayerError))
        return Record(net.name, mode, reason(e), text if known else f"{type(e).__name__}: {text}", seconds=seconds())


def figures(net: Net, mode: str, example: Example) -> Record:
    """Compress, write and run a net.

    Raises:
        WrongOutputError: the file does not compute what it should.
        QCompressError: a step fails.
    """
    inputs = {name: value.numpy() for name, value in example.inputs.items()}
    program = traced(net, example, inputs)
    bits = {"bits": 4} if mode == W4 else {"bits": 8, "activation_bits": 8}
    calibration = None if mode == W4 else as_dataset(inputs)
    small = compress_program(program, Plan.from_flags(**bits), PosthocSettings(effort="fast"), calibration=calibration)
    built = build(small)
    takes_lengths = any(label != "batch" for label in program.dynamic.values())
    batches = BATCHES if program.fixed_batch is None else (program.fixed_batch,)
    contestants = Contestants.of(example.module, small, built.data)
    difference, sqnr = compared(net, mode, example, contestants, batches)
    if takes_lengths:
        for length in net.lengths:
            other = {n: of_length(v, net.length_axes.get(n), length) for n, v in example.inputs.items()}
            found, _ = compared(net, mode, Example(example.module, other), contestants, batches[-1:])
            difference = max(difference, found)
    int8, between = operators(optimized(built.data))
    if mode == W8A8:
        if not int8:
            raise NoIntegerLayerError("; ".join(sorted({layer.why for layer in built.report.layers})))
        check_integers(small, built, as_dataset(inputs))
    share, largest = left_float(built.report)
    return Record(
        net.name, mode, OK,
        parameters=sum(p.numel() for p in example.module.parameters()),
        nbytes=built.report.size.file, ideal=built.report.size.ideal, left_float=share, largest_float=largest,
        batches=batches, lengths=("any" if takes_lengths else "fixed") if net.lengths else "",
        difference=difference, sqnr=sqnr, int8=int8, float_between=between, seconds=seconds(),
        notes=tuple(dict.fromkeys((*small.notes, *built.report.notes))),
    )  # fmt: skip


class NoIntegerLayerError(Exception):
    """A file for integer compute has no integer layer."""


def traced(net: Net, example: Example, inputs: Arrays) -> FloatProgram:
    """Return the float program with a dynamic length, or without one if the batch is dynamic only then."""
    if net.length_axes:
        dynamic = {(name, axis): f"{name}_{LENGTH}" for name, axis in net.length_axes.items()}
        program = from_module(example.module, ProgramOptions(inputs=inputs, dynamic=dynamic))
        if program.fixed_batch is None:
            return program
    return from_module(example.module, ProgramOptions(inputs=inputs))


@dataclass(frozen=True)
class Contestants:
    """What gives outputs: the user's module, the traced program, the module with decoded weights, and the file."""

    users: Callable[[Mapping[str, Tensor]], Arrays]
    floats: Callable[[Arrays], Arrays]
    decoded: Callable[[Arrays], Arrays]
    file: Callable[[Arrays], Arrays]

    @classmethod
    def of(cls, module: torch.nn.Module, small: CompressedModel, data: bytes) -> "Contestants":
        """Return the contestants of a compressed model."""
        weights = {name: a.dequantize() for name, a in small.artifacts.items()}
        active = session(data, "exact")  # as deployed, sums of 8-bit products saturate on some CPUs
        return cls(
            lambda feeds: dict(zip(small.program.output_names, outputs(module, feeds), strict=True)),
            small.program.runner(),
            small.program.with_state(weights).runner(),
            lambda feeds: run(active, feeds),
        )


def compared(
    net: Net, mode: str, example: Example, contestants: Contestants, batches: tuple[int, ...]
) -> tuple[float, float | None]:
    """Run a file and what it must agree with on the first samples in batches of these sizes.

    Returns:
        The largest difference over the spread, and the least SQNR against the user's module in dB, over all outputs.

    Raises:
        WrongOutputError: they differ by more than is allowed.
    """
    parts: list[tuple[Arrays, Arrays, Arrays, Arrays]] = []
    start = 0
    for batch in batches:
        feeds = {n: samples(v, net.batch_axes.get(n, 0), start, batch) for n, v in example.inputs.items()}
        start += batch
        arrays = {n: v.numpy() for n, v in feeds.items()}
        wanted = contestants.decoded(arrays) if mode == W4 else {}
        parts.append((contestants.users(feeds), contestants.floats(arrays), wanted, contestants.file(arrays)))
    users, floats, wanted, got = (joined([part[i] for part in parts]) for i in range(4))
    checks = [("the traced program from the user's module", users, floats)]
    if mode == W4:
        checks.append(("the file from the module with the decoded weights", wanted, got))
    difference = 0.0
    for what, a, b in checks:
        for name in a:
            error = output_error(a[name], b[name])
            difference = max(difference, error)
            if error > output_limit(a[name], TOLERANCE):
                raise WrongOutputError(f"{name}: {what} by {error:.1e} of the spread ({shapes(a[name], b[name])})")
    sqnr = min((d for n in users if (d := decibels(users[n], got[n])) is not None), default=None)
    return difference, sqnr


def check_integers(small: CompressedModel, built: Built, data: Dataset) -> None:
    """Check a file for integer compute against the float program, activation by activation.

    Raises:
        WrongOutputError: they differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        built.write(path)
        report = validate(small, path, data.head(max(SAMPLES_REPLAYED, small.program.fixed_batch or 1)))
    # As deployed, sums of 8-bit products saturate on some CPUs; what the exporter does is compared with TOLERANCE.
    failed = [c.detail for c in report.checks if c.session == "exact" and c.name != "exporter" and not c.ok]
    if failed:
        raise WrongOutputError("; ".join(failed))


def outputs(module: torch.nn.Module, feeds: Mapping[str, Tensor]) -> list[npt.NDArray[Any]]:
    """Return the tensors that the user's module returns, in their order."""
    with torch.no_grad():
        leaves = pytree.tree_leaves(module(**feeds))
    return [leaf.numpy() for leaf in leaves if isinstance(leaf, Tensor)]


def samples(value: Tensor, axis: int, start: int, count: int) -> Tensor:
    """Return some samples of an input, counted around its end."""
    return value.index_select(axis, torch.arange(start, start + count) % value.shape[axis])


def of_length(value: Tensor, axis: int | None, length: int) -> Tensor:
    """Return an input cut, or repeated, to a length."""
    return value if axis is None else samples(value, axis, 0, length)


def joined(parts: list[Arrays]) -> Arrays:
    """Return several batches of outputs as one, samples along the first axis.

    Samples lie along the axis whose size differs by batch. If several do, as in a matrix of all pairs, each value
    counts as a sample.
    """
    whole = {}
    for name in parts[0]:
        values = [np.atleast_1d(part[name]) for part in parts]
        axes = [i for i in range(values[0].ndim) if len({v.shape[i] for v in values}) > 1]
        if len(axes) > 1:
            whole[name] = np.concatenate([v.reshape(-1) for v in values])
        else:
            whole[name] = np.concatenate([np.moveaxis(v, axes[0] if axes else 0, 0) for v in values])
    return whole


def shapes(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> str:
    """Return the shapes of two arrays in words."""
    return f"shapes {list(a.shape)} and {list(b.shape)}"


def decibels(reference: npt.NDArray[Any], value: npt.NDArray[Any]) -> float | None:
    """Return the SQNR of an output; None if it is exact or constant."""
    return None if is_constant(reference) else sqnr_db(reference, value)


def left_float(report: ExportReport) -> tuple[float, str]:
    """Return the share of the file that stays float, and the largest tensor of it."""
    floats = [t for t in report.left_in_float if t.encoding != "int32"]
    largest = max(floats, key=lambda t: t.nbytes, default=None)
    name = "" if largest is None else f"{largest.name} {list(largest.shape)}: {largest.why}"
    return sum(t.nbytes for t in floats) / report.size.file, name


INTEGER = ("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm")
CASTS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


def operators(graph: onnx.GraphProto) -> tuple[int, int]:
    """Return the number of integer operators of an optimized graph, and of float ones on a path between two of them.

    Conversions between the two and operators on constants do not count.
    """
    is_float = {v.name: v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for v in graph.input}
    behind: set[str] = set()  # values that depend on an integer operator
    candidates, integers = [], []
    for node in graph.node:
        variable = [name for name in node.input if name in is_float]
        integer = node.op_type.startswith("QLinear") or node.op_type in INTEGER
        if integer:
            integers.append(node)
        elif node.op_type not in CASTS and any(is_float[n] for n in variable) and behind.intersection(variable):
            candidates.append(node)
        if integer or behind.intersection(variable):
            behind.update(node.output)
        for name in node.output:
            if variable:
                is_float[name] = gives_float(node, any(is_float[n] for n in variable))
    before: set[str] = set()  # values that an integer operator depends on
    integer_ids = {id(node) for node in integers}
    for node in reversed(graph.node):
        if id(node) in integer_ids or before.intersection(node.output):
            before.update(node.input)
    return len(integers), sum(bool(before.intersection(node.output)) for node in candidates)


def gives_float(node: onnx.NodeProto, takes_float: bool) -> bool:
    """Return whether an operator's outputs are floats."""
    if node.op_type == "Cast":
        return any(a.name == "to" and a.i == onnx.TensorProto.FLOAT for a in node.attribute)
    if node.op_type in ("DequantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"):
        return True
    if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear", "Shape", "ConvInteger", "MatMulInteger"):
        return False
    return takes_float and not node.op_type.startswith("QLinear")


def reason(error: Exception) -> str:
    """Return the key of REASONS for an exception."""
    text = str(error)
    if isinstance(error, WrongOutputError):
        return "wrong output"
    if isinstance(error, NoIntegerLayerError):
        return "no integer layer"
    if not isinstance(error, SourceError):
        return "error"
    if text.startswith("torch.export"):
        words = ("data-dependent", "Data dependent", "data dependent")
        return "data-dependent" if any(word in text for word in words) else "not traceable"
    if text.startswith("torch.onnx has no translation"):
        return "operator not in ONNX"
    if text.startswith(("onnxruntime", "The file does not run")):
        return "runtime refuses"
    return "error"


def seconds() -> float:
    """Return the CPU seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


assert sum(BATCHES) == SAMPLES
