"""Runs every .onnx file of a folder in OpenVINO, in OpenVINO's own venv; started by runtimes.py.

    python _run_openvino.py FOLDER

FOLDER holds `inputs.npz`: one array per input name. Writes `NAME.openvino.npz` beside each `NAME.onnx`: one array per
output name, or the key `error` with the line of OpenVINO's error that gives the reason.
"""

import sys
from pathlib import Path

import numpy as np
import openvino


def main() -> None:
    """Run all files of the folder."""
    folder = Path(sys.argv[1])
    inputs = dict(np.load(folder / "inputs.npz"))
    core = openvino.Core()
    for path in sorted(folder.glob("*.onnx")):
        try:
            # Without the hint, OpenVINO computes in bfloat16 on CPUs that have it.
            compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            found = compiled(inputs)
            outputs = {output.any_name: found[output] for output in compiled.outputs}
        except RuntimeError as e:
            outputs = {"error": np.array(reason(str(e)))}
        np.savez(path.with_suffix(".openvino.npz"), **outputs)
    print(openvino.__version__.partition("-")[0])


def reason(text: str) -> str:
    """Return the line of an OpenVINO exception that gives the reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "nsupported" in line or "not supported" in line), lines[-1])


if __name__ == "__main__":
    main()
