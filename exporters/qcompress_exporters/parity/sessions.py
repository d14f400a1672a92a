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
_ERRORS_ONLY: Final = 3
_VNNI: Final = ("avx512_vnni", "avx_vnni")


def session(data: bytes, mode: Mode, *, optimized_path: Path | None = None, without: Sequence[str] = ()) -> Session:
    """Return a session on the CPU.

    Args:
        data: the file's bytes.
        mode: `exact` or `deployed`.
        optimized_path: if given, onnxruntime writes the optimized graph to this file.
        without: names of onnxruntime's optimizers to disable.

    Raises:
        SourceError: onnxruntime cannot load the file.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    disabled = list(without)
    if mode == "exact":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        for key, value in _EXACT_CONFIG.items():
            options.add_session_config_entry(key, value)
        disabled += _EXACT_DISABLED
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
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session(data, "deployed", optimized_path=path)
        return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


def cpu_features() -> dict[str, bool | None]:
    """Return the CPU features that integer kernels depend on; None for unknown ones.

    Without VNNI, sums of uint8 times int8 can saturate.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return {"vnni": None}
    return {"vnni": any(flag in flags for flag in _VNNI)}
