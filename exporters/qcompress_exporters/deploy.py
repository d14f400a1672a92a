"""Writes compressed models, and measures what was written, in whatever format: the public functions."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qcompress.compressed.model import CompressedModel
from qcompress.data.dataset import Dataset, as_dataset
from qcompress.files import check_writable
from qcompress.graph.program import FloatProgram
from qcompress.metrics.metric import Metric
from qcompress.plan.combinations import check_file
from qcompress.progress import Track, untracked
from qcompress_exporters import formats
from qcompress_exporters.options import BuildOptions, Leftovers, Measuring
from qcompress_exporters.parity.report import ParityReport
from qcompress_exporters.report import Built, ExportReport


def export(
    model: CompressedModel,
    path: str | Path,
    *,
    target: str | None = None,
    format: str | None = None,
    float_leftovers: Leftovers = "float32",
    force: bool = False,
) -> ExportReport:
    """Write a compressed model to a file, which a runtime has opened, where there is one.

    Args:
        model: from `qcompress.compress`, or loaded from a folder.
        path: the file to write.
        target: where the file must run. For ONNX: `portable` (the default: every encoding in uint8, opset 18);
            `onnxruntime==1.24`, the oldest onnxruntime that must run it (allows newer types where they save at least
            1 % of the file); `openvino`; `web`.
        format: the deployment format: `onnx` (the default). Or how ONNX writes int8 compute: `qdq` (the default:
            quantize and dequantize around float operators, which runtimes fuse) or `integer` (QLinearConv,
            QLinearMatMul, MatMulInteger).
        float_leftovers: type on disk of tensors that are left in float.
        force: replace an existing file.

    Raises:
        OutputError: the file exists or cannot be written.
        ConfigError: an unknown target or format, or a way to write int8 compute where compute is not int8.
        SourceError: the format cannot express the graph, or the runtime cannot open the file.
    """
    path = Path(path)
    check_writable(path, force=force)
    built = build(model, target=target, format=format, float_leftovers=float_leftovers)
    chosen, _ = formats.choose(format)
    chosen.proof(built.data)
    return built.write(path, force=force)


def build(
    model: CompressedModel,
    *,
    target: str | None = None,
    format: str | None = None,
    float_leftovers: Leftovers = "float32",
) -> Built:
    """Return the same file in memory and write nothing; see `export`."""
    chosen, way = formats.choose(format)
    check_file(model.compute, way)
    return chosen.build(model, chosen.target(target), BuildOptions(way=way, float_leftovers=float_leftovers))


def validate(
    model: FloatProgram | CompressedModel,
    path: str | Path,
    data: Dataset | Mapping[str, Any] | Iterable[Any],
    *,
    metric: Metric | None = None,
    source_digest: str = "",
    seed: int = 0,
    device: str = "cpu",
    timing: float = 0.0,
    track: Track = untracked,
) -> ParityReport:
    """Measure a file that `export` wrote against its original.

    Args:
        model: the original; of a compressed model, its float program.
        path: the file.
        data: inputs, with labels where there are any: a Dataset, arrays by name, or batches; see `as_dataset`.
        metric: what to measure where there are labels.
        source_digest: short digest of the model file that `model` was read from; a compressed model knows its own.
        seed: of the bootstrap.
        device: where the original runs.
        timing: seconds to spend on latency, besides two loads; 0: not measured.
        track: wraps the iterator over batches: a progress bar.

    Raises:
        SourceError: qcompress did not write the file, or no runtime can load it.
        DataError: the data does not fit the model.
    """
    how = Measuring(metric=metric, source_digest=source_digest, seed=seed, device=device, timing=timing, track=track)
    found, file = formats.read(Path(path))
    if isinstance(model, CompressedModel):
        how = replace(how, source_digest=model.source_digest)
        return found.validate(model.program, file, as_dataset(data), how)
    return found.validate(model, file, as_dataset(data), how)
