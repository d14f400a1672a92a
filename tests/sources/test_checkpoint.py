"""Checkpoints: which tensors are the model's, the same values as torch.load, modules of torch.nn and of one's own."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from qcompress.errors import SourceError, UnsafeFileError
from qcompress.graph.options import ProgramOptions
from qcompress.openers import load_source
from qcompress.sources.base import SourceOptions

OPTIONS = ProgramOptions(inputs={"x": np.zeros((2, 3, 8, 8), np.float32)})


@pytest.fixture(params=[False, True], ids=["zip", "legacy"])
def save(request, tmp_path):
    def write(value):
        torch.save(value, tmp_path / "model.pt", _use_new_zipfile_serialization=not request.param)
        return tmp_path / "model.pt"

    return write


def names(source) -> list[str]:
    return [name for t in source.tensors() for name in (t.name, *t.aliases)]


def test_values_equal_torch(save):
    dtypes = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int8,
        torch.uint8,
        torch.bool,
    ]
    state = {str(d): (torch.randn(3, 4) * 3).to(d) for d in dtypes}
    whole = torch.randn(4, 6)
    state |= {"view": whole[1:, ::2], "turned": whole.t(), "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 3)}
    state["last"] = nn.Parameter(torch.randn(2, 2, 2, 2).to(memory_format=torch.channels_last))
    for tensor in load_source(save(state)).tensors():
        expected = state[tensor.name].detach()
        assert tensor.array.shape == tuple(expected.shape)
        assert tensor.kind == "unknown"
        np.testing.assert_array_equal(np.asarray(tensor.array).astype(np.float64), expected.double().numpy())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}},
        lambda s: {"model_state_dict": s},
        lambda s: {"checkpoint": {"net": s}},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    ],
)
def test_nested_state_dicts(save, small, wrap):
    source = load_source(save(wrap(small.state_dict())))
    assert sorted(names(source)) == sorted(small.state_dict())
    assert source.note is None


def test_several_candidates(save, small):
    ema = {k: v + 1 for k, v in small.state_dict().items()}
    source = load_source(save({"model_ema": ema, "model": small.state_dict()}))
    assert source.note == f"{source.label}: tensors taken from 'model'; not read: 'model_ema'."
    first = next(source.tensors())
    np.testing.assert_array_equal(first.array, small.conv.weight.detach())


def test_tied_tensors_are_told_once(save, small):
    tied = [(t.name, t.aliases) for t in load_source(save(small.state_dict())).tensors() if t.aliases]
    assert tied == [("fc.weight", ("fc2.weight",))]


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.zeros(3), r"it holds one bare tensor without a name\. Save model\.state_dict\(\)\.$"),
        ({"epoch": 3, "loss": 0.5}, r"it holds a dict with the keys epoch, loss\."),
        ({}, r"it holds an empty dict\."),
        ([1, 2], r"it holds an object of type list\."),
        (nn.ReLU(), r"it holds an object made by torch\.nn\.modules\.activation\.ReLU, which was not run\."),
    ],
)
def test_no_tensor_found(save, value, match):
    with pytest.raises(SourceError, match=r"^no tensor found in .*model\.pt: " + match):
        load_source(save(value))


def test_special_tensors_are_refused(save):
    with pytest.raises(SourceError, match=r"holds a sparse, quantized, nested or otherwise special tensor"):
        load_source(save({"w": torch.eye(3).to_sparse()}))


def test_state_dict_without_arch(save, small):
    source = load_source(save(small.state_dict()))
    with pytest.raises(
        SourceError,
        match=r"a state dict holds no program: pass its architecture with --arch package\.module:factory or "
        r"--arch path/file\.py:factory\.$",
    ):
        source.program(OPTIONS)


def every_layer() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 4, 3, groups=2), nn.Conv3d(2, 2, 1, groups=2), nn.ConvTranspose2d(3, 3, 3, groups=3),
        nn.Linear(4, 2),
        nn.LSTM(2, 3, bidirectional=True), nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2, kdim=3, vdim=3),
        nn.Embedding(3, 4), nn.EmbeddingBag(3, 4), nn.Bilinear(2, 2, 2), nn.BatchNorm2d(3), nn.LayerNorm((2, 2)),
        nn.PReLU(),
        nn.TransformerEncoderLayer(4, 2, 8, activation="gelu"), nn.GRUCell(2, 3),
    )  # fmt: skip


def test_kinds_of_a_pickled_module_are_those_in_memory(save):
    net = every_layer()
    pickled = {t.name: t.kind for t in load_source(save(net)).tensors()}
    assert pickled == {t.name: t.kind for t in load_source(net).tensors()}
    assert pickled["0.weight"] == "conv"
    assert pickled["1.weight"] == "depthwise"
    assert pickled["2.weight"] == "conv_transpose"
    assert pickled["3.weight"] == "linear"
    assert pickled["4.weight_hh_l0_reverse"] == "recurrent"
    assert pickled["5.in_proj_weight"] == pickled["6.k_proj_weight"] == pickled["5.out_proj.weight"] == "linear"
    assert pickled["7.weight"] == pickled["8.weight"] == "embedding"
    assert pickled["9.weight"] == pickled["11.weight"] == "parameter"
    assert {pickled[n] for n in ("10.weight", "10.running_mean", "12.weight")} == {"other"}
    assert pickled["14.weight_ih"] == "recurrent"


def test_module_of_torch_nn_alone(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    net.add_module("attention", nn.Identity())
    torch.save({"model": net, "epoch": 3}, tmp_path / "model.pt")
    source = load_source(tmp_path / "model.pt")
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(source.module()(x), net(x), rtol=0, atol=0)
    assert source.program(OPTIONS) is not None
    torch.save(every_layer(), tmp_path / "model.pt")
    assert type(load_source(tmp_path / "model.pt").module()) is nn.Sequential


NETS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.width = width
        self.conv = nn.Conv2d(3, width, 3, groups=1)
        self.register_buffer("scale", __import__("torch").ones(1), persistent=False)

    def forward(self, x):
        return self.conv(x).relu() * self.scale

def build(width=4, fail=False):
    if fail:
        raise ValueError("no such\\nnet")
    return Net(width)

def number():
    return 3

not_callable = 4
"""


