"""`validate` through the command line, and what gate makes of its measurements."""

import json
import re
import sys

import numpy as np
import onnx
import pytest
import torch

from qcompress_exporters.onnx_format import file as onnx_file
from qcompress_exporters.onnx_format import metadata
from qcompress_exporters.onnx_format.lower import serialize
from qcompress_exporters.parity import validate as parity
from tests.helpers import small_models

FILE = "model.mixed.onnx"


@pytest.fixture(autouse=True)
def _same_import_path():
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.fixture
def traced_once(monkeypatch):
    monkeypatch.setattr(onnx_file, "trace", small_models.trace_once)
    monkeypatch.setattr(parity, "trace", small_models.trace_once)


@pytest.fixture(scope="module")
def exported_bytes(tmp_path_factory):
    """What `export model.pt` wrote, by way of its plan; shared by all tests."""
    from click.testing import CliRunner

    from qcompress_cli.app import cli

    folder = tmp_path_factory.mktemp("exported")
    (folder / "model.pt").write_bytes(small_models.pt2())
    (folder / "plan.toml").write_text(small_models.compressed().plan.to_toml())
    args = ["export", folder / "model.pt", "--plan", folder / "plan.toml", "--effort", "fast", "-o", folder / FILE]
    assert CliRunner().invoke(cli, [str(a) for a in args]).exit_code == 0
    return (folder / FILE).read_bytes()


@pytest.fixture
def files(folder, exported_bytes):
    """model.pt, what export made of it, and test.npz with labels."""
    (folder / "model.pt").write_bytes(small_models.pt2())
    (folder / "test.npz").write_bytes(small_models.npz())
    (folder / FILE).write_bytes(exported_bytes)
    return folder


def damage(path, edit):
    file = metadata.read(path)
    edit(file.model.graph)
    path.write_bytes(serialize(file.model, file.metadata))


def test_a_good_file_and_the_gate(qcompress, refused, files):
    """A table for people, a document beside the file for gate, and gate believes it for this file alone."""
    result = qcompress("validate", "model.pt", FILE, "--data", "test.npz")
    assert result.exit_code == 0, result.output
    rows = [line.split()[:5] for line in result.stdout.splitlines()]
    assert ["weights", "exact", "-", "0", "ok"] in rows
    for session in ("exact", "deployed"):
        assert ["graph", session, "0", "0", "ok"] in rows
        assert any(row[:2] == ["exporter", session] and row[3:] == ["0.0001", "ok"] for row in rows)
    assert "8 tensors bit for bit" in result.stdout
    assert "% against the original, 60 samples" in result.stdout
    assert "top1: " in result.stdout
    assert "on the same 60 samples" in result.stdout
    assert "onnxruntime's optimised graph holds the same operators as the float file's" in result.stdout
    assert "note:" not in result.stdout
    assert re.search(r"^layer, the noisiest +SQNR dB +change", result.stdout, re.M)
    assert re.search(r"^stem\.weight +\d+\.\d +$", result.stdout, re.M)
    assert re.search(
        r"^speed: \d\.\d\d x the float file's \(.+ one thread; the float file against itself", result.stdout, re.M
    )
    assert re.search(r"^loading: .+ ms, the float file .+ ms$", result.stdout, re.M)
    assert "CPU" not in result.stdout  # of no concern to float compute
    assert result.stderr == f"measurements written to {FILE}.validation.json\n"

    document = json.loads((files / f"{FILE}.validation.json").read_text())
    assert document["ok"] is True
    assert document["same_source"] is True
    assert document["metric"]["name"] == "top1"
    agreement, drop = document["agreement"], document["metric"]["drop"]
    kept = ("--max-drop", drop + 0.01, "--min-agreement", agreement)
    assert qcompress("gate", FILE, *kept).exit_code == 0
    assert qcompress("gate", FILE, "--max-drop", drop - 0.01).exit_code == 1
    assert qcompress("gate", FILE, "--min-agreement", min(1, agreement + 0.01)).exit_code == int(agreement < 1)

    damage(files / FILE, lambda graph: setattr(graph, "name", "other"))
    message = refused("gate", FILE, *kept)
    assert message.startswith(f"{FILE}.validation.json was measured on another file (digest ")
    assert message.endswith(f"run `qcompress validate MODEL {FILE}` again.\n")


