"""A state dict and the architecture that the user names; every mistake has a message."""

import numpy as np
import pytest
import safetensors.torch
import torch

from qcompress.errors import SourceError
from qcompress.graph.options import ProgramOptions
from qcompress.openers import load_source
from qcompress.sources.arch import module_of_state_dict
from qcompress.sources.base import SourceOptions

OPTIONS = ProgramOptions(inputs={"x": np.zeros((2, 3), np.float32)})
NETS = """
import torch
from torch import nn
from my_helper import WIDTH

class Net(nn.Module):
    def __init__(self, classes=2, tied=False):
        super().__init__()
        self.first = nn.Linear(3, WIDTH)
        self.second = nn.Linear(WIDTH, classes)
        self.norm = nn.BatchNorm1d(classes)
        if tied:
            self.again = nn.Linear(3, WIDTH)
            self.again.weight = self.first.weight

    def forward(self, x):
        return self.norm(self.second(self.first(x)))

def build(**kwargs):
    return Net(**kwargs)

def broken():
    raise ValueError("no such\\nnet")

def number():
    return 3

four = 4
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "net.py").write_text(NETS)
    (tmp_path / "nets" / "my_helper.py").write_text("WIDTH = 5\n")
    (tmp_path / "bad.py").write_text("import torch\n1 / 0\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state(classes=2, width=5):
    return {
        "first.weight": torch.randn(width, 3), "first.bias": torch.randn(width),
        "second.weight": torch.randn(classes, width), "second.bias": torch.randn(classes),
        "norm.weight": torch.ones(classes), "norm.bias": torch.ones(classes),
        "norm.running_mean": torch.ones(classes), "norm.running_var": torch.ones(classes),
    }  # fmt: skip


def options(arch="nets/net.py:build", **kwargs):
    return SourceOptions(arch=arch, arch_kwargs=kwargs)


@pytest.mark.parametrize("kind", ["memory", "numpy", "pt", "safetensors"])
def test_values_arrive(folder, kind):
    values = state() if kind != "pt" else {f"module.{k}": v for k, v in state().items()}
    path = folder / "state.bin"
    if kind == "pt":
        torch.save({"state_dict": values}, path)
    elif kind == "safetensors":
        safetensors.torch.save_file(values, path)
    in_memory = {k: v.numpy() for k, v in values.items()} if kind == "numpy" else values
    source = load_source(in_memory if kind in ("memory", "numpy") else path, options=options(classes=2))
    kinds = {t.name: t.kind for t in source.tensors()}
    assert kinds["first.weight"] == "linear"
    assert kinds["norm.weight"] == "other"
    module = module_of_state_dict(source.tensors(), options(), "state")
    for name, value in values.items():
        assert torch.equal(module.state_dict()[name.removeprefix("module.")], value)
    assert source.program(OPTIONS) is not None


def test_small_floats_arrive(folder):
    values = {k: v.to(torch.bfloat16) for k, v in state().items()}
    module = module_of_state_dict(load_source(values).tensors(), options(), "state")
    assert torch.equal(module.first.weight, values["first.weight"].float())


def test_tied_weight_may_be_there_once(folder):
    """safetensors.torch.save_model leaves one name of a tied tensor out."""
    values = state() | {"again.bias": torch.randn(5)}
    module = module_of_state_dict(load_source(values).tensors(), options(tied=True), "state")
    assert module.again.weight is module.first.weight


@pytest.mark.parametrize(
    ("arch", "match"),
    [
        ("nets/none.py:build", r"^--arch nets/none\.py:build: there is no file nets/none\.py\.$"),
        ("nets/net.py:biuld", r"^--arch nets/net\.py:biuld: nets/net\.py has no 'biuld'\. Did you mean build\?$"),
        ("nets/net.py:zzz", r"nets/net\.py has no 'zzz'\. It defines Net, WIDTH, broken, build, "),
        (
            "nets/net.py:broken",
            r"^--arch nets/net\.py:broken: broken\(\) failed with ValueError: no such net\. Its arg",
        ),
        ("nets/net.py:number", r"number\(\) must return a torch\.nn\.Module, got int\.$"),
        ("nets/net.py:four", r"^--arch nets/net\.py:four must be a function or a class, got int\.$"),
        ("bad.py:build", r"^--arch bad\.py:build: running bad\.py failed with ZeroDivisionError: division by zero\.$"),
        ("bad:build", r"^--arch bad:build: importing bad failed with ZeroDivisionError: division by zero\.$"),
        ("no.such.package:build", r"there is no module 'no'; looked in the working directory .* and in the installed"),
        ("build", r"^--arch needs package\.module:name or path/file\.py:name, got 'build'\.$"),
    ],
)
def test_factory_errors(folder, arch, match):
    with pytest.raises(SourceError, match=match):
        load_source(state(), options=options(arch)).program(OPTIONS)


def test_wrong_arguments(folder):
    with pytest.raises(
        SourceError, match=r"build\(depth=3\) failed with TypeError: .*'depth'\. Its arguments come from --arch-kw"
    ):
        load_source(state(), options=options(depth=3)).program(OPTIONS)


def test_names_that_do_not_fit(folder):
    values = state()
    values["fisrt.weight"] = values.pop("first.weight")
    with pytest.raises(SourceError) as caught:
        load_source(values, options=options()).program(OPTIONS)
    assert str(caught.value) == (
        "state dict does not fit --arch nets/net.py:build: 1 tensors are missing in the file (first.weight). Did you "
        "mean fisrt.weight? 1 are unknown to the architecture (fisrt.weight). Did you mean first.weight? Check "
        "--arch-kwargs."
    )


def test_shapes_that_do_not_fit(folder):
    with pytest.raises(SourceError) as caught:
        load_source(state(), options=options(classes=10)).program(OPTIONS)
    assert str(caught.value).startswith(
        "state dict does not fit --arch nets/net.py:build: 6 shapes differ (second.weight is [2, 5] in the file, "
        "[10, 5] in the architecture; "
    )


def test_state_dict_in_memory_must_hold_tensors():
    with pytest.raises(SourceError, match=r"^a state dict must map names to tensors, got dict at 'model': pass the"):
        load_source({"model": state()})
    with pytest.raises(SourceError, match=r"^no tensor found in the state dict: it is empty\.$"):
        load_source({})
