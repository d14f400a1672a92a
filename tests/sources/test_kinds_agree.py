"""The kinds of weights are those that compression finds, whatever form of the model is asked: module, graph or file.

State dicts without an architecture have names and shapes only, and promise no more than an export of the module gives.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune

from qcompress.analysis import analyze
from qcompress.artifacts.float_weight import FloatWeight
from qcompress.graph.options import ProgramOptions
from qcompress.graph.quiet import quiet_torch
from qcompress.graph.symbolic import kinds_of
from qcompress.graph.tensors import program_tensors
from qcompress.graph.tracing import from_module
from qcompress.openers import load_source
from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.settings import PosthocSettings
from qcompress.sources.base import Source

LISTED = "parametrizations.weight.original"
ROWS, IMAGES, SENTENCES, IDS = (2, 16), (2, 4, 6, 6), (2, 5, 16), (2, 5)


class Net(nn.Module):
    """A forward in one function, with the parameters and layers that it uses."""

    def __init__(self, function: Callable[..., Tensor], **parts: tuple[int, ...] | nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(torch.randn(part)) if isinstance(part, tuple) else part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class TiedHeadFirst(nn.Module):
    """The embedding runs first; the head, which comes first by name, shares its tensor. One layer is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.embed = nn.Linear(16, 40, bias=False), nn.Embedding(40, 16)
        self.embed.weight = self.head.weight
        self.unused = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


