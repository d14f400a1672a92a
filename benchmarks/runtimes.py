"""Runs our files in OpenVINO and MNN, and limits their difference from onnxruntime and the growth of the files.

    make runtimes DATA=DIR                                  # sets up both runtimes, each in a separate venv
    python benchmarks/runtimes.py --data DIR [--bits 8 7 6 5 4 3 2 1] [--target TARGET]
                                  [--runtimes DIR] [--samples 64] [--json FILE]

`--data` holds the nets and images of `_nets.py`. Files are written for `--target` (default: the library's) with
`--effort fast`. `--runtimes` holds a venv per runtime (`build/runtimes`); missing runtimes are skipped.

The difference is the largest one over all outputs and images, divided by the outputs' spread: the root mean square over
all outputs of their standard deviation over the images. The first row is the float file, which shows the difference
that the runtime itself causes. The exit code is 1 if a difference or the growth of a file exceeds its limit.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from _common import Bar
from _nets import NETS

from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.settings import PosthocSettings
from qcompress_exporters import build
from qcompress_exporters.onnx_format.file import float_file
from qcompress_exporters.onnx_format.trace import trace

HERE = Path(__file__).resolve().parent
# The script of each runtime; it runs in the venv of the same name.
RUNTIMES = {"openvino": "_run_openvino.py", "mnn": "_run_mnn.py"}
NET = "resnet20"
FLOAT = "float"
MOST_DIFFERENCE = 1e-4  # of the outputs' spread
MOST_MORE = 1000  # bytes more than BEFORE
# Bytes of the files when the default target was onnxruntime==1.24, by bits.
BEFORE = {
    8: 297_435, 7: 259_523, 6: 216_758, 5: 180_664, 4: 145_290, 3: 111_604, 2: 75_949, 1: 43_547,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """The figures of one file.

    Args:
        name: name of the file: `float`, or `w4` and so on.
        nbytes: size in bytes.
        more: bytes more than BEFORE; 0 for the float file.
        opset: the file's opset.
        differences: by runtime, the difference over the spread, or the error if the runtime rejects the file.
    """

    name: str
    nbytes: int
    more: int
    opset: int
    differences: dict[str, float | str]


def main() -> int:
    """Export, run and compare; return 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 7, 6, 5, 4, 3, 2, 1], choices=range(1, 9))
    parser.add_argument("--target", help="target of the files (default: the library's default)")
    parser.add_argument("--runtimes", type=Path, default=Path("build/runtimes"))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pythons = {name: python for name in RUNTIMES if (python := args.runtimes / name / "bin" / "python").exists()}
    if not pythons:
        parser.error(f"{args.runtimes} holds none of the venvs {', '.join(RUNTIMES)}: run `make runtimes DATA=DIR`.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = exported(args)
        inputs = next(iter(NETS[NET].test_data(args.data).batches(args.samples))).inputs
        wanted = written(folder, files, inputs)
        versions = {runtime: run(runtime, python, folder) for runtime, python in pythons.items()}
        rows = [
            Row(
                file,
                len(data),
                0 if file == FLOAT else len(data) - BEFORE[int(file[1:])],
                onnx.load_from_string(data).opset_import[0].version,
                {runtime: difference(wanted[file], folder / f"{file}.{runtime}.npz") for runtime in pythons},
            )
            for file, data in files.items()
        ]
    show(rows, versions, args)
    bars = bars_of(rows)
    print("\n".join(map(str, bars)))
    if args.json is not None:
        found = {
            "target": args.target or "default",
            "versions": {"onnxruntime": onnxruntime.__version__, **versions},
            "rows": [asdict(r) for r in rows],
        }
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(bar.verdict == "FAIL" for bar in bars))


def exported(args: argparse.Namespace) -> dict[str, bytes]:
    """Return the float file and our files by name."""
    program, files = NETS[NET].program(args.data), dict[str, bytes]()
    target = {} if args.target is None else {"target": args.target}
    for bits in args.bits:
        small = compress_program(program, Plan.from_flags(bits=bits), PosthocSettings(effort="fast"))
        if not files:
            files[FLOAT] = float_file(trace(small.program), small.program.state())
        files[f"w{bits}"] = build(small, **target).data
    return files


def written(folder: Path, files: dict[str, bytes], inputs: Any) -> dict[str, dict[str, np.ndarray]]:
    """Write files and inputs for the other runtimes; return onnxruntime's outputs by file and output name."""
    np.savez(folder / "inputs.npz", **inputs)
    wanted = {}
    for name, data in files.items():
        (folder / f"{name}.onnx").write_bytes(data)
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        wanted[name] = dict(zip(names, session.run(None, dict(inputs)), strict=True))
        (folder / "outputs.txt").write_text("\n".join(names))
    return wanted


def run(runtime: str, python: Path, folder: Path) -> str:
    """Run all files in a runtime and return its version."""
    command = [python.absolute(), HERE / RUNTIMES[runtime], folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{runtime} ends with {done.returncode}:\n{done.stderr}")
    return done.stdout.splitlines()[-1]


def difference(wanted: dict[str, np.ndarray], path: Path) -> float | str:
    """Return the largest difference over the spread, or the error if there is no output."""
    with np.load(path) as found:
        if "error" in found:
            return str(found["error"])
        return max(float(np.abs(found[name] - values).max() / spread(values)) for name, values in wanted.items())


def spread(values: np.ndarray) -> float:
    """Return the root mean square, over an output's elements, of their standard deviation over the samples."""
    return float(np.sqrt(values.astype(np.float64).var(axis=0).mean()))


def show(rows: list[Row], versions: dict[str, str], args: argparse.Namespace) -> None:
    """Print the table."""
    target = args.target or "the default target"
    runtimes = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(
        f"{NETS[NET].weights}, {args.samples} images, for {target}; onnxruntime {onnxruntime.__version__}, {runtimes}"
    )
    print(f"{'file':6} {'opset':>5} {'bytes':>11} {'more':>7} " + " ".join(f"{name:>10}" for name in versions))
    for row in rows:
        texts = [f"{d:10.1e}" if isinstance(d, float) else f"{'refused':>10}" for d in row.differences.values()]
        print(f"{row.name:6} {row.opset:5} {row.nbytes:11,} {row.more:>+7,} " + " ".join(texts))
    for row in rows:
        for runtime, found in row.differences.items():
            if isinstance(found, str):
                print(f"{runtime} refuses {row.name}: {found}")
    print("more: bytes more than for onnxruntime==1.24 before; differences from onnxruntime over the outputs' spread")


def bars_of(rows: list[Row]) -> list[Bar]:
    """Return the figures with their limits; a rejected file counts as an infinite difference."""
    bars = []
    for row in rows[1:]:
        for runtime, found in row.differences.items():
            value = found if isinstance(found, float) else float("inf")
            bars.append(Bar(f"{row.name} in {runtime}, difference over the spread", value, MOST_DIFFERENCE))
        bars.append(Bar(f"{row.name}, bytes more", row.more, MOST_MORE))
    return bars


if __name__ == "__main__":
    sys.exit(main())
