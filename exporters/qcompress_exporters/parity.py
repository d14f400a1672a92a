"""Is the file still right? Three checks that are reported apart, so that one cannot hide what another would show.

1. Weights, no data: every tensor as onnxruntime decodes it equals what was compressed, bit for bit.
2. Graph: the file against the same graph with those floats as initializers, same session, bit for bit.
3. Exporter: onnxruntime against torch on the float model.

A collapsed 1-bit net passes any one of them alone. Errors are divided by the spread of an output over the samples.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx

from qcompress.artifacts import FloatWeight
from qcompress.batchnorm import fold_batchnorm
from qcompress.compressed import CompressedModel
from qcompress.data import Dataset
from qcompress.errors import DataError, SourceError
from qcompress.metrics import Metric, MetricResult, agreement, compare, is_constant, spread, sqnr_db
from qcompress.program import FloatProgram
from qcompress_exporters import metadata
from qcompress_exporters.decode import decoded, digests
from qcompress_exporters.lower import lower, tensor_digest
from qcompress_exporters.onnx_file import float_file
from qcompress_exporters.sessions import Mode, cpu_features, optimized_ops, run, session
from qcompress_exporters.trace import Trace, trace

Arrays = dict[str, npt.NDArray[Any]]
Track = Callable[[Iterable[Any]], Iterable[Any]]

EXPORTER_TOLERANCE: Final = 1e-4
PARITY_SAMPLES: Final = 256
BATCH: Final = 64
CONSTANT: Final = "the network is constant on this data"
_MODES: Final[tuple[Mode, ...]] = ("exact", "deployed")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputReport:
    """How one output of the file compares with the original's, as deployed.

    Args:
        sqnr_db: signal to quantization noise; None: no noise at all.
        agreement: share of samples with the same largest entry; None where the output is no score per class.
        constant: whether the file's output hardly varies over the data.
    """

    sqnr_db: float | None
    agreement: float | None
    constant: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """All that `validate` measured; `as_dict` is FILE.validation.json.

    Args:
        file: name, digest and bytes of the file.
        data: name, digest, samples and whether there are labels.
        checks: the three checks in both sessions.
        outputs: by name of the output.
        metric: the user's metric, where there are labels.
        same_ops: whether onnxruntime's optimised graph of the file holds the same operators as the float file's.
        same_source: whether the file was exported from this very model file; None where that is not known.
        cpu: features that integer kernels depend on.
        notes: what a user should be told.
    """

    file: Mapping[str, Any]
    data: Mapping[str, Any]
    checks: tuple[Check, ...]
    outputs: Mapping[str, OutputReport]
    metric: MetricResult | None
    same_ops: bool
    same_source: bool | None
    cpu: Mapping[str, bool | None]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all checks passed."""
        return all(check.ok for check in self.checks)

    @property
    def agreement(self) -> float | None:
        """Of the first output that has one."""
        return next((o.agreement for o in self.outputs.values() if o.agreement is not None), None)

    @property
    def sqnr_db(self) -> float | None:
        """The worst of all outputs; None: no noise at all."""
        values = [o.sqnr_db for o in self.outputs.values() if o.sqnr_db is not None]
        return min(values) if values else None

    def as_dict(self) -> dict[str, Any]:
        """The JSON document; its keys are documented in docs/json.md."""
        return {
            "format_version": metadata.VALIDATION_FORMAT,
            "ok": self.ok,
            "file": dict(self.file),
            "data": dict(self.data),
            "parity": [asdict(check) for check in self.checks],
            "outputs": {name: asdict(output) for name, output in self.outputs.items()},
            "agreement": self.agreement,
            "sqnr_db": self.sqnr_db,
            "metric": None if self.metric is None else asdict(self.metric),
            "same_ops": self.same_ops,
            "same_source": self.same_source,
            "cpu": dict(self.cpu),
            "notes": list(self.notes),
        }


