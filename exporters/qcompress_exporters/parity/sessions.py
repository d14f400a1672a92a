"""The onnxruntime sessions that parity uses, and the operators in a graph after optimization."""

import collections
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import onnx

from qcompress.errors import SourceError, missing

try:
    import onnxruntime
except ImportError:
    raise missing("onnxruntime", "running a file") from None

ort: Any = onnxruntime
Session = Any  # onnxruntime ships no types

Mode = Literal["exact", "deployed"]

# `exact`: onnxruntime's own approximations are off. `deployed`: onnxruntime's default settings.
_EXACT_CONFIG: Final = {"session.qdq_matmulnbits_accuracy_level": "1"}
WEIGHT_BIAS_QUANTIZATION: Final = "WeightBiasQuantization"  # quantizes weights that were left in float
_EXACT_DISABLED: Final = [WEIGHT_BIAS_QUANTIZATION]
# Of an output of a node that it folds, in bytes: what is larger is decoded at each run. onnxruntime's default is 1 GiB.
FOLDING_LIMIT: Final = "optimization.constant_folding_max_output_size_in_bytes"
_DEPLOYED_CONFIG: Final[dict[str, str]] = {}
_ERRORS_ONLY: Final = 3
_VNNI: Final = ("avx512_vnni", "avx_vnni")


def session(
    data: bytes,
    mode: Mode,
    *,
    optimized_path: Path | None = None,
    without: Sequence[str] = (),
    one_thread: bool = False,
    profile: Path | None = None,
) -> Session:
    """Return a session on the CPU.

    Args:
        data: the file's bytes.
        mode: `exact` or `deployed`.
        optimized_path: if given, onnxruntime writes the optimized graph to this file.
        without: names of onnxruntime's optimizers to disable.
        one_thread: whether operators run on one thread.
        profile: if given, how the path of the file begins in which onnxruntime notes what each node takes.

    Raises:
        SourceError: onnxruntime cannot load the file.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    disabled = list(without)
    for key, value in (_EXACT_CONFIG if mode == "exact" else _DEPLOYED_CONFIG).items():
        options.add_session_config_entry(key, value)
    if mode == "exact":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        disabled += _EXACT_DISABLED
    if one_thread:
        options.intra_op_num_threads = 1
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    try:
        return ort.InferenceSession(
            data, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled or None
        )
    except Exception as e:  # onnxruntime's exceptions have no common base below Exception
        raise SourceError(f"onnxruntime {ort.__version__} cannot load the file: {str(e).splitlines()[0]}") from None


def run(active: Session, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Return the outputs of one batch by name.

    Raises:
        SourceError: the file does not run on these inputs.
    """
    names = [o.name for o in active.get_outputs()]
    try:
        values = active.run(names, dict(feeds))
    except Exception as e:  # onnxruntime's exceptions have no common base below Exception
        reason = str(e).splitlines()[0]
        raise SourceError(
            f"The file does not run on the model's inputs: was it made from this model? {reason}"
        ) from None
    return dict(zip(names, (np.asarray(v) for v in values), strict=True))


def optimized_ops(data: bytes) -> collections.Counter[str]:
    """Return the number of each operator that onnxruntime runs, as deployed, after folding and fusing.

    Two files with the same counts do the same work at run time.
    """
    return collections.Counter(node.op_type for node in optimized(data).node)


def optimized(data: bytes) -> onnx.GraphProto:
    """Return the graph that onnxruntime runs, as deployed, after folding and fusing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session(data, "deployed", optimized_path=path)
        return onnx.load(path).graph


def run_each_time(graph: onnx.GraphProto) -> list[str]:
    """Return the operators of an optimized graph that compute constants at each run, since nothing folded them.

    onnxruntime keeps DequantizeLinear on purpose, for its integer kernels, so that it does not count.
    """
    constant = {tensor.name for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if node.input and all(name in constant for name in node.input if name):
            constant.update(node.output)
            found.append(node.op_type)
    return [operator for operator in found if operator != "DequantizeLinear"]


def cpu_features() -> dict[str, bool | None]:
    """Return the CPU features that integer kernels depend on; None for unknown ones.

    Without VNNI, sums of uint8 times int8 can saturate.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return {"vnni": None}
    return {"vnni": any(flag in flags for flag in _VNNI)}
