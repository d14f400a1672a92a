"""Files of token models run at other lengths than the example's, and give what the user's module gives."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from qcompress import compress
from qcompress.data.dataset import Dataset
from qcompress.errors import SourceError
from qcompress.plan.plan import Plan
from qcompress.plan.settings import Settings
from qcompress_exporters import export, validate
from tests.helpers.token_nets import POSITIONS, Causal, Encoder, FixedLength, Tagger, Translator, example


def written(net: nn.Module, length: int, path: Path) -> onnxruntime.InferenceSession:
    """Write a net whose weights all stay float, so that outputs can be compared."""
    inputs = {name: torch.from_numpy(value) for name, value in example(net, 2, length).items()}
    small = compress(net, Plan(default=Settings(skip=True)), example_inputs=tuple(inputs.values()))
    export(small, path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("make", [Encoder, Causal, Tagger, Translator])
def test_a_file_takes_other_lengths(make: type[nn.Module], tmp_path: Path) -> None:
    net = make().eval()
    session = written(net, 9, tmp_path / "net.onnx")
    axes = {i.name: i.shape for i in session.get_inputs()}
    assert axes["ids"] == ["batch", "sequence"]
    assert axes.get("mask", axes["ids"]) == axes["ids"]
    assert axes.get("decoder_ids", [None])[-1] in (None, "decoder_ids_sequence")
    for length, other in ((3, 8), (POSITIONS, 2)):
        given = example(net, 3, length, other)
        with torch.no_grad():
            wanted = net(**{name: torch.from_numpy(value) for name, value in given.items()})
        wanted = list(wanted.values()) if isinstance(wanted, dict) else [wanted]
        for value, got in zip(wanted, session.run(None, given), strict=True):
            np.testing.assert_allclose(got, value.numpy(), atol=1e-5)


def test_a_file_of_one_length_says_so(tmp_path: Path) -> None:
    session = written(FixedLength().eval(), 16, tmp_path / "net.onnx")
    assert session.get_inputs()[0].shape == ["batch", 16]


class Rounds(nn.Module):
    """It computes with a rounded size, which torch.onnx cannot write; with a fixed size it is a number."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(30, 4)
        self.axis = axis

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.tokens(ids).sum(1) * round(ids.shape[self.axis] / 3 + 1)


@pytest.mark.parametrize(
    ("axis", "shape", "what"), [(0, [1, 9], "a fixed batch of 1"), (1, ["batch", 9], "fixed lengths")]
)
def test_axes_are_fixed_where_torch_onnx_needs_it(axis: int, shape: list[object], what: str, tmp_path: Path) -> None:
    net = Rounds(axis).eval()
    small = compress(net, Plan(default=Settings(bits=4)), example_inputs=(torch.zeros(2, 9, dtype=torch.int64),))
    path = tmp_path / "net.onnx"
    report = export(small, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == shape
    assert [note for note in report.notes if note.startswith(f"Exported with {what}, because")]
    ids = np.random.default_rng(0).integers(0, 30, (6, 9))
    assert validate(small, path, Dataset(inputs={"ids": ids}, labels=None, name="ids")).ok
    with pytest.raises(SourceError, match=r"^torch\.export\.save cannot save the model's program: .*round"):
        small.save(tmp_path / "saved")
    assert [found.name for found in tmp_path.iterdir()] == ["net.onnx"]
