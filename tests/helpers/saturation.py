"""Makes models exact on x86 CPUs without VNNI, whose kernels add two uint8 x int8 products in 16 bits and saturate.

Tests of integer compute must pass on such CPUs too, so they use weights there whose products cannot saturate.
"""

import functools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qcompress.artifacts import Artifact, IntegerWeight, PalettizedWeight
from qcompress.compressed.model import CompressedModel
from qcompress_exporters.onnx_format.opsets import BASE_OPSET, ir_version
from qcompress_exporters.parity.sessions import run, session

LARGEST = 64  # largest weight code: 255 * (64 + 64) fits into 16 bits


@functools.cache
def kernels_saturate() -> bool:
    """Return whether onnxruntime computes 255 * 127 + 255 * 127 wrong on this CPU, as measured, not from CPU flags."""
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, ["n", 1])],
        [numpy_helper.from_array(np.full((2, 1), 127, np.int8), "w")],
    )  # fmt: skip
    model = helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", BASE_OPSET)], ir_version=ir_version(BASE_OPSET)
    )
    found = run(session(model.SerializeToString(), "deployed"), {"x": np.full((1, 2), 255, np.uint8)})
    return int(found["y"][0, 0]) != 2 * 255 * 127


def exact_here(artifact: Artifact) -> Artifact:
    """Return a weight that this CPU multiplies exactly: the given one, or halved codes at twice the scale."""
    found = artifact.integers()
    if found is None or not kernels_saturate() or np.abs(found.codes.astype(int)).max(initial=0) <= LARGEST:
        return artifact
    if isinstance(artifact, PalettizedWeight):
        entries, scale = artifact.integer_lut() or (artifact.lut, found.scale)
        return replace(artifact, lut=np.rint(entries / 2).astype(np.int8), scale=np.asarray(2 * scale))
    assert isinstance(artifact, IntegerWeight)
    return replace(artifact, codes=np.rint(artifact.codes / 2).astype(artifact.codes.dtype), scale=2 * artifact.scale)


def all_exact_here(artifacts: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """Apply `exact_here` to all artifacts."""
    return {name: exact_here(artifact) for name, artifact in artifacts.items()}


def model_exact_here(model: CompressedModel) -> CompressedModel:
    """Return a model for integer compute whose weights this CPU's kernels multiply exactly."""
    return replace(model, artifacts=all_exact_here(model.artifacts))