@pytest.mark.usefixtures("traced_once")
def test_other_kinds_of_data_give_the_same_measurements(qcompress, files):
    """A torch Dataset, and a folder of images, which a transform turns into the same inputs."""
    image = pytest.importorskip("PIL.Image", reason="an optional dependency")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    labels = np.arange(6) // 2
    for number, label in enumerate(labels):
        (files / "photos" / str(label)).mkdir(parents=True, exist_ok=True)
        image.fromarray(pixels[number]).save(files / "photos" / str(label) / f"{number}.png")
    np.savez("same.npz", x=pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255), y=labels)
    (files / "mine.py").write_text(
        "import numpy as np, torch\n"
        "def make():\n"
        "    d = np.load('same.npz')\n"
        "    return torch.utils.data.TensorDataset(torch.from_numpy(d['x']), torch.from_numpy(d['y']))\n"
    )
    documents = []
    for spec in ("same.npz", "photos", "mine:make"):
        result = qcompress("validate", "model.pt", FILE, "--data", spec, "--no-timing", "--json")
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        documents.append((document["agreement"], document["metric"]))
    assert documents[1:] == documents[:1] * 2


@pytest.mark.usefixtures("traced_once")
def test_measurements_within_the_file(qcompress, files):
    before = metadata.read(files / FILE)
    args = ("validate", "model.pt", FILE, "--data", "test.npz:x,y", "--write", "--no-timing")
    result = qcompress(*args, "--json")
    assert result.exit_code == 0
    after = metadata.read(files / FILE)
    assert after.digest == before.digest
    assert after.model.graph == before.model.graph
    assert set(after.metadata) - set(before.metadata) == {metadata.VALIDATION}
    document = json.loads(result.stdout)
    assert json.loads(after.metadata[metadata.VALIDATION]) == document
    assert json.loads((files / f"{FILE}.validation.json").read_text()) == document
    assert document["file"]["nbytes"] == after.nbytes == (files / FILE).stat().st_size  # what ships, and gate measures
    added = f"{FILE}: +{after.nbytes - before.nbytes:,} B of measurements, it now takes {after.nbytes:,} B"
    assert result.stderr == f"{added}\nmeasurements written to {FILE}.validation.json and into {FILE}\n"
    (files / "qcompress.toml").write_text(f'[gate]\nmax_size = {after.nbytes - 1}\nfiles = ["{FILE}"]\n')
    over = f": more than max_size of the gate in qcompress.toml allows ({after.nbytes - 1:,} B), so that the gate will"
    assert over in qcompress(*args, "--quiet").stderr
    (files / "qcompress.toml").unlink()
    assert metadata.read(files / FILE).nbytes == after.nbytes
    (files / f"{FILE}.validation.json").unlink()
    assert qcompress("gate", FILE, "--min-agreement", "0").exit_code == 0


def flip(graph):
    tensor = next(t for t in graph.initializer if t.data_type == onnx.TensorProto.UINT8)
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]


def swap(graph):
    a, b = (t for t in graph.initializer if t.name in ("left.bias", "right.bias"))
    a.raw_data, b.raw_data = b.raw_data, a.raw_data


def transpose(graph):
    lut = next(t for t in graph.initializer if list(t.dims) == [4, 4])
    lut.raw_data = onnx.numpy_helper.to_array(lut).T.tobytes()


