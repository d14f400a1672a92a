"""Checkpoints as trainers write them: prefixes of wrappers, and tensors beside the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qcompress.errors import SourceError
from qcompress.graph.options import ProgramOptions
from qcompress.openers import load_source
from qcompress.sources.base import SourceOptions
from qcompress.sources.prefixes import fit

ARCH = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.again = self.head

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.stem(x))))
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.again = self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.stem(x))))


def state(prefix: str = "") -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {prefix + name: value for name, value in Net().state_dict().items()}


def averaged() -> Any:
    return torch.optim.swa_utils.AveragedModel(Net()).state_dict()


def compiled_part() -> Any:
    net = Net()
    net.stem = torch.compile(net.stem)  # type: ignore[assignment]
    return net.state_dict()


def parallel_and_compiled() -> Any:
    return {f"module._orig_mod.{name}": value for name, value in state().items()}


FILES: dict[str, tuple[Any, str]] = {
    "averaged": (averaged, "The prefix 'module.' is left out; not read: n_averaged."),
    "a compiled part": (compiled_part, "'module.' and '_orig_mod.' within names are left out."),
    "a trainer's module": (
        lambda: {"state_dict": state("model.") | {"loss.weight": torch.ones(3)}, "global_step": 7},
        "The prefix 'model.' is left out; not read: loss.weight.",
    ),
    "deep": (lambda: state("student.net."), "The prefix 'student.net.' is left out."),
    "parallel and compiled": (parallel_and_compiled, ""),
    "plain": (state, ""),
}


def opened(content: Any, folder: Path) -> Any:
    (folder / "net.py").write_text(ARCH)
    torch.save(content, folder / "c.pt")
    return load_source(folder / "c.pt", options=SourceOptions(arch=f"{folder}/net.py:Net"))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("name", FILES)
def test_prefixes_are_left_out_wherever_they_stand(name: str, tmp_path: Path) -> None:
    make, note = FILES[name]
    source = opened(make(), tmp_path)
    own = [name for name in state() if not name.startswith("again.") and not name.endswith("num_batches_tracked")]
    assert [t.name for t in source.tensors() if not t.name.endswith("num_batches_tracked")] == own
    program = source.program(ProgramOptions(inputs={"x": torch.zeros(2, 6).numpy()}))
    found = [text.partition(": ")[2] for text in program.notes if "left out" in text]
    assert found == ([note] if note else [])


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    mixed = {("x." + name if "head" in name else name): value for name, value in state().items() if "again" not in name}
    source = opened(mixed, tmp_path)
    with pytest.raises(SourceError, match=r"does not fit --arch .*head\.weight"):
        list(source.tensors())


def test_names_that_would_meet_are_left_as_they_are() -> None:
    given = ["a.module.w", "a.w"]
    assert fit(given, [["a.w"], ["b"]]).names == {name: name for name in given}


BESIDE: dict[str, dict[str, Any]] = {
    "accuracy": {"best_acc1": torch.tensor(93.1), "optimizer": {"state": {}}},
    "random generator": {"rng": torch.arange(5000, dtype=torch.uint8)},
    "statistics": {"mean": torch.zeros(3), "extra": {"anchors": torch.rand(2, 2)}},
}


@pytest.mark.parametrize("key", ["state_dict", "weights_of_mine"])
@pytest.mark.parametrize("beside", BESIDE)
def test_a_tensor_beside_the_state_dict_is_not_the_model(beside: str, key: str, tmp_path: Path) -> None:
    torch.save({key: state(), **BESIDE[beside]}, tmp_path / "c.pt")
    source = load_source(tmp_path / "c.pt")
    assert {name for t in source.tensors() for name in (t.name, *t.aliases)} == set(state())
    assert "the top level" in (source.note or "")


def test_of_two_models_the_usual_key_is_taken(tmp_path: Path) -> None:
    torch.save({"ema": state(), "model": state()}, tmp_path / "c.pt")
    assert "tensors taken from 'model'; not read: 'ema'." in str(load_source(tmp_path / "c.pt").note)