class Branches(nn.Module):
    """A forward that no symbol gets through, with a weight of its own and one in a part."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.fc = nn.Parameter(torch.randn(64, 16)), nn.Linear(16, 16)
        self.part = Net(lambda m, x: x @ m.v, v=(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 100:
            x = x[:, :100]
        q, k = self.w.chunk(2)
        return self.part(self.fc(x)) @ q.t() + x @ k.t()


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning, match="deprecated"):
        return nn.utils.weight_norm(layer)


def attention(**options: int) -> nn.Module:
    return nn.MultiheadAttention(16, 2, batch_first=True, **options)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Mapping[str, str]]] = {
    "a product": (lambda: Net(lambda m, x: x @ m.w, w=(16, 8)), ROWS, {"w": "linear"}),
    "a product from the left": (lambda: Net(lambda m, x: (m.w @ x.t()).t(), w=(8, 16)), ROWS, {"w": "parameter"}),
    "chunks": (
        lambda: Net(lambda m, x: sum(functional.linear(x, part) for part in m.w.chunk(4)), w=(64, 16)),
        ROWS,
        {"w": "linear"},
    ),
    "a split": (
        lambda: Net(lambda m, x: functional.linear(x, m.w.split([16, 48])[1]), w=(64, 16)),
        ROWS,
        {"w": "linear"},
    ),
    "a slice": (lambda: Net(lambda m, x: functional.linear(x, m.w[:8]), w=(64, 16)), ROWS, {"w": "linear"}),
    "selected": (
        lambda: Net(lambda m, x: functional.linear(functional.linear(x, m.w[0]), m.w[1]), w=(2, 16, 16)),
        ROWS,
        {"w": "linear"},
    ),
    "gathered": (lambda: Net(lambda m, x: functional.linear(x, m.w[[0, 2]]), w=(64, 16)), ROWS, {"w": "linear"}),
    "transposes": (
        lambda: Net(lambda m, x: x @ m.a.T @ m.b.t() @ m.c.transpose(0, 1), a=(8, 16), b=(8, 8), c=(8, 8)),
        ROWS,
        {"a": "linear", "b": "linear", "c": "linear"},
    ),
    "a kernel with its axes moved": (
        lambda: Net(lambda m, x: functional.conv2d(x, m.w.permute(3, 2, 0, 1)), w=(3, 3, 4, 8)),
        IMAGES,
        {"w": "conv"},
    ),
    "views": (
        lambda: Net(
            lambda m, x: functional.linear(x, m.w.view(-1, 16)) @ m.v.unsqueeze(0)[0].float(), w=(2, 8, 16), v=(16, 4)
        ),
        ROWS,
        {"w": "linear", "v": "linear"},
    ),
    "scaled": (lambda: Net(lambda m, x: functional.linear(x, m.w * 2), w=(8, 16)), ROWS, {"w": "linear"}),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 8, 3, groups=4),
            nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"),
            nn.ConvTranspose2d(4, 4, 3, groups=4),
            Net(lambda m, x: functional.conv2d(x, m.w, groups=2), w=(4, 2, 1, 1)),
        ),
        IMAGES,
        {"0.weight": "depthwise", "1.weight": "conv", "2.weight": "conv_transpose", "3.w": "conv"},
    ),
    "attention": (
        lambda: Net(lambda m, x: m.own(x, x, x)[0] + m.cross(x, 2 * x, 2 * x)[0], own=attention(), cross=attention()),
        SENTENCES,
        {f"{name}.{part}": "linear" for name in ("own", "cross") for part in ("in_proj_weight", "out_proj.weight")},
    ),
    "a decoder": (
        lambda: Net(lambda m, x: m.layer(x, x), layer=nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)),
        SENTENCES,
        {
            **{f"layer.linear{i}.weight": "linear" for i in (1, 2)},
            **{
                f"layer.{name}.{part}": "linear"
                for name in ("self_attn", "multihead_attn")
                for part in ("in_proj_weight", "out_proj.weight")
            },
        },
    ),
    "recurrent": (
        lambda: Net(lambda m, x: m.cell(m.layer(x)[0][:, 0])[0], layer=nn.LSTM(16, 8), cell=nn.LSTMCell(8, 4)),
        SENTENCES,
        {
            **{f"layer.weight_{which}h_l0": "recurrent" for which in "ih"},
            **{f"cell.weight_{which}h": "recurrent" for which in "ih"},
        },
    ),
    "tied": (TiedHeadFirst, IDS, {"head.weight": "embedding"}),
    "embeddings": (
        lambda: Net(
            lambda m, ids: functional.embedding(ids, m.w).sum(1) + functional.embedding_bag(ids, m.v),
            w=(40, 8),
            v=(40, 8),
        ),
        IDS,
        {"w": "embedding", "v": "embedding"},
    ),
    "a mask": (lambda: pruned(nn.Linear(16, 8)), ROWS, {"weight_orig": "linear"}),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(4, 8, 3)), IMAGES, {f"{LISTED}1": "conv"}),
    "weight norm as it was": (lambda: old_weight_norm(nn.Conv2d(4, 8, 3)), IMAGES, {"weight_v": "conv"}),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(16, 8)), ROWS, {LISTED: "linear"}),
    "an update": (
        lambda: Net(lambda m, x: functional.linear(x, m.w + m.b @ m.a), b=(8, 2), a=(2, 16), w=(8, 16)),
        ROWS,
        {"w": "linear"},
    ),
    "joined": (
        lambda: Net(lambda m, x: functional.linear(x, torch.cat([m.a, m.b])), a=(8, 16), b=(4, 16)),
        ROWS,
        {"a": "linear"},
    ),
    "used twice": (
        lambda: Net(lambda m, x: functional.linear(x, m.w * 2) @ m.w, w=(8, 16)),
        ROWS,
        {"w": "linear"},
    ),
    "tables": (
        lambda: Net(lambda m, x: m.norm(x + m.at) * m.scale, at=(5, 16), scale=(1, 1, 16), norm=nn.LayerNorm((5, 16))),
        SENTENCES,
        {"at": "parameter", "norm.weight": "parameter", "norm.bias": "parameter"},
    ),
    "branches": (Branches, ROWS, {"w": "linear", "fc.weight": "linear", "part.v": "linear"}),
}


def weights(source: Source) -> dict[str, str]:
    return {tensor.name: tensor.kind for tensor in source.tensors() if tensor.kind != "other"}


@pytest.mark.parametrize("name", NETS)
def test_every_form_of_a_model_names_the_same_weights(name: str, tmp_path: Path) -> None:
    make, shape, wanted = NETS[name]
    net, random = make().eval(), np.random.default_rng(0)
    x = random.integers(0, 40, shape) if shape == IDS else random.standard_normal(shape).astype(np.float32)
    program = from_module(net, ProgramOptions(inputs={"x": x}))
    assert {t.name: t.kind for t in program_tensors(program) if t.kind != "other"} == wanted
    assert weights(load_source(net)) == wanted
    with quiet_torch():
        exported = torch.export.export(net, (torch.from_numpy(x),))
    assert weights(load_source(exported)) == wanted
    torch.export.save(exported, tmp_path / "m.pt2")
    assert weights(load_source(tmp_path / "m.pt2")) == wanted


class LowRank(nn.Module):
    """A parametrization with matrices of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(16, 2)), nn.Parameter(torch.randn(2, 16))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.a @ self.b


class Gates(nn.Module):
    """A cell with weights under names that weight_norm uses, too."""

    def __init__(self) -> None:
        super().__init__()
        self.w_g, self.w_v = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w_g).sigmoid() * (x @ self.w_v)


