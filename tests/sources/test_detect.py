"""The kind of a file is told by its content; every file that is no model has a message of its own."""

import os
import pickle
import re
import zipfile
from pathlib import Path

import onnx
import pytest
import torch

from qcompress.errors import SourceError
from qcompress.openers import Opener, load_source
from qcompress.sources.detect import content_of


def test_content_under_a_wrong_suffix(tmp_path, small, pt2):
    path = tmp_path / "model.txt"
    torch.save(small.state_dict(), path)
    assert content_of(path) == "checkpoint"
    torch.save(small.state_dict(), path, _use_new_zipfile_serialization=False)
    assert content_of(path) == "legacy_checkpoint"
    assert content_of(pt2.save(tmp_path, "model.txt")) == "exported"
    path.write_bytes(pickle.dumps({"a": 1}))
    assert content_of(path) == "pickle"
    path.write_bytes(b"(dp0\nS'a'\np1\nI1\ns.")
    assert content_of(path) == "pickle"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    assert content_of(path) == "safetensors"


def refusal(path) -> str:
    with pytest.raises(SourceError) as caught:
        load_source(path)
    return str(caught.value)


def test_a_folder_of_a_float_run(tmp_path, pt2):
    model = pt2.save(tmp_path, "model.pt2")
    assert content_of(tmp_path) == "folder"
    (tmp_path / "run.json").write_text("{}")
    assert content_of(tmp_path) == "float_folder"
    assert [t.name for t in load_source(tmp_path).tensors()] == [t.name for t in load_source(model).tensors()]


def test_messages(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"")
    assert refusal(path) == f"{path} must be a model, but it is an empty file. Copy or save the model again."
    path.write_text("hello, I am no model\n" * 10)
    assert refusal(path) == (
        f"{path} must be a model, but it is a text file. Pass a model file: .pt2, .pt or .safetensors."
    )
    path.write_bytes(bytes(range(200)))
    assert refusal(path).startswith(f"{path} must be a model, but it is a file of an unknown kind. Pass a model file")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert (
        refusal(path)
        == f"{path} must be a model, but it is a zip archive that holds no model. Pass the model file itself."
    )
    assert refusal(tmp_path) == f"{tmp_path} must be a model, but it is a folder. Pass a model file in it."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.1")
        archive.writestr("serialized_exported_program.json", "{}")
    assert refusal(path) == (
        f"{path} is an exported program in the layout of torch before 2.8. Load it with the torch that wrote it and "
        "save it again with a newer one."
    )


def test_no_such_file(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"x")
    path = tmp_path / "modle.pt"
    assert refusal(path) == f"{path} does not exist: name a model file. Did you mean model.pt?"


def test_pipes_and_devices(tmp_path, small):
    """Nobody writes to the pipe, and the device never ends."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        assert refusal(path) == f"{path} must be a file, but it is a pipe, a device or a socket: name a model file."
    torch.save(small.state_dict(), tmp_path / "model.pt")
    (tmp_path / "link").symlink_to(tmp_path / "model.pt")
    assert content_of(tmp_path / "link") == "checkpoint"


def test_torchscript(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("m/data.pkl", b"")
        archive.writestr("m/constants.pkl", b"")
    assert re.search(
        r"is a TorchScript archive\. Export the module itself: torch\.export", refusal(tmp_path / "model.pt")
    )


def test_onnx_file(tmp_path):
    path = tmp_path / "model.onnx"
    graph = onnx.helper.make_graph([], "g", [], [])
    onnx.save(onnx.helper.make_model(graph), path)
    assert refusal(path) == f"{path} is an ONNX file. Pass the PyTorch model that it was made from."


def test_other_openers_can_be_given(tmp_path, small):
    mine = load_source(small)
    opener = Opener("folder", lambda path: path.is_dir(), lambda path, options: mine)
    assert load_source(tmp_path, openers=(opener,)) is mine


def test_truncated_checkpoint(tmp_path, small):
    path = tmp_path / "model.pt"
    torch.save(small, path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert "is a truncated or damaged archive" in refusal(path)
    torch.save(small, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    path.write_bytes(data[:-10])
    assert "is truncated: storage" in refusal(path)


def test_other_objects():
    with pytest.raises(SourceError, match=r"^a model must be a path, a torch\.nn\.Module, .*, got int\.$"):
        load_source(3)
