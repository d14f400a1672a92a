"""Modules and exported programs: the same tensors and kinds either way, and programs that compute the same."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch._higher_order_ops.map import map as map_over
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn import functional
from torch.utils._pytree import register_pytree_node

from qcompress.errors import SourceError
from qcompress.graph.options import ProgramOptions
from qcompress.openers import load_source
from qcompress.sources.base import Source
from qcompress.sources.pt2.archive import load_exported
from qcompress.sources.pt2.forms import is_safe_target
from qcompress.sources.pt2.symbols import is_symbolic_expression

OPTIONS = ProgramOptions(inputs={"x": np.zeros((2, 3, 8, 8), np.float32)})


def told(source: Source) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {t.name: (t.kind, t.aliases) for t in source.tensors()}


def test_three_ways_tell_the_same(tmp_path, small, pt2):
    in_memory = load_source(small)
    in_file = load_source(pt2.save(tmp_path, "model.bin"))
    exported = load_source(in_file.exported_program())
    assert told(in_memory) == told(in_file) == told(exported)
    assert told(in_file)["dw.weight"] == ("depthwise", ())
    assert told(in_file)["fc.weight"] == ("linear", ("fc2.weight",))
    assert told(in_file)["scale"] == ("other", ())
    values = {t.name: np.asarray(t.array) for t in in_memory.tensors()}
    for tensor in in_file.tensors():
        np.testing.assert_array_equal(tensor.array, values[tensor.name])


def test_checked_program_computes_the_same(tmp_path, small, pt2):
    exported = load_exported(pt2.save(tmp_path))
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(exported.module()(x), small(x), rtol=0, atol=0)
    assert [tuple(r) for r in [(v.lower, v.upper) for v in exported.range_constraints.values()]]
    assert exported.example_inputs[0][0].shape == (2, 3, 8, 8)
    assert exported.state_dict["fc.weight"].data_ptr() == exported.state_dict["fc2.weight"].data_ptr()


@pytest.mark.parametrize("how", ["module", "file", "memory"])
def test_program(tmp_path, small, pt2, how):
    source = load_source(small if how == "module" else pt2.save(tmp_path))
    if how == "memory":
        source = load_source(source.exported_program())
    assert isinstance(source, Source)
    assert source.program(OPTIONS) is not None
    assert source.original_bytes > 0
    assert len(source.sha256) == 64


class Rich(nn.Module):
    """What exported graphs hold beside layers: control flow, several and nested inputs, dictionaries, integer sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.turn = nn.ConvTranspose1d(4, 4, 3)
        self.lstm = nn.LSTM(4, 3, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, ids, pair, *, mask=None):
        y = self.embed(ids)
        with torch.no_grad():
            y = y + pair[0] * y.shape[0] // 2
        y = self.turn(y.transpose(1, 2)).transpose(1, 2)
        y, _ = self.attention(y, y, y)
        z, (h, _) = self.lstm(y)
        pooled = torch.cond(z.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (z,))
        return {"pooled": pooled.reshape(z.shape[0], -1), "rest": [h, pair[1]["k-1"] + 1]}


@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it exports
def test_rich_graphs_pass_the_checks(tmp_path):
    """No legal program may be refused."""
    net = Rich().eval()
    ids, pair = torch.zeros(2, 5, dtype=torch.long), (torch.ones(2, 1, 1), {"k-1": torch.ones(2)})
    batch = torch.export.Dim("batch", max=64)
    shapes = {"ids": {0: batch}, "pair": ({0: batch}, {"k-1": {0: batch}}), "mask": None}
    exported = torch.export.export(net, (ids, pair), {"mask": None}, dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "rich.pt2")
    source = load_source(tmp_path / "rich.pt2")
    kinds = {t.name: t.kind for t in source.tensors()}
    assert kinds == {t.name: t.kind for t in load_source(net).tensors()}
    again = source.exported_program().module()
    ids, pair = torch.ones(3, 5, dtype=torch.long), (torch.ones(3, 1, 1), {"k-1": torch.ones(3)})
    expected, got = net(ids, pair), again(ids, pair, mask=None)
    torch.testing.assert_close(got["pooled"], expected["pooled"], rtol=0, atol=0)
    torch.testing.assert_close(got["rest"], expected["rest"], rtol=0, atol=0)


