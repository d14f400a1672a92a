"""The three checks of parity, each against the float graph of the original."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx

from qcompress.artifacts import FloatWeight
from qcompress.errors import DataError, SourceError
from qcompress.metrics import is_constant, spread
from qcompress_exporters.decode import decoded, digests, mismatches
from qcompress_exporters.lower import lower
from qcompress_exporters.sessions import Mode, run, session
from qcompress_exporters.trace import Trace

Arrays = dict[str, npt.NDArray[Any]]

EXPORTER_TOLERANCE: Final = 1e-4
CONSTANT: Final = "the network is constant on this data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One of the three checks.

    Args:
        name: `weights`, `graph` or `exporter`.
        session: `exact` or `deployed`.
        ok: whether it passed.
        error: largest difference of an output over its spread; None for weights, and where there is no spread.
        limit: what `error` may be at most.
        detail: one line for people.
    """

    name: str
    session: str
    ok: bool
    error: float | None
    limit: float
    detail: str


def check_weights(graph: Trace, model: onnx.ModelProto) -> tuple[Check, bytes | None]:
    """Check 1, without data: every tensor as onnxruntime decodes it against the digest that export took.

    Args:
        graph: the original's, with open weights.
        model: the file.

    Returns:
        The check, and the original's graph with the decoded floats as initializers: what check 2 compares with. None
        where the file's tensors are not the graph's.
    """
    expected, values = digests(model), decoded(model)
    shapes = graph.state_shapes()
    strange = sorted(set(expected) ^ set(shapes))
    misshapen = [n for n in shapes if n in values and values[n].shape != shapes[n]]
    wrong = mismatches(model, values)
    detail = f"{len(expected)} tensors bit for bit"
    if strange:
        which = "the file alone" if strange[0] in expected else "the model alone"
        detail = f"{strange[0]} is in {which}: the file was not made from this model"
    elif misshapen:
        name = misshapen[0]
        detail = f"{name} must have shape {list(shapes[name])}, the file has {list(values[name].shape)}"
    elif wrong:
        detail = f"{len(wrong)} of {len(expected)} tensors differ from what was compressed: {', '.join(wrong[:3])}"
    ok = not (strange or misshapen or wrong)
    check = Check(name="weights", session="exact", ok=ok, error=None, limit=0.0, detail=detail)
    if strange or misshapen:
        return check, None
    opset = next(o.version for o in model.opset_import if o.domain == "")
    floats = {name: FloatWeight(values=values[name], reason="decoded") for name in shapes}
    return check, lower(graph, floats, opset, sign=False).serialize()


def check_graph(packed: bytes, reference: bytes, batches: list[Arrays], mode: Mode) -> Check:
    """Check 2 in one session: the file against the same graph with its own weights as floats, bit for bit."""
    left, right = outputs_of(packed, batches, mode), outputs_of(reference, batches, mode)
    if set(left) != set(right):
        detail = f"the file's outputs are {', '.join(left)}, the model's {', '.join(right)}"
        return Check(name="graph", session=mode, ok=False, error=None, limit=0.0, detail=detail)
    different = [n for n in right if left[n].shape != right[n].shape or not _same_bits(left[n], right[n])]
    if not different:
        detail = f"{len(right)} output{'s' if len(right) > 1 else ''} bit for bit on {samples_in(batches)} samples"
        return Check(name="graph", session=mode, ok=True, error=0.0, limit=0.0, detail=detail)
    name = different[0]
    where = first_difference(packed, reference, batches[0])
    return Check(
        name="graph", session=mode, ok=False, error=error_over_spread(right[name], left[name]), limit=0.0,
        detail=f"output {name} differs{f', first at {where}' if where else ''}",
    )  # fmt: skip


