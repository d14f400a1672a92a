"""Noise: how much compression changes a file's inner values and outputs, and the runtime's share of that change."""

from dataclasses import dataclass

import numpy as np
import onnx

from qcompress_exporters.parity.differences import Arrays, outputs_of
from qcompress_exporters.parity.sessions import WEIGHT_BIAS_QUANTIZATION, run, session


@dataclass(frozen=True, slots=True)
class LayerNoise:
    """Noise of one value, including the noise of all layers before it.

    Args:
        layer: weight of the layer that computes it, or the value's own name.
        sqnr_db: signal to noise ratio, in dB; None if there is no difference.
    """

    layer: str
    sqnr_db: float | None


def layer_noise(packed: bytes, original: bytes, batches: list[Arrays]) -> list[LayerNoise]:
    """Return the noise after each layer of a file for float compute, in the graph's order.

    Args:
        packed: the file.
        original: the same graph, with the same inner names and the original's weights.
        batches: inputs; only the first batch is run.
    """
    models = [onnx.load_from_string(data) for data in (packed, original)]
    tensors = {t.name for t in models[1].graph.initializer}
    layers = {
        n.output[0]: weight
        for n in models[1].graph.node
        if n.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        and (weight := next((i for i in n.input[1:2] if i in tensors), None))
    }
    for model in models:
        given = {v.name for v in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in layers if name not in given)
    ours, theirs = (run(session(m.SerializeToString(), "exact"), batches[0]) for m in models)
    found = []
    for value, weight in layers.items():
        wanted = theirs[value].astype(np.float64)
        found.append(LayerNoise(weight, noise_db(np.square(wanted).sum(), np.square(wanted - ours[value]).sum())))
    return found


def noise_db(signal: float, noise: float) -> float | None:
    """Return signal over noise in dB; None without noise.

    >>> noise_db(100.0, 1.0), noise_db(1.0, 0.0)
    (20.0, None)
    """
    if not noise:
        return None
    least = float(np.finfo(np.float64).tiny)
    return float(10 * (np.log10(max(signal, least)) - np.log10(noise)))


def runtime_share(packed: bytes, wanted: Arrays, batches: list[Arrays]) -> dict[str, float]:
    """Return the share of the noise at a file's outputs that comes from onnxruntime's own optimizations.

    Args:
        packed: the file.
        wanted: the original's outputs by name.
        batches: inputs.

    Returns:
        `onnxruntime`: the share that the deployed session adds to the exact one; `WeightBiasQuantization`: the share
        of this one optimizer. Empty without noise.
    """
    deployed, exact = outputs_of(packed, batches, "deployed"), outputs_of(packed, batches, "exact")
    without = outputs_of(packed, batches, "deployed", without=[WEIGHT_BIAS_QUANTIZATION])
    if any(deployed[n].shape != v.shape or not np.isfinite(deployed[n]).all() for n, v in wanted.items()):
        return {}
    total = _distance(deployed, wanted)
    if not total:
        return {}
    return {
        "onnxruntime": _distance(deployed, exact) / total,
        WEIGHT_BIAS_QUANTIZATION: _distance(deployed, without) / total,
    }


def _distance(a: Arrays, b: Arrays) -> float:
    return sum(float(np.square(a[name].astype(np.float64) - b[name]).sum()) for name in b)