def validate(
    model: FloatProgram | CompressedModel,
    path: str | Path,
    data: Dataset,
    *,
    metric: Metric | None = None,
    source_digest: str = "",
    seed: int = 0,
    device: str = "cpu",
    track: Track = iter,
) -> ParityReport:
    """Measure a file that `export` wrote against its original.

    Args:
        model: the original; of a compressed model, its float program.
        path: the file.
        data: inputs, with labels where there are any.
        metric: what to measure where there are labels.
        source_digest: short digest of the model file that `model` was read from; a compressed model knows its own.
        seed: of the bootstrap.
        device: where the original runs.
        track: passes batches on: a progress bar.

    Raises:
        SourceError: the file is not one of ours, or onnxruntime cannot load it.
        DataError: the data does not fit the model.
    """
    file = metadata.read(Path(path))
    if not file.is_ours:
        raise SourceError(f"{path} was not written by qcompress: validate compares a file with what export knew of it.")
    if isinstance(model, CompressedModel):
        program, source_digest = model.program, model.source_digest
    else:
        program = model
    _check_names(program, file)
    weights, reference, graph = _reference(program, file.model)
    data = _usable(program, data)
    head = list(_bound(program, _usable(program, data.head(max(PARITY_SAMPLES, program.fixed_batch or 0)))))
    packed = file.model.SerializeToString()
    checks = [weights]
    if reference is not None:
        checks += [_graph_check(packed, reference, head, mode) for mode in _MODES]
    original = float_file(graph, fold_batchnorm(program).state())
    checks += [_exporter_check(original, program, head, mode, device) for mode in _MODES]
    ours, theirs = _both(program, packed, data, device, track)
    _check_finite(theirs, "the original")
    _check_finite(ours, str(path))
    for name in program.output_names:
        if ours[name].shape != theirs[name].shape:
            ours_shape, theirs_shape = (list(o[name].shape[1:]) for o in (ours, theirs))
            raise SourceError(
                f"{path} was not made from this model: its output {name} has shape {ours_shape} for each sample, "
                f"the model's {theirs_shape}."
            )
    outputs = {name: _output_report(theirs[name], ours[name]) for name in program.output_names}
    made_from = file.metadata.get(metadata.SOURCE, "")
    same_source = made_from == source_digest if made_from and source_digest else None
    notes = [
        f"output {name}: {CONSTANT}, so that parity and agreement prove nothing"
        for name, o in outputs.items()
        if o.constant
    ]
    if same_source is False:
        notes.append(
            f"{file.path.name} was not exported from this model file (it was from one with the digest {made_from}, "
            f"this one has {source_digest}): where it should have been, export it again"
        )
    measured = None
    if metric is not None:
        if data.labels is None:
            raise DataError(f"The metric {metric.name} needs labels (an array y), but {data.name} has none.")
        measured = compare(metric, theirs, ours, data.labels, seed=seed)
    return ParityReport(
        file={"name": file.path.name, "digest": file.digest, "nbytes": file.nbytes},
        data={
            "name": data.name,
            "digest": data.digest,
            "samples": data.samples,
            "labels": data.labels is not None,
        },
        checks=tuple(checks),
        outputs=outputs,
        metric=measured,
        same_ops=optimized_ops(packed) == optimized_ops(original),
        same_source=same_source,
        cpu=cpu_features(),
        notes=tuple(notes),
    )


def _check_names(program: FloatProgram, file: metadata.CompressedFile) -> None:
    for what, wanted, values in (
        ("inputs", program.input_names, file.model.graph.input),
        ("outputs", program.output_names, file.model.graph.output),
    ):
        if sorted(wanted) != sorted(v.name for v in values):
            raise SourceError(
                f"{file.path} was not made from this model: its {what} are {', '.join(v.name for v in values)}, "
                f"the model's {', '.join(wanted)}."
            )


def _reference(program: FloatProgram, model: onnx.ModelProto) -> tuple[Check, bytes | None, Trace]:
    """Check 1, and the original's own graph with the decoded floats as initializers, where that can be built."""
    graph = trace(fold_batchnorm(program))
    expected = digests(model)
    values = decoded(model)
    wrong = [name for name, digest in expected.items() if tensor_digest(name, values[name]) != digest]
    state = program_state_shapes(graph)
    strange = sorted(set(expected) ^ set(graph.state_names))
    misshapen = [n for n in graph.state_names if n in values and values[n].shape != state[n]]
    detail = f"{len(expected)} tensors bit for bit"
    if strange:
        which = "the file alone" if strange[0] in expected else "the model alone"
        detail = f"{strange[0]} is in {which}: the file was not made from this model"
    elif misshapen:
        name = misshapen[0]
        detail = f"{name} must have shape {list(state[name])}, the file has {list(values[name].shape)}"
    elif wrong:
        detail = f"{len(wrong)} of {len(expected)} tensors differ from what was compressed: {', '.join(wrong[:3])}"
    ok = not (strange or misshapen or wrong)
    check = Check(name="weights", session="exact", ok=ok, error=None, limit=0.0, detail=detail)
    if strange or misshapen:
        return check, None, graph
    opset = next(o.version for o in model.opset_import if o.domain == "")
    floats = {name: FloatWeight(values=values[name], reason="decoded") for name in graph.state_names}
    return check, lower(graph, floats, opset, sign=False).serialize(), graph


def program_state_shapes(graph: Trace) -> dict[str, tuple[int, ...]]:
    """Shapes of the open tensors of a trace."""
    return {
        v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
        for v in graph.base.graph.input
        if v.name in graph.state_names
    }


def _usable(program: FloatProgram, data: Dataset) -> Dataset:
    """The data as whole batches, where the program takes one size alone."""
    size = program.fixed_batch
    if data.samples < 2:
        raise DataError(f"Parity needs at least 2 samples, whose outputs can differ; {data.name} has {data.samples}.")
    if size is None:
        return data
    if data.samples < size:
        raise DataError(f"The model takes batches of {size} alone, {data.name} has {data.samples} samples: give more.")
    return data.head(data.samples - data.samples % size)


