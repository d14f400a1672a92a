"""The three parity checks, each against the float graph of the original."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx

from qcompress.artifacts import FloatWeight
from qcompress.errors import SourceError
from qcompress.gate.validation import Check
from qcompress_exporters.onnx_format import metadata
from qcompress_exporters.onnx_format.int8.grids import read_grids, wrong_grids
from qcompress_exporters.onnx_format.lower import lower
from qcompress_exporters.onnx_format.names import bias_name, offset_name, scale_name
from qcompress_exporters.onnx_format.trace import Trace
from qcompress_exporters.parity.decode import decoded, digests, joined, mismatches
from qcompress_exporters.parity.differences import (
    EXPORTER_TOLERANCE,
    Arrays,
    error_over_spread,
    output_error,
    output_limit,
    outputs_of,
    relative_error,
    same_bits,
    samples_in,
)
from qcompress_exporters.parity.replay import Replay
from qcompress_exporters.parity.sessions import Mode, run, run_each_time, session

OUTPUT_TOLERANCE: Final = 1e-3  # for float outputs computed from the same codes
CODES_OFF: Final = 1e-4  # share of codes that may differ by 1
# The same at one activation, over the root of the number of products in each of its sums: they round in float32.
_ROUNDED: Final = 0.2 * 255 * float(np.finfo(np.float32).eps)
CONSTANT: Final = "the network is constant on this data"


def check_weights(graph: Trace, model: onnx.ModelProto) -> tuple[Check, Arrays | None]:
    """Run check 1, without data: compare every tensor that onnxruntime decodes with the digest that export took.

    Args:
        graph: the trace of the original, without weight values.
        model: the file.

    Returns:
        The check, and the decoded tensors for check 2; None if check 2 cannot use them.
    """
    expected, pieces = digests(model), decoded(model)
    shapes = graph.state_shapes()
    wrong, values = mismatches(model, pieces), joined(pieces, shapes)
    integer = [n for n in shapes if n in values and values[n].dtype == np.int8]
    compute, sites = metadata.sites_from(metadata.entry_of(model, metadata.SITES) or '["float"]')
    extra = {scale_name(n) for n in integer}
    extra |= set(expected) & {
        text(n, i) for text in (bias_name, offset_name) for n in integer for i in range(len(sites))
    }
    strange = sorted(set(values) ^ (set(shapes) | extra))
    read = read_grids(model, sites) if compute == "int8" else []
    grids = wrong_grids(model, sites, read) if compute == "int8" else []
    misshapen = [n for n in shapes if n in values and values[n].shape != shapes[n]]
    counted = f" and {len(sites)} grids" if compute == "int8" else ""
    detail = f"{len(values)} tensors{counted} bit for bit"
    if strange:
        which = "file" if strange[0] in values else "model"
        detail = f"{strange[0]} is in the {which} only: the file was not made from this model"
    elif misshapen:
        name = misshapen[0]
        detail = f"{name} must have shape {list(shapes[name])}, the file has {list(values[name].shape)}"
    elif wrong:
        detail = f"{len(wrong)} of {len(expected)} tensors differ from what was compressed: {', '.join(wrong[:3])}"
    elif grids:
        detail = f"{len(grids)} of {len(sites)} grids differ from what was compressed: {', '.join(grids[:3])}"
    ok = not (strange or misshapen or wrong or grids)
    check = Check(name="weights", session="exact", ok=ok, error=None, limit=0.0, detail=detail)
    return check, None if strange or misshapen or None in read else values


def check_folding(graph: onnx.GraphProto) -> Check:
    """Check that onnxruntime has decoded all weights once, at load.

    Args:
        graph: what onnxruntime runs as deployed.
    """
    left = run_each_time(graph)
    detail = "decoded once, at load"
    if left:
        detail = (
            f"{len(left)} operators decode weights at each run ({', '.join(dict.fromkeys(left))}): onnxruntime folds "
            "nothing larger than 1 GiB; export again, or leave such a weight in float (skip = true in a plan)"
        )
    return Check(name="weights", session="deployed", ok=not left, error=None, limit=0.0, detail=detail)


def float_reference(graph: Trace, model: onnx.ModelProto, values: Arrays) -> bytes:
    """Return the original's graph with a file's decoded tensors as float initializers, at the file's opset."""
    opset = next(o.version for o in model.opset_import if o.domain == "")
    floats = {name: FloatWeight(values=values[name], reason="decoded") for name in graph.state_names}
    return lower(graph, floats, opset, sign=False).serialize()


