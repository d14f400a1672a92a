"""Validates a file by three checks, which are reported separately, so that no check hides the failure of another.

1. Weights, without data: every tensor that onnxruntime decodes equals the compressed one, bit for bit.
2. Graph: the file gives the same outputs as its graph with those tensors as float initializers, bit for bit.
3. Exporter: the float model gives the same outputs in onnxruntime and in torch, within a tolerance.

A collapsed 1-bit model can pass any single check. Errors are divided by the spread of an output over the samples.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy.typing as npt

from qcompress.data.dataset import Dataset
from qcompress.errors import ConfigError, DataError, SourceError
from qcompress.graph.batchnorm import fold_batchnorm
from qcompress.graph.channels_first import channels_first
from qcompress.graph.conversion import to_numpy
from qcompress.graph.marks import mark
from qcompress.graph.program import FloatProgram, Runner
from qcompress.graph.tracing import with_fewer_dynamic_axes
from qcompress.graph.widths import activation_widths
from qcompress.metrics.metric import compare
from qcompress.metrics.similarity import agreement, is_constant, sqnr_db
from qcompress.progress import Track
from qcompress_exporters.onnx_format import metadata
from qcompress_exporters.onnx_format.file import float_file
from qcompress_exporters.onnx_format.int8.grids import file_grids
from qcompress_exporters.onnx_format.trace import trace
from qcompress_exporters.options import Measuring
from qcompress_exporters.parity.checks import (
    CONSTANT,
    check_codes,
    check_exporter,
    check_folding,
    check_graph,
    check_weights,
    float_reference,
)
from qcompress_exporters.parity.differences import Arrays, check_finite, concatenated, samples_in
from qcompress_exporters.parity.noise import LayerNoise, layer_noise, noise_db, runtime_share
from qcompress_exporters.parity.replay import SiteDifference, reference_state, replay
from qcompress_exporters.parity.report import OutputReport, ParityReport
from qcompress_exporters.parity.sessions import Mode, cpu_features, optimized, optimized_ops, run, session
from qcompress_exporters.parity.timing import measure

PARITY_SAMPLES: Final = 256
BATCH: Final = 64
_MODES: Final[tuple[Mode, ...]] = ("exact", "deployed")


def validate(program: FloatProgram, file: metadata.CompressedFile, data: Dataset, how: Measuring) -> ParityReport:
    """Measure an ONNX file that export wrote against its original.

    Raises:
        SourceError: qcompress did not write the file, or onnxruntime cannot load it.
        DataError: the data does not fit the model.
    """
    path = file.path
    if not file.is_ours:
        raise SourceError(f"{path} was not written by qcompress: validate needs the metadata that export writes.")
    _check_names(program, file)
    program = _with_axes_of(program, file)
    data, metric = _usable(program, data), how.metric
    if metric is not None and data.labels is None:
        raise DataError(f"The metric {metric.name} needs labels (an array y), but {data.name} has none.")

    folded = channels_first(fold_batchnorm(program), file.channels_first)
    compute, sites = file.sites
    marked = _marked(folded, sites, file)
    graph = trace(marked)
    packed, original = file.model.SerializeToString(), float_file(graph, folded.state())
    head = list(_bound(program, _usable(program, data.head(max(PARITY_SAMPLES, program.fixed_batch or 0)))))
    runner = program.runner(how.device)
    wanted = concatenated([runner(batch) for batch in head])
    check_finite(wanted, "the original")
    weights, values = check_weights(graph, file.model)
    runs = optimized(packed)
    checks = [weights, check_folding(runs)]
    layers: tuple[LayerNoise, ...] = ()
    widths: dict[str, int | None] = {}
    if values is not None and sites:
        grids = file_grids(file.model, sites) if compute == "int8" else []
        widths = activation_widths(folded, {g.grid.site: g.grid.bits for g in grids}) if grids else {}
        state = reference_state(marked, values, grids)
        for mode in _MODES:
            found = replay(marked, file.model, sites, state, grids, head, mode)
            checks.append(check_codes(found, mode, samples_in(head)))
            layers = tuple(_noise(site) for site in found.sites)
    elif values is not None:
        reference = float_reference(graph, file.model, values)
        checks += [check_graph(packed, reference, head, mode) for mode in _MODES]
        layers = tuple(layer_noise(packed, float_reference(graph, file.model, _state(folded)), head))
    checks += [check_exporter(original, wanted, head, mode) for mode in _MODES]

    ours, theirs = _both(runner, packed, data, how.track)
    _check_outputs(ours, theirs, str(path))
    outputs = {name: _output_report(theirs[name], ours[name]) for name in program.output_names}
    made_from = file.metadata.get(metadata.SOURCE, "")
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
        metric=None
        if metric is None or data.labels is None
        else compare(metric, theirs, ours, data.labels, seed=how.seed),
        layers=layers,
        runtime=runtime_share(packed, wanted, head),
        timing=measure(original, packed, _one(program, head[0]), seconds=how.timing) if how.timing else None,
        same_ops=Counter(n.op_type for n in runs.node) == optimized_ops(original),
        same_source=made_from == how.source_digest if made_from and how.source_digest else None,
        cpu=cpu_features(),
        activation_bits=widths,
        notes=tuple(_notes(file, made_from, how.source_digest, outputs)),
    )


def _with_axes_of(program: FloatProgram, file: metadata.CompressedFile) -> FloatProgram:
    """Return the program with the dynamic axes of a file: export fixes some where torch.onnx cannot write them."""
    if set(program.dynamic) > set(file.dynamic):
        return next(
            (fewer for fewer, _ in with_fewer_dynamic_axes(program) if {*fewer.dynamic} == {*file.dynamic}), program
        )
    return program


def _marked(program: FloatProgram, sites: list[tuple[str, int]], file: metadata.CompressedFile) -> FloatProgram:
    try:
        return mark(program, sites)
    except ConfigError as e:
        raise SourceError(f"{file.path} was not made from this model: {e}") from None


def _state(program: FloatProgram) -> Arrays:
    return {name: to_numpy(value) for name, value in program.state().items()}


def _noise(site: SiteDifference) -> LayerNoise:
    return LayerNoise(site.layer or site.site, noise_db(site.signal, site.noise))


def _one(program: FloatProgram, batch: Arrays) -> Arrays:
    """Return the smallest batch that the program accepts."""
    return {name: values[: program.fixed_batch or 1] for name, values in batch.items()}


def _notes(
    file: metadata.CompressedFile, made_from: str, source_digest: str, outputs: Mapping[str, OutputReport]
) -> Iterator[str]:
    for name, output in outputs.items():
        if output.constant:
            yield f"output {name}: {CONSTANT}, so parity and agreement prove nothing"
    if made_from and source_digest and made_from != source_digest:
        yield (
            f"{file.path.name} was not exported from this model file (but from a file with the digest {made_from}; "
            f"this one has {source_digest}): if it should have been, export it again"
        )


def _check_outputs(ours: Arrays, theirs: Arrays, path: str) -> None:
    check_finite(theirs, "the original")
    check_finite(ours, path)
    for name, values in theirs.items():
        if ours[name].shape != values.shape:
            raise SourceError(
                f"{path} was not made from this model: its output {name} has shape {list(ours[name].shape[1:])} for "
                f"each sample, the model's {list(values.shape[1:])}."
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


def _usable(program: FloatProgram, data: Dataset) -> Dataset:
    """Return the data cut to whole batches, if the program accepts a single batch size only."""
    size = program.fixed_batch
    if data.samples < 2:
        raise DataError(f"Parity needs at least 2 samples, so that outputs can differ; {data.name} has {data.samples}.")
    if size is None:
        return data
    if data.samples < size:
        raise DataError(
            f"The model accepts only batches of {size}, but {data.name} has {data.samples} samples: pass more data."
        )
    return data.head(data.samples - data.samples % size)


def _bound(program: FloatProgram, data: Dataset) -> Iterator[Arrays]:
    """Yield batches of inputs by the graph's names, of the size that the graph accepts."""
    for batch in data.batches(program.fixed_batch or BATCH):
        yield dict(zip(program.input_names, program.bind(batch.inputs), strict=True))


def _both(runner: Runner, packed: bytes, data: Dataset, track: Track) -> tuple[Arrays, Arrays]:
    """Return outputs of the file (as deployed) and of the original on all samples."""
    active, program = session(packed, "deployed"), runner.program
    ours, theirs = [], []
    batches = -(-data.samples // (program.fixed_batch or BATCH))
    for _, feeds in zip(track(range(batches), "running both"), _bound(program, data), strict=True):
        ours.append(run(active, feeds))
        theirs.append(runner(feeds))
    return concatenated(ours), concatenated(theirs)


def _output_report(original: npt.NDArray[Any], ours: npt.NDArray[Any]) -> OutputReport:
    scores = original.ndim == 2 and original.shape[1] > 1 and original.dtype.kind == "f"
    varies = original.dtype.kind != "f" or not is_constant(original)
    return OutputReport(
        sqnr_db=sqnr_db(original, ours) if varies else None,
        agreement=agreement(original, ours) if scores else None,
        constant=not varies or is_constant(ours),
    )