def other_operator(graph):
    next(n for n in graph.node if n.op_type == "Relu").op_type = "Abs"


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(
    ("edit", "failed"),
    [(flip, "weights (exact)"), (swap, "weights (exact)"), (transpose, "weights (exact)"),
     (other_operator, "graph (exact), graph (deployed)")],
)  # fmt: skip
def test_a_corrupted_file_exits_1(qcompress, refused, files, edit, failed):
    damage(files / FILE, edit)
    result = qcompress("validate", "model.pt", FILE, "--data", "test.npz", "--no-timing")
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    assert result.stderr.endswith(f"FAILED: {failed}\n")
    assert json.loads((files / f"{FILE}.validation.json").read_text())["ok"] is False


@pytest.mark.usefixtures("traced_once")
def test_a_model_that_the_file_was_not_made_from(qcompress, files):
    (files / "model.pt").write_bytes(small_models.pt2(seed=1))
    result = qcompress("validate", "model.pt", FILE, "--data", "test.npz", "--no-timing", "--json")
    document = json.loads(result.stdout)
    assert (result.exit_code, document["same_source"]) == (0, False)
    assert document["notes"][0].startswith(f"{FILE} was not exported from this model file (but from a file with ")
    assert document["sqnr_db"] < -20
    judged = qcompress("gate", FILE, "--max-size", "1MB")
    assert judged.exit_code == 1
    assert "same_source: validate compared it with another model" in judged.stdout


class Pair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(8, 5)

    def forward(self, a, b):
        return self.fc(a + b)


@pytest.mark.usefixtures("traced_once")
def test_what_cannot_be_measured(refused, files):
    def says(*args):
        message = refused("validate", *args)
        assert not list(files.glob("*.validation.json"))
        return message

    data = ("--data", "test.npz")
    assert says("model.pt", FILE).startswith("validate needs inputs to measure on; add --data X.npz")
    assert says("model.pt", *data).startswith(("validate needs the FILE to measure", "model.pt is not an ONNX"))
    assert says("model.pt", "none.onnx", *data) == "none.onnx cannot be read: No such file or directory.\n"
    assert says("model.pt", "test.npz", *data) == "test.npz is not an ONNX model.\n"
    assert says(FILE, FILE, *data)
    np.savez("wrong.npz", x=np.zeros((4, 3, 9, 9), np.float32))
    assert says("model.pt", FILE, "--data", "wrong.npz").startswith("Input x must have shape [any, 3, 8, 8], got [")
    np.savez("unlabelled.npz", x=small_models.images(4))
    assert says("model.pt", FILE, "--data", "unlabelled.npz", "--metric", "top1") == (
        "--metric top1 needs labels, but unlabelled.npz has no array y.\n"
    )
    assert "Unknown metric 'acc'" in says("model.pt", FILE, *data, "--metric", "acc")
    two = torch.export.export(Pair(), (torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)))
    torch.export.save(two, "pair.pt2")
    np.savez("pair.npz", a=small_models.images(4), b=small_models.images(4))
    assert says("pair.pt2", FILE, "--data", "pair.npz") == (
        f"{FILE} was not made from this model: its inputs are x, the model's a, b.\n"
    )


@pytest.mark.usefixtures("traced_once")
def test_a_config_names_model_data_and_metric(qcompress, files):
    (files / "metrics.py").write_text(
        "def loss(outputs, y):\n    return -outputs['output'][range(len(y)), y].astype('float64')\n"
        "def halved(x):\n    return x / 2\n"
    )
    (files / "qcompress.toml").write_text(
        'model = "model.pt"\ndata = "test.npz"\nmetric = "metrics:loss"\nlower_is_better = true\n'
        'transform = "metrics.py:halved"\n'
    )
    result = qcompress("validate", FILE, "--no-timing", "--json")
    assert result.exit_code == 0, result.output
    metric = json.loads(result.stdout)["metric"]
    assert (metric["name"], metric["lower_is_better"]) == ("metrics:loss", True)
    assert metric["drop"] == pytest.approx(metric["compressed"] - metric["original"])