def check_codes(found: Replay, mode: Mode, samples: int) -> Check:
    """Run check 2 of a file for integer compute in one session: compare its codes with torch's from the same inputs.

    Correct ways to compute a sum in float32 can round a tie differently: one code in 10,000 may differ, by 1; more at
    an activation whose layer has very many inputs.
    """
    codes, off = sum(s.codes for s in found.sites), sum(s.off for s in found.sites)
    culprit = next((s for s in found.sites if s.largest > 1 or s.off > allowed_off(s.codes, s.terms)), None)
    if culprit is None and off > allowed_off(codes):
        culprit = max(found.sites, key=lambda s: s.off / max(1, s.codes))
    errors = {n: (output_error(v, found.got[n]), output_limit(v, OUTPUT_TOLERANCE)) for n, v in found.wanted.items()}
    worst = max(errors, key=lambda name: errors[name][0] / errors[name][1])
    share = off / max(1, codes)
    detail = f"{len(found.sites)} activations, {off:,} of {codes:,} codes off by 1, {samples} samples"
    ok = culprit is None and errors[worst][0] <= errors[worst][1]
    if culprit is not None:
        layer = f" (behind {culprit.layer})" if culprit.layer else ""
        detail = (
            f"first at activation {culprit.site}{layer}: {culprit.off:,} of {culprit.codes:,} codes differ, by up to "
            f"{culprit.largest}"
        )
    elif not ok:
        detail = f"output {worst!r} is off by {errors[worst][0]:.1e} of its spread, though all codes agree"
    return Check(name="graph", session=mode, ok=ok, error=share, limit=CODES_OFF, detail=detail)


def allowed_off(codes: int, terms: int = 1) -> float:
    """Return how many codes of a given number may differ by 1: 1 in 10,000, plus a margin for chance.

    Args:
        codes: the number.
        terms: products in each sum behind a code; from 300 on, more may differ.

    >>> round(allowed_off(100)), round(allowed_off(10**8)), round(allowed_off(10**6, terms=25_088))
    (1, 10301, 1057)
    """
    mean = max(CODES_OFF, _ROUNDED * terms**0.5) * codes
    return float(mean + 3 * np.sqrt(mean) + 1)


def check_graph(packed: bytes, reference: bytes, batches: list[Arrays], mode: Mode) -> Check:
    """Run check 2 in one session: compare the file with the same graph on float weights, bit for bit."""
    left, right = outputs_of(packed, batches, mode), outputs_of(reference, batches, mode)
    if set(left) != set(right):
        detail = f"the file's outputs are {', '.join(left)}, the model's {', '.join(right)}"
        return Check(name="graph", session=mode, ok=False, error=None, limit=0.0, detail=detail)
    different = [n for n in right if left[n].shape != right[n].shape or not same_bits(left[n], right[n])]
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
    """Run check 3 in one session: compare the float model in onnxruntime with torch, within `output_limit`."""
    got = outputs_of(original, batches, mode)
    error, limit, detail = None, EXPORTER_TOLERANCE, ""
    errors: dict[str, tuple[float, float]] = {}
    for name, values in wanted.items():
        if got[name].shape != values.shape:
            detail = f"output {name} has shape {list(got[name].shape)}, torch gives {list(values.shape)}"
        elif not np.isfinite(got[name]).all():
            detail = f"output {name} holds NaN or Inf, torch's does not"
        elif (found := error_over_spread(values, got[name])) is not None:
            errors[name] = found, output_limit(values, EXPORTER_TOLERANCE)
        elif (off := relative_error(values, got[name])) > EXPORTER_TOLERANCE:
            detail = f"output {name}, constant on this data, is off by {off:.1e} relative to its values"
    if not errors:
        detail = detail or f"{CONSTANT}: pass data for which its outputs vary"
    if not detail:
        worst = max(errors, key=lambda name: errors[name][0] / errors[name][1])
        error, limit = errors[worst]
        detail = f"float model, onnxruntime against torch, over the spread of {worst!r}, {samples_in(batches)} samples"
    ok = error is not None and error <= limit
    return Check(name="exporter", session=mode, ok=ok, error=error, limit=limit, detail=detail)


def first_difference(packed: bytes, reference: bytes, feeds: Mapping[str, npt.NDArray[Any]]) -> str | None:
    """Return the first node, in the graph's order, whose value differs between files with the same inner names."""
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
        if left[name].shape != right[name].shape or not same_bits(left[name], right[name]):
            weight = next((i for i in node.input if i in digests(models[0])), None)
            return f"{node.op_type}{f' with {weight}' if weight else ''}"
    return None