class ControlFlow(nn.Module):
    """Graphs inside graphs: a branch, a loop, a scan and a map."""

    def forward(self, x):
        y = torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x,))
        _, z = while_loop(lambda i, v: i < 3, lambda i, v: (i + 1, v * 2), (torch.tensor(0), x))
        last, steps = scan(lambda c, v: (c + v, (c * v).clone()), torch.zeros(4), x)
        return y, z, last, steps, map_over(lambda v: v.sin(), x)


class Symbols(nn.Module):
    """Sizes that are computed, from the batch and from the data."""

    def forward(self, x):
        found = x.nonzero()
        torch._check(found.shape[0] > 1)
        half = x.reshape(x.shape[0] * 2, -1).repeat(1, x.shape[0] // 2 + 1)
        return half + max(x.shape[0], 3) + x.shape[0] ** 0.5, found.sum() + found.shape[0], x * (x.shape[0] / 3)


class Values(nn.Module):
    """Arguments of every type: texts, infinities, complex numbers, dtypes, lists of tensors, some of them absent."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bag = nn.Linear(4, 4), nn.EmbeddingBag(10, 4)
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("fixed", torch.ones(4), persistent=False)
        self.constant = torch.arange(4.0)

    def forward(self, x):
        self.count += 1
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = self.fc(x)
        a, b = x.split([1, 3], 1)
        texts = (
            torch.einsum("bi,bj->bij", x, x),
            functional.pad(x[:, None], (1, 1), mode="reflect"),
            torch.div(x, 3, rounding_mode="floor"),
        )
        odd = x.masked_fill(x > 0, float("-inf")), torch.full_like(x, float("nan")).nan_to_num(), x * (1 + 2j)
        types = x.to(torch.float16), x.to(torch.float8_e4m3fn).float(), torch.arange(3, dtype=torch.int16, device="cpu")
        picked = x[:, [0, 2]], x[None, :, torch.tensor([1])], self.bag((x.abs() * 3).long() % 10)
        return (
            low,
            a,
            b,
            texts,
            odd,
            types,
            picked,
            self.fixed + self.constant + torch.tensor([1.0, 2, 3, 4]) + self.count,
        )


class Scores(OrderedDict):
    """Outputs with names, as transformers defines them."""


register_pytree_node(
    Scores, lambda s: (list(s.values()), list(s)), lambda values, names: Scores(zip(names, values, strict=True)),
    serialized_type_name="tests.Scores",
)  # fmt: skip


def test_outputs_of_a_type_with_names_become_a_dict(tmp_path):
    class Net(nn.Linear):
        def forward(self, x):
            return Scores(logits=super().forward(x), hidden=(x * 2, x * 3))

    net, x = Net(2, 2), torch.ones(2, 2)
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "m.pt2")
    got = load_exported(tmp_path / "m.pt2").module()(x)
    assert type(got) is dict
    assert [type(value) for value in got.values()] == [torch.Tensor, tuple]
    program = load_source(tmp_path / "m.pt2").program(ProgramOptions())
    traced = load_source(net).program(ProgramOptions(inputs={"x": x.numpy()}))
    assert program.output_names == traced.output_names
    assert program.output_names == ("logits", "hidden", "hidden_1")


class Bitwise(nn.Module):
    """Masks that are put together, as in transformers."""

    def forward(self, x):
        low, high = x > -1, x < 1
        mask = (low & high) | (low ^ high)
        mask &= low
        mask |= high
        mask ^= low
        shifted = ((x * 8).to(torch.int32) << 2) >> 1
        shifted <<= 2
        shifted >>= 1
        return x * mask + shifted


@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it exports
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("make", [ControlFlow, Symbols, Values, Bitwise])
def test_no_legal_graph_is_refused(tmp_path, make, dynamic):
    torch.manual_seed(0)
    x = torch.randn(4, 4)
    shapes = ({0: torch.export.Dim.AUTO},) if dynamic else None
    exported = torch.export.export(make().eval(), (x,), dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "m.pt2")
    again = load_exported(tmp_path / "m.pt2").module()
    torch.testing.assert_close(again(x), exported.module()(x), rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it exports
def test_decomposed_program_keeps_its_kinds(tmp_path, pt2):
    decomposed = load_exported(pt2.save(tmp_path)).run_decompositions()
    torch.export.save(decomposed, tmp_path / "core.pt2")
    kinds = {t.name: t.kind for t in load_source(tmp_path / "core.pt2").tensors()}
    assert [kinds[f"{n}.weight"] for n in ("conv", "dw", "fc", "bn")] == ["conv", "depthwise", "linear", "other"]


def test_program_that_this_torch_cannot_read(tmp_path, pt2):
    def newer(program):
        program["schema_version"]["major"] = 99
        program["torch_version"] = "9.9.0"

    with pytest.raises(
        SourceError,
        match=r"was exported by torch 9\.9\.0 and cannot be loaded by torch 2\..*Export it again with this torch, or "
        r"pass its architecture with --arch\.$",
    ):
        load_source(pt2.with_json(newer).save(tmp_path)).program(OPTIONS)


def test_load_exported_wants_one(tmp_path):
    (tmp_path / "program.pt2").write_text("hello")
    with pytest.raises(SourceError, match=r"program\.pt2 must be an exported program, but it is a text file\.$"):
        load_exported(tmp_path / "program.pt2")


def test_module_without_tensors():
    with pytest.raises(
        SourceError, match=r"^no tensor found in ReLU: a module with parameters or buffers is needed\.$"
    ):
        load_source(nn.ReLU())


@pytest.mark.parametrize(
    "text",
    ["s0", "s0 + 2*u1", "Max(1, s77)", "Symbol('s58', positive=True, integer=True)", "Integer(-3)", "s0**2",
     "Mod(Add(Symbol('s0', integer=True), Integer(3)), Integer(2))", "Float('0.5', precision=53)", "Eq(s0, 3)",
     "Pow(Symbol('s0', integer=True), Integer(-1))",
     "FloatPow(ToFloat(Symbol('s77', positive=True, integer=True)), Float('0.5', precision=53))",
     "((s0 - 1)//2) + 1", "true", "-int_oo", "s0 < 3"],
)  # fmt: skip
def test_sizes_that_torch_writes(text):
    assert is_symbolic_expression(text)


HOSTILE = """
__import__('os')|S('1')|().__class__|eval('1')|exec|s0.x|s0[0]|lambda: 0|[1 for s in x]|'s0'|sympify('1')|Symbol(s0)
Symbol('__import__(1)')|Integer('os.system')|2**9999|9**9**9|Pow(9, 99)|f'{s0}'|s0 if s0 else 1|(s0 := 1)|Max(*s0)
Max(**s0)|Symbol('s', key=lambda: 0)|1 +|s0;s1|Float('1', precision=10**9)|print|99999999999999999999999999|os
Pow(2, Float('99'))|Pow(2, Float('inf'))|Pow(2, Float('1e9', precision=5))
"""


@pytest.mark.parametrize("text", [*HOSTILE.strip().replace("\n", "|").split("|"), "", "1" + "+1" * 3000])
def test_sizes_that_it_does_not_write(text):
    assert not is_symbolic_expression(text)


@pytest.mark.parametrize("target", ["torch.ops.aten.linear.default", "_operator.mul", "torch.sym_max", "math.trunc",
                                    "torch.ops.higher_order.cond", "torch.ops.torchvision.nms.default"])  # fmt: skip
def test_targets_that_torch_writes(target):
    assert is_safe_target(target)