@pytest.fixture(scope="module")
def own_class_folder(tmp_path_factory):
    """A module of a class of its own, pickled from elsewhere (model.pt) and by the script that defines it (main.pt)."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_nets.py").write_text(NETS)
    code = (
        "import sys, torch, my_nets; torch.save(my_nets.Net(), 'model.pt')\n"
        "sys.modules['__main__'].Net = my_nets.Net; my_nets.Net.__module__ = '__main__'\n"
        "torch.save(my_nets.Net(), 'main.pt')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)
    return folder


@pytest.fixture
def own_class(own_class_folder, monkeypatch):
    """A pickled module of a class in the working directory."""
    monkeypatch.chdir(own_class_folder)
    return own_class_folder / "model.pt"


def test_own_class_is_read_but_not_run(own_class):
    source = load_source(own_class)
    assert [(t.name, t.kind) for t in source.tensors()] == [
        ("conv.weight", "conv"), ("conv.bias", "other"), ("scale", "other"),
    ]  # fmt: skip
    with pytest.raises(UnsafeFileError) as caught:
        source.program(OPTIONS)
    assert str(caught.value) == (
        f"{own_class} is a pickle that needs code which is not part of torch.nn: my_nets.Net. None of its code was "
        "run. Ways out: save a .pt2 (torch.export.save), or a state dict and pass its architecture with --arch, or "
        "allow the class with --allow-class my_nets:Net. Only if you trust whoever made the file: --trust-pickle."
    )
    assert "my_nets" not in sys.modules


@pytest.mark.parametrize(
    "options",
    [
        SourceOptions(allow_classes=("my_nets:Net",)),
        SourceOptions(trust_pickle=True),
        SourceOptions(arch="my_nets:build"),
        SourceOptions(arch="my_nets.py:Net", arch_kwargs={"width": 4}),
    ],
)
def test_ways_out(own_class, options, monkeypatch):
    """Each looks in the working directory first, wherever Python was started."""
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(own_class.parent)])
    assert load_source(own_class, options=options).program(OPTIONS) is not None


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("my_nets:Nett", r"--allow-class my_nets:Nett: my_nets has no 'Nett'\. Did you mean Net\?"),
        ("my_nets:number", r"--allow-class my_nets:number must be a class, got function\."),
        (
            "other_nets:Net",
            r"--allow-class other_nets:Net: there is no module 'other_nets'; looked in the working directory",
        ),
        ("my_nets", r"--allow-class needs package\.module:name or path/file\.py:name, got 'my_nets'\."),
        ("collections:OrderedDict", r"needs code which is not part of torch\.nn: my_nets\.Net"),
    ],
)
def test_allow_class_errors(own_class, spec, match):
    with pytest.raises(SourceError, match=match):
        load_source(own_class, options=SourceOptions(allow_classes=(spec,))).program(OPTIONS)


def test_class_of_a_script(own_class):
    """Saved by a script its class is __main__.Net: the module that holds it now is named, the way out works."""
    path = own_class.parent / "main.pt"
    with pytest.raises(UnsafeFileError, match=r"torch\.nn: __main__\.Net\..*with --allow-class your_module:Net\."):
        load_source(path).program(OPTIONS)
    source = load_source(path, options=SourceOptions(allow_classes=("my_nets:Net",)))
    assert type(source.module()).__name__ == "Net"


def test_tensors_need_no_torch(tmp_path, small, pt2):
    torch.save(small, tmp_path / "model.pt")
    pt2.save(tmp_path)
    code = (
        "import sys; from qcompress.openers import load_source\n"
        "for name in ('model.pt', 'model.pt2'):\n"
        f"    [t.array.read() for t in load_source({str(tmp_path)!r} + '/' + name).tensors()]\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_file_facts(tmp_path, small):
    torch.save(small, tmp_path / "model.pt")
    source = load_source(tmp_path / "model.pt")
    assert source.label == str(tmp_path / "model.pt")
    assert source.path == tmp_path / "model.pt"
    assert source.original_bytes == (tmp_path / "model.pt").stat().st_size
    assert len(source.sha256) == 64
    assert sum(math.prod(t.array.shape) for t in source.tensors()) > 0