def parametrized(layer: nn.Module, part: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", part)


def tied() -> nn.Module:
    net = TiedHeadFirst()
    del net.unused  # a state dict cannot tell
    return net


def norm_of_images() -> nn.Module:
    norm = Net(lambda m, x: x * m.weight + m.bias, weight=(1, 8, 1, 1), bias=(1, 8, 1, 1))
    return nn.Sequential(nn.Conv2d(4, 8, 1), norm)


def old_spectral_norm() -> nn.Module:
    return nn.utils.spectral_norm(nn.Conv2d(4, 8, 3))


def recurrent(layer: Callable[..., nn.Module], **options: object) -> nn.Module:
    return Net(lambda m, x: m.layer(x)[0], layer=layer(16, 8, batch_first=True, **options))


# Modules whose state dicts tell by themselves which tensors are weights.
BARE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{name: NETS[name][:2] for name in ("convolutions", "attention", "a decoder", "a mask")},
    **{name: NETS[name][:2] for name in ("recurrent", "weight norm", "weight norm as it was", "spectral norm")},
    "spectral norm as it was": (old_spectral_norm, IMAGES),
    "one output, one input": (lambda: nn.Sequential(nn.Linear(16, 1), nn.Linear(1, 16)), ROWS),
    "a norm of images": (norm_of_images, IMAGES),
    "tied": (tied, IDS),
    "a table": (lambda: Net(lambda m, x: (x + m.at) * m.scale, at=(5, 16), scale=(1, 1, 16)), SENTENCES),
    "BatchNorm": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8)), IMAGES),
    "a bias with a mask, too": (lambda: prune.random_unstructured(pruned(nn.Linear(16, 8)), "bias", 0.5), ROWS),
    "an orthogonal weight": (lambda: parametrizations.orthogonal(nn.Linear(16, 16)), ROWS),
    "an update by a parametrization": (lambda: parametrized(nn.Linear(16, 16), LowRank()), ROWS),
    "two parametrizations": (lambda: parametrizations.spectral_norm(parametrized(nn.Linear(16, 16), LowRank())), ROWS),
    "weight norm of the whole": (lambda: parametrizations.weight_norm(nn.Linear(16, 8), dim=None), ROWS),
    "weights called as in weight norm": (Gates, ROWS),
    "LSTM with projections in both directions": (
        lambda: recurrent(nn.LSTM, proj_size=4, num_layers=2, bidirectional=True),
        SENTENCES,
    ),
    "GRU": (lambda: recurrent(nn.GRU, bidirectional=True), SENTENCES),
    "RNN with weight norm": (lambda: parametrizations.weight_norm(nn.RNNCell(16, 8), "weight_hh"), ROWS),
    "RNN with a mask": (lambda: prune.l1_unstructured(nn.RNNCell(16, 8), "weight_ih", 0.5), ROWS),
}


@pytest.mark.parametrize("name", BARE)
def test_a_state_dict_promises_what_export_gives(name: str, tmp_path: Path) -> None:
    make, shape = BARE[name]
    net, random = make().eval(), np.random.default_rng(0)
    x = random.integers(0, 40, shape) if shape == IDS else random.standard_normal(shape).astype(np.float32)
    program = from_module(net, ProgramOptions(inputs={"x": x}))
    small = compress_program(program, Plan.from_flags(bits=3), PosthocSettings(effort="fast"))
    given = {name: a.nbytes for name, a in small.artifacts.items() if not isinstance(a, FloatWeight)}
    torch.save(net.state_dict(), tmp_path / "m.pt")
    for model in (net.state_dict(), tmp_path / "m.pt"):
        promised = {t.name: t.nbytes_at[3] for t in analyze(model).tensors if 0 < t.nbytes_at[3] < t.nbytes}
        assert promised == given
    recurrent_names = {tensor.name for tensor in program_tensors(program) if tensor.kind == "recurrent"}
    told = {tensor.name: tensor.kind for tensor in load_source(net.state_dict()).tensors()}
    assert {name for name, kind in told.items() if kind == "recurrent"} == recurrent_names


def test_parts_of_a_weight_cost_nothing_beside_it() -> None:
    net = pruned(parametrizations.weight_norm(nn.Linear(64, 64), "bias", dim=None))
    for model in (net, net.state_dict()):
        mask = next(t for t in analyze(model).tensors if t.name == "weight_mask")
        assert (mask.kind, mask.stays) == ("other", "export computes it into weight_orig")
        assert set(mask.nbytes_at.values()) == {0}


def test_a_forward_leaves_no_trace_in_its_module() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("count", torch.zeros(()))
            self.last: object = None

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            self.last = x
            return self.fc(x)

    net = Remembers().train()
    assert kinds_of(net)["fc.weight"] == "linear"
    assert net.last is None
    assert net.training
    assert float(net.count) == 0


@pytest.mark.parametrize("error", [SystemExit(0), RecursionError(), ValueError("no")])
def test_a_forward_that_fails_on_symbols_leaves_the_types(error: BaseException) -> None:
    def fail(module: nn.Module, x: Tensor) -> Tensor:
        raise error

    assert kinds_of(Net(fail, fc=nn.Linear(4, 4), w=(4, 4))) == {
        "w": "parameter",
        "fc.weight": "linear",
        "fc.bias": "other",
    }


def test_loops_on_values_end() -> None:
    def wait(module: nn.Module, x: Tensor) -> Tensor:
        while x.sum() > 0:
            x = x - 1
        while not x.sum() > 0:
            x = x + 1
        return x @ module.w  # type: ignore[operator]

    assert kinds_of(Net(wait, w=(4, 4))) == {"w": "parameter"}