def check_exporter(original: bytes, wanted: Arrays, batches: list[Arrays], mode: Mode) -> Check:
    """Check 3 in one session: the float model in onnxruntime against torch's outputs, within 1e-4 of their spread."""
    got = outputs_of(original, batches, mode)
    error, detail = None, ""
    errors: dict[str, float] = {}
    for name, values in wanted.items():
        if got[name].shape != values.shape:
            detail = f"output {name} has shape {list(got[name].shape)}, torch gives {list(values.shape)}"
        elif not np.isfinite(got[name]).all():
            detail = f"output {name} holds NaN or Inf, torch's does not"
        elif (found := error_over_spread(values, got[name])) is not None:
            errors[name] = found
        elif (off := _relative_error(values, got[name])) > EXPORTER_TOLERANCE:
            detail = f"output {name}, constant on this data, is off by {off:.1e} of its size"
    if not errors:
        detail = detail or f"{CONSTANT}: give data that its outputs vary on"
    if not detail:
        worst = max(errors, key=lambda name: errors[name])
        error = errors[worst]
        detail = f"float model, onnxruntime against torch, over the spread of {worst!r}, {samples_in(batches)} samples"
    ok = error is not None and error <= EXPORTER_TOLERANCE
    return Check(name="exporter", session=mode, ok=ok, error=error, limit=EXPORTER_TOLERANCE, detail=detail)


def first_difference(packed: bytes, reference: bytes, feeds: Mapping[str, npt.NDArray[Any]]) -> str | None:
    """The first node, in the graph's order, whose value differs between two files with the same inner names."""
    models = [onnx.load_from_string(data) for data in (packed, reference)]
    shared = {o for n in models[1].graph.node for o in n.output} - {o.name for o in models[1].graph.output}
    nodes = {n.output[0]: n for n in models[0].graph.node if n.output[0] in shared}
    for model in models:
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in nodes)
    try:
        left, right = (run(session(m.SerializeToString(), "exact"), feeds) for m in models)
    except SourceError:
        return None
    for name, node in nodes.items():
        if left[name].shape != right[name].shape or not _same_bits(left[name], right[name]):
            weight = next((i for i in node.input if i in digests(models[0])), None)
            return f"{node.op_type}{f' with {weight}' if weight else ''}"
    return None


def outputs_of(model: bytes, batches: list[Arrays], mode: Mode) -> Arrays:
    """All outputs of a file in one session."""
    active = session(model, mode)
    return concatenated([run(active, batch) for batch in batches])


def concatenated(parts: list[Arrays]) -> Arrays:
    """Batches of outputs as one."""
    return {n: np.concatenate([np.atleast_1d(p[n]) for p in parts]) for n in parts[0]}


def check_finite(outputs: Arrays, of: str) -> None:
    """Refuse outputs that cannot be compared.

    Raises:
        DataError: NaN or Inf in one of them.
    """
    for name, values in outputs.items():
        bad = values.size - int(np.isfinite(values).sum())
        if bad:
            raise DataError(
                f"Output {name} of {of} must be finite to be compared, {bad} of its {values.size} values on this data "
                "are NaN or Inf."
            )


def error_over_spread(wanted: npt.NDArray[Any], got: npt.NDArray[Any]) -> float | None:
    """Largest difference over the spread; None where there is no spread to speak of, or no finite difference."""
    if wanted.shape != got.shape or not (np.isfinite(wanted).all() and np.isfinite(got).all()) or is_constant(wanted):
        return None
    return float(np.abs(wanted.astype(np.float64) - got).max() / spread(wanted))


def _relative_error(wanted: npt.NDArray[Any], got: npt.NDArray[Any]) -> float:
    size = float(np.sqrt(np.mean(np.square(wanted.astype(np.float64)))))
    return float(np.abs(wanted.astype(np.float64) - got).max()) / max(size, EXPORTER_TOLERANCE)


def _same_bits(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def samples_in(batches: list[Arrays]) -> int:
    """How many samples batches hold."""
    return sum(len(next(iter(b.values()))) for b in batches)
