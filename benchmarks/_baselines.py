"""Quantizes float files with onnxruntime's own tools."""

import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from qcompress.data.dataset import Dataset

# Calibrations by name: method and options. The histograms of the last three need every activation of a chunk in memory.
CALIBRATIONS: dict[str, tuple[CalibrationMethod, dict[str, Any]]] = {
    "MinMax": (CalibrationMethod.MinMax, {}),
    "MinMax averaged": (CalibrationMethod.MinMax, {"CalibMovingAverage": True}),
    "Entropy": (CalibrationMethod.Entropy, {}),
    "Percentile 99.999": (CalibrationMethod.Percentile, {}),
    "Percentile 99.99": (CalibrationMethod.Percentile, {"CalibPercentile": 99.99}),
}


class Batches(CalibrationDataReader):
    """Feeds a Dataset to onnxruntime in batches, in chunks if it asks for them."""

    def __init__(self, data: Dataset, size: int) -> None:
        self._batches = [dict(batch.inputs) for batch in data.batches(size)]
        self.set_range(0, len(self))

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(self._batches[start_index:end_index])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._left, None)


def static(
    original: bytes,
    calibration: Dataset,
    name: str,
    *,
    batch: int,
    chunk: int | None = None,
    weight_type: QuantType = QuantType.QInt8,
) -> bytes:
    """Apply `quantize_static` as documented: preprocessing, QDQ, uint8 activations, per-channel weights.

    Args:
        original: the float file.
        calibration: calibration inputs.
        name: calibration method, a key of CALIBRATIONS.
        batch: samples per batch.
        chunk: number of batches in memory at once; None for all.
        weight_type: int8 or int4.
    """
    method, options = CALIBRATIONS[name]
    chunks = {"CalibStridedMinMax": chunk} if chunk and method is not CalibrationMethod.MinMax else {}

    def quantize(source: Path, target: Path) -> None:
        prepared = source.with_name("prepared.onnx")
        prepare(source, prepared)
        quantize_static(
            prepared,
            target,
            Batches(calibration, batch),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=weight_type,
            calibrate_method=method,
            extra_options={**options, **chunks},
        )

    return _by_file(original, quantize)


def dynamic(original: bytes, *, per_channel: bool) -> bytes:
    """Preprocess the file and apply `quantize_dynamic` with int8 weights."""

    def quantize(source: Path, target: Path) -> None:
        prepared = source.with_name("prepared.onnx")
        prepare(source, prepared)
        quantize_dynamic(prepared, target, per_channel=per_channel, weight_type=QuantType.QInt8)

    return _by_file(original, quantize)


def prepare(source: Path, target: Path) -> None:
    """Preprocess a file as documented; without symbolic shapes where onnxruntime's tool cannot infer them all."""
    try:
        quant_pre_process(source, target)
    except Exception as e:  # the tool raises nothing more special
        if "symbolic shape" not in str(e):
            raise
        quant_pre_process(source, target, skip_symbolic_shape=True)


def with_mean(original: bytes) -> bytes:
    """Return the file with global average pooling as torch.onnx writes it: a ReduceMean over height and width."""
    model = onnx.load_from_string(original)
    nodes = model.graph.node
    pool = next(node for node in nodes if node.op_type == "GlobalAveragePool")
    flatten = next(node for node in nodes if pool.output[0] in node.input)
    assert flatten.op_type == "Flatten"
    axes = numpy_helper.from_array(np.array([2, 3]), f"{pool.output[0]}_axes")
    model.graph.initializer.append(axes)
    flatten.CopyFrom(onnx.helper.make_node("ReduceMean", [pool.input[0], axes.name], [flatten.output[0]], keepdims=0))
    nodes.remove(pool)
    data: bytes = model.SerializeToString()
    return data


def _by_file(original: bytes, quantize: Callable[[Path, Path], None]) -> bytes:
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),  # where onnxruntime leaves what it could not infer shapes of
        contextlib.redirect_stdout(io.StringIO()),
    ):
        source, target = Path(folder) / "float.onnx", Path(folder) / "quantized.onnx"
        source.write_bytes(original)
        quantize(source, target)
        return target.read_bytes()
