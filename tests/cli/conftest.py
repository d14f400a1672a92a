import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from qcompress_cli.app import cli
from qcompress_exporters.onnx_format import metadata


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qcompress.posthoc.synthesis._STEPS", 4)  # inputs that are synthesised need not be good here
    monkeypatch.setattr("qcompress_cli.commands.validate._TIMING_S", 0.1)  # nor times exact
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def qcompress():
    """The command line within this process: `qcompress("gate", "x.onnx").exit_code`."""

    def run(*args):
        result = CliRunner().invoke(cli, [str(arg) for arg in args])
        assert "Traceback" not in result.output
        return result

    return run


@pytest.fixture
def shell():
    """The command line as a process of its own."""

    def run(*args, code="from qcompress_cli.main import main; main()", **options):
        # The checkout under test, also where nothing is installed.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-c", code, *(str(arg) for arg in args)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.run(command, text=True, check=False, env=environment, **streams)

    return run


@pytest.fixture
def refused(qcompress):
    """Run what must exit 2 with one message and nothing on stdout; the message is returned."""

    def run(*args):
        result = qcompress(*args)
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        assert result.stderr.startswith("error: ")
        return result.stderr.removeprefix("error: ")

    return run


@pytest.fixture
def onnx_file(folder):
    """Write a small ONNX file; one of ours where it is told the bytes of its original."""

    def write(name="net.onnx", *, original_bytes=None, count=64, external=False):
        weight = numpy_helper.from_array(np.arange(count, dtype=np.float32).reshape(1, count), "w")
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, count]) for n in "xy")
        graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [weight])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        if original_bytes is not None:
            helper.set_model_props(model, {metadata.VERSION: "0.1.0", metadata.ORIGINAL_BYTES: str(original_bytes)})
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, path, save_as_external_data=external, location="weights.bin", size_threshold=0)
        return path

    return write


@pytest.fixture
def validated():
    """Write the measurements of `validate` beside a file."""

    def write(
        path,
        *,
        drop=0.01,
        interval=(-0.002, 0.014),
        agreement=0.98,
        metric="top1",
        digest=None,
        failed=(),
        same_source=True,
    ):
        file = metadata.read(path)
        document = {
            "format_version": 1,
            "file": {"name": path.name, "digest": digest or file.digest, "nbytes": file.nbytes},
            "data": {"name": "test.npz", "digest": "d", "samples": 250, "labels": metric is not None},
            "parity": [{"name": name, "ok": name not in failed} for name in ("weights", "graph", "exporter")],
            "outputs": {"output": {"sqnr_db": 20.0, "agreement": agreement}},
            "agreement": agreement,
            "sqnr_db": 20.0,
            "metric": metric
            and {
                "name": metric,
                "original": 0.86,
                "compressed": 0.86 - drop,
                "drop": drop,
                "interval": interval,
                "lower_is_better": False,
                "samples": 250,
            },
            "same_source": same_source,
        }
        metadata.validation_path(path).write_text(json.dumps(document))
        return path

    return write


@pytest.fixture
def weights(folder):
    """A small .safetensors model with what analyze has to tell: outliers, a NaN, integers, a hostile name."""
    rng = np.random.default_rng(0)
    tensors = {
        "features.0.weight": rng.standard_normal((16, 3, 3, 3)).astype(np.float32),
        "features.0.bias": np.full(16, np.nan, np.float32),
        "a.very.long.name.of.a.layer.that.nobody.would.want.to.see.cut.weight": np.eye(32, dtype=np.float16),
        "bn.num_batches_tracked": np.array(7, np.int64),
        "[red]evil\x1b[31m\n.weight": rng.standard_normal((8, 8)).astype(np.float32),
    }
    path = folder / "model.safetensors"
    save_file(tensors, path)
    return path