def _bound(program: FloatProgram, data: Dataset) -> Iterator[Arrays]:
    """Batches of inputs by the graph's names, as large as the graph takes them."""
    for batch in data.batches(program.fixed_batch or BATCH):
        yield dict(zip(program.input_names, program.bind(batch.inputs), strict=True))


def _graph_check(packed: bytes, reference: bytes, batches: list[Arrays], mode: Mode) -> Check:
    """Check 2 in one session."""
    left, right = _outputs(packed, batches, mode), _outputs(reference, batches, mode)
    if set(left) != set(right):
        detail = f"the file's outputs are {', '.join(left)}, the model's {', '.join(right)}"
        return Check(name="graph", session=mode, ok=False, error=None, limit=0.0, detail=detail)
    different = [n for n in right if left[n].shape != right[n].shape or not _same_bits(left[n], right[n])]
    if not different:
        detail = f"{len(right)} output{'s' if len(right) > 1 else ''} bit for bit on {_count(batches)} samples"
        return Check(name="graph", session=mode, ok=True, error=0.0, limit=0.0, detail=detail)
    name = different[0]
    where = first_difference(packed, reference, batches[0])
    return Check(
        name="graph", session=mode, ok=False, error=_error(right[name], left[name]), limit=0.0,
        detail=f"output {name} differs{f', first at {where}' if where else ''}",
    )  # fmt: skip


def _exporter_check(original: bytes, program: FloatProgram, batches: list[Arrays], mode: Mode, device: str) -> Check:
    """Check 3 in one session: float against float."""
    runner = program.runner(device)
    wanted = _concatenated([runner(b) for b in batches])
    got = _outputs(original, batches, mode)
    _check_finite(wanted, "the original")
    for name, values in wanted.items():
        if got[name].shape != values.shape or not np.isfinite(got[name]).all():
            what = f"has shape {list(got[name].shape)}, torch gives {list(values.shape)}"
            what = what if got[name].shape != values.shape else "holds NaN or Inf, torch's does not"
            detail = f"float model, onnxruntime against torch; output {name} {what}"
            return Check(name="exporter", session=mode, ok=False, error=None, limit=EXPORTER_TOLERANCE, detail=detail)
    errors = {name: _error(wanted[name], got[name]) for name in wanted}
    known = {name: e for name, e in errors.items() if e is not None}
    if not known:
        detail = f"{CONSTANT}: give data that its outputs vary on"
        return Check(name="exporter", session=mode, ok=False, error=None, limit=EXPORTER_TOLERANCE, detail=detail)
    worst = max(known, key=lambda n: known[n])
    detail = f"float model, onnxruntime against torch; output {worst}, over its spread, on {_count(batches)} samples"
    return Check(
        name="exporter", session=mode, ok=known[worst] <= EXPORTER_TOLERANCE, error=known[worst],
        limit=EXPORTER_TOLERANCE, detail=detail,
    )  # fmt: skip


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


def _both(program: FloatProgram, packed: bytes, data: Dataset, device: str, track: Track) -> tuple[Arrays, Arrays]:
    """Outputs of the file (as deployed) and of the original on all samples."""
    active, runner = session(packed, "deployed"), program.runner(device)
    ours, theirs = [], []
    batches = -(-data.samples // (program.fixed_batch or BATCH))
    for _, feeds in zip(track(range(batches)), _bound(program, data), strict=True):
        ours.append(run(active, feeds))
        theirs.append(runner(feeds))
    return _concatenated(ours), _concatenated(theirs)


def _outputs(model: bytes, batches: list[Arrays], mode: Mode) -> Arrays:
    active = session(model, mode)
    return _concatenated([run(active, batch) for batch in batches])


def _concatenated(parts: list[Arrays]) -> Arrays:
    return {n: np.concatenate([np.atleast_1d(p[n]) for p in parts]) for n in parts[0]}


def _output_report(original: npt.NDArray[Any], ours: npt.NDArray[Any]) -> OutputReport:
    scores = original.ndim == 2 and original.shape[1] > 1 and original.dtype.kind == "f"
    return OutputReport(
        sqnr_db=sqnr_db(original, ours),
        agreement=agreement(original, ours) if scores else None,
        constant=is_constant(ours),
    )


def _error(wanted: npt.NDArray[Any], got: npt.NDArray[Any]) -> float | None:
    """Largest difference over the spread; None where there is no spread to speak of, or no finite difference."""
    if wanted.shape != got.shape or not (np.isfinite(wanted).all() and np.isfinite(got).all()) or is_constant(wanted):
        return None
    return float(np.abs(wanted.astype(np.float64) - got).max() / spread(wanted))


def _check_finite(outputs: Arrays, of: str) -> None:
    for name, values in outputs.items():
        bad = values.size - int(np.isfinite(values).sum())
        if bad:
            raise DataError(
                f"Output {name} of {of} must be finite to be compared, {bad} of its {values.size} values on this data "
                "are NaN or Inf."
            )


def _same_bits(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _count(batches: list[Arrays]) -> int:
    return sum(len(next(iter(b.values()))) for b in batches)
