"""Converts every .onnx file of a folder to MNN and runs it, in MNN's own venv; started by runtimes.py.

    python _run_mnn.py FOLDER

FOLDER holds `inputs.npz`: one array per input name. Writes `NAME.mnn.npz` beside each `NAME.onnx`: one array per output
name, or the key `error`.

The script calls the converter in the extension module `_tools` directly, because `mnnconvert` installs a package for
usage statistics into the first Python on the path.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import _tools
import MNN.expr
import MNN.nn
import numpy as np


def main() -> None:
    """Run all files of the folder."""
    folder = Path(sys.argv[1])
    inputs = dict(np.load(folder / "inputs.npz"))
    output_names = (folder / "outputs.txt").read_text().split()
    for path in sorted(folder.glob("*.onnx")):
        np.savez(path.with_suffix(".mnn.npz"), **run(path, inputs, output_names))
    print(version("MNN"))


def run(path: Path, inputs: dict[str, np.ndarray], output_names: list[str]) -> dict[str, np.ndarray]:
    """Return the float32 outputs of one file, or an error."""
    converted = path.with_suffix(".mnn")
    _tools.mnnconvert(["", "-f", "ONNX", "--modelFile", str(path), "--MNNModel", str(converted), "--bizCode", "none"])
    if not converted.exists():
        return {"error": np.array("mnnconvert writes no file")}
    config = {"backend": "CPU", "precision": "high", "numThread": 1}
    runtime = MNN.nn.create_runtime_manager((config,))
    net = MNN.nn.load_module_from_file(str(converted), list(inputs), output_names, runtime_manager=runtime)
    given = []
    for values in inputs.values():
        variable = MNN.expr.placeholder(list(values.shape), MNN.expr.NCHW, MNN.expr.float)
        variable.write(np.ascontiguousarray(values))
        given.append(variable)
    outputs = net.forward(given)
    return {
        name: np.array(MNN.expr.convert(output, MNN.expr.NCHW).read())
        for name, output in zip(output_names, outputs, strict=True)
    }


if __name__ == "__main__":
    main()
