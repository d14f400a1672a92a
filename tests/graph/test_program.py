"""Tracing, folding and layer kinds, on nets that have every kind of layer."""

import io
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from qcompress.errors import ConfigError, DataError, SourceError
from qcompress.graph.batchnorm import fold_batchnorm, unfolded_names, with_split_norms
from qcompress.graph.layers import weight_layers
from qcompress.graph.nodes import row_of
from qcompress.graph.options import ProgramOptions
from qcompress.graph.program import FloatProgram
from qcompress.graph.tracing import from_exported, from_module
from tests.helpers.nets import Residual, Tied, image, randomized, sentences, traced


def assert_same_function(left: FloatProgram, right: FloatProgram, inputs: Any, tolerance: float = 1e-5) -> None:
    a, b = left.run(inputs), right.run(inputs)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=tolerance * max(1.0, float(np.abs(a[name]).max())))


def saved(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    stream = io.BytesIO()
    torch.export.save(exported, stream)
    stream.seek(0)
    return torch.export.load(stream)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_batch_is_dynamic_whatever_the_example_has(batch: int) -> None:
    net = randomized(Residual())
    program = traced(net, x=image(batch))
    assert program.dynamic == {("x", 0): "batch"}
    assert program.fixed_batch is None
    for other in (1, 7):
        with torch.no_grad():
            wanted = net(torch.from_numpy(image(other))).numpy()
        np.testing.assert_allclose(program.run({"x": image(other)})["output"], wanted, atol=1e-6)


def test_inputs_and_outputs_of_dicts_keep_their_keys_and_integer_inputs_work() -> None:
    net = Tied().eval()
    program = traced(net, **sentences())
    assert program.input_names == ("ids", "mask")
    assert program.output_names == ("logits", "hidden")
    inputs = sentences(4, seed=1)
    with torch.no_grad():
        wanted = net({n: torch.from_numpy(v) for n, v in inputs.items()})
    np.testing.assert_allclose(program.run(inputs)["logits"], wanted["logits"].numpy(), atol=1e-5)


def test_tied_weights_enter_once_under_their_first_name() -> None:
    program = traced(Tied().eval(), **sentences())
    assert "embed.weight" in program.state()
    assert "head.weight" not in program.state()
    assert program.aliases() == {"embed.weight": ("head.weight",)}


def test_several_outputs_are_numbered() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
            return x + 1, (x * 2, x * 3)

    program = traced(Pair(), x=image(shape=(4,)))
    assert program.output_names == ("output", "output_1", "output_2")


def test_names_of_inputs_outputs_and_axes_can_be_given() -> None:
    options = ProgramOptions(
        inputs={"x": image()}, input_names=("pixels",), output_names=("scores",), dynamic={("x", 2): "height"}
    )
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(ConfigError, match=r"--dynamic: the model has no input 'x'; it has pixels\."):
        from_module(net, options)
    options = ProgramOptions(inputs={"x": image()}, output_names=("scores",), dynamic={("input", 2): "height"})
    program = from_module(net, options)
    assert program.output_names == ("scores",)
    assert program.dynamic == {("input", 0): "batch", ("input", 2): "height"}
    assert program.run({"x": image(shape=(3, 20, 9))})["scores"].shape == (3, 4)


def test_a_net_that_takes_one_batch_alone_is_fixed_and_says_so() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(1, 4) + 1

    program = traced(Fixed(), x=image(1, shape=(4,)))
    assert program.fixed_batch == 1
    assert any("exported with fixed inputs (x [1, 4])" in note for note in program.notes)


def test_a_net_of_batch_one_takes_its_example_from_data_of_two() -> None:
    """Data gives two samples, whatever the net takes; a batch of 1 was never tried."""

    class One(nn.Module):
        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return x.view(1, 4) * scale

    program = traced(One(), x=image(2, shape=(4,)), scale=np.ones(4, np.float32))
    assert program.fixed_batch == 1
    assert any("exported with fixed inputs (x [1, 4], scale [4])" in note for note in program.notes)
    assert program.run({"x": image(1, shape=(4,)), "scale": np.ones(4, np.float32)})["output"].shape == (1, 4)

    class Never(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(3, 7)

    with pytest.raises(SourceError, match=r"shape '\[3, 7\]' is invalid for input of size 8"):
        traced(Never(), x=image(2, shape=(4,)))


class Returns(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("grid", torch.zeros(4))
        self.what = what

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        more = {"none": None, "number": 3, "weight": self.fc.weight, "buffer": self.grid, "input": x}
        return {"y": self.fc(x), "more": more[self.what]}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("none", r"^The model's output more must be a tensor, got None: wrap the model in a module whose forward"),
        ("number", r"^The model's output more must be a tensor, got 3: "),
        (
            "weight",
            r"^The model's output more must be computed from its inputs, but it is the model's own tensor fc\.weight:",
        ),
        (
            "buffer",
            r"^The model's output more must be computed from its inputs, but it is the model's own tensor grid:",
        ),
    ],
)
def test_outputs_that_no_file_can_return_are_refused(what: str, message: str) -> None:
    example = image(2, shape=(4,))
    with pytest.raises(SourceError, match=message):
        traced(Returns(what).eval(), x=example)
    exported = torch.export.export(Returns(what).eval(), (torch.from_numpy(example),))
    with pytest.raises(SourceError, match=message):
        from_exported(exported, ProgramOptions())


def test_an_input_that_is_returned_is_an_output() -> None:
    assert traced(Returns("input").eval(), x=image(2, shape=(4,))).output_names == ("y", "more")


def test_an_exported_program_with_a_batch_of_one_becomes_dynamic() -> None:
    net = randomized(Residual())
    exported = saved(torch.export.export(net, (torch.from_numpy(image(1)),)))
    program = from_exported(exported, ProgramOptions())
    assert program.dynamic == {("x", 0): "batch"}
    assert_same_function(program, traced(net, x=image()), {"x": image(6)})


def test_training_mode_is_switched_off_told_and_given_back() -> None:
    net = randomized(Residual()).train()
    program = traced(net, x=image())
    assert program.notes == ("The model was in training mode; it is exported in eval mode.",)
    assert net.training
    assert net.stem_bn.training
    assert_same_function(program, traced(net.eval(), x=image()), {"x": image()})


def test_a_program_exported_in_training_mode_is_switched_too() -> None:
    net = randomized(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))
    exported = torch.export.export(net.train(), (torch.zeros(2, 4),))
    program = from_exported(exported, ProgramOptions())
    assert "The program was exported in training mode; it is used in eval mode." in program.notes
    np.testing.assert_array_equal(*(program.run({"x": image(3, shape=(4,))})["output"] for _ in range(2)))


def test_half_precision_models_are_computed_in_float32() -> None:
    net = nn.Linear(4, 3).half().eval()
    program = traced(net, x=image(shape=(4,)).astype(np.float16))
    assert program.notes == ("The model holds float16; it is exported in float32.",)
    assert program.state()["weight"].dtype == torch.float32
    assert net.weight.dtype == torch.float16


def test_a_model_that_cannot_be_traced_names_the_users_line() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 0:  # this very line
                return x
            return -x

    with pytest.raises(SourceError, match=r"test_program\.py:\d+ \(if x\.sum\(\) > 0:.*Change that line"):
        traced(Branch(), x=image(shape=(4,)))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"Tracing the model needs an example input: pass --input-shape"),
        ({"a": np.zeros((2, 4)), "b": np.zeros((2, 4))}, r"forward takes x, y; the example inputs are a, b: x is miss"),
    ],
)
def test_example_inputs_that_do_not_fit(inputs: dict[str, Any], message: str) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    with pytest.raises((ConfigError, DataError), match=message):
        from_module(Two(), ProgramOptions(inputs=inputs))


def test_inputs_without_names_are_bound_by_position() -> None:
    class Two(nn.Module):
        def forward(self, image: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
            return image - meta

    unnamed = {"x0": np.full((2, 4), 5, np.float32), "x1": np.full((2, 4), 2, np.float32)}
    program = from_module(Two(), ProgramOptions(inputs=unnamed))
    assert program.input_names == ("image", "meta")
    swapped = dict(reversed(unnamed.items()))  # names count, not the order of a dict
    for arrays in (unnamed, swapped, {"image": unnamed["x0"], "meta": unnamed["x1"]}):
        assert (program.run(arrays)["output"] == 3).all()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": image(shape=(3, 9, 8))}, r"Input x must have shape \[any, 3, 9, 9\], got \[3, 3, 9, 8\]\."),
        ({"x": image().astype(np.int64)}, r"Input x must be float32, got int64"),
        ({"pixels": image(), "more": image()}, r"inputs are x; the data has more, pixels: x is missing"),
    ],
)
def test_data_that_does_not_fit(arrays: dict[str, Any], message: str) -> None:
    program = traced(randomized(Residual()), x=image())
    with pytest.raises(DataError, match=message):
        program.run(arrays)


def test_layer_kinds_and_output_axes() -> None:
    found = {
        n: (layer.kind, layer.axis) for n, layer in weight_layers(traced(randomized(Residual()), x=image())).items()
    }
    assert found == {
        "stem.weight": ("conv", 0),
        "depthwise.weight": ("depthwise", 0),
        "grouped.weight": ("conv", 0),
        "up.weight": ("conv_transpose", 1),
        "head.weight": ("linear", 0),
    }
    kinds = {n: layer.kind for n, layer in weight_layers(traced(Tied().eval(), **sentences())).items()}
    assert kinds["embed.weight"] == "embedding"
    assert kinds["attend.in_proj_weight"] == kinds["attend.out_proj.weight"] == "linear"
    assert kinds["recur.weight_ih_l0"] == "recurrent"


def test_a_plain_matrix_product_counts_its_output_channels_along_its_second_axis() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 7))
            self.v = nn.Parameter(torch.randn(5, 7))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.w) @ self.v.T

    layers = weight_layers(traced(Product(), x=image(shape=(4,))))
    assert {n: layer.axis for n, layer in layers.items()} == {"w": 1, "v": 0}


def test_folding_keeps_the_function_and_leaves_no_batchnorm() -> None:
    program = traced(randomized(Residual()), x=image())
    folded = fold_batchnorm(program)
    assert not [n for n in folded.exported.graph.nodes if "batch_norm" in str(n.target)]
    assert not [n for n in folded.state() if "bn" in n]
    assert {"stem.bias", "depthwise.bias", "up.bias"} <= set(folded.state())
    assert_same_function(program, folded, {"x": image(5, seed=3)})
    assert "stem_bn.weight" in program.state()


def test_names_that_are_no_identifiers_are_folded_too() -> None:
    net = nn.Sequential()
    net.add_module("block1-0", nn.Conv2d(3, 4, 3, bias=False))
    net.add_module("2nd norm", nn.BatchNorm2d(4))
    x = np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)
    program = traced(randomized(net).eval(), input=x)
    folded = fold_batchnorm(program)
    assert [*folded.state()] == ["block1-0.weight", "block1-0.bias"]
    wanted, got = program.run({"input": x}), folded.run({"input": x})
    np.testing.assert_allclose(got["output"], wanted["output"], atol=1e-5)


def test_folded_weights_are_the_textbook_ones() -> None:
    net = randomized(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)))
    folded = fold_batchnorm(traced(net, x=image(shape=(2, 4, 4)))).state()
    conv, norm = net[0], net[1]
    factor = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    torch.testing.assert_close(folded["0.weight"], (conv.weight.double() * factor.view(-1, 1, 1, 1)).float())
    bias = norm.bias.double() + (conv.bias.double() - norm.running_mean.double()) * factor
    torch.testing.assert_close(folded["0.bias"], bias.float())


class SharedLayer(nn.Module):
    """One convolution in front of two BatchNorms: neither can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.a = nn.BatchNorm2d(3)
        self.b = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(self.conv(x)) + self.b(self.conv(x * 2))


class SharedNorm(nn.Module):
    """One BatchNorm behind two convolutions: each takes it up."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1, bias=False)
        self.b = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.a(x)) + self.norm(self.b(x))


class ReadTwice(nn.Module):
    """A convolution whose output is read before BatchNorm, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.norm(y) + y


@pytest.mark.parametrize(("net", "left"), [(SharedLayer(), 2), (ReadTwice(), 1), (SharedNorm(), 0)])
def test_batchnorm_that_cannot_be_folded_stays_and_is_told(net: nn.Module, left: int) -> None:
    program = traced(randomized(net), x=image())
    folded = fold_batchnorm(program)
    assert sum(row_of(n).normalizes for n in folded.exported.graph.nodes) == left
    stay = {
        0: [],
        1: ["batch_norm stays a BatchNormalization"],
        2: ["batch_norm, batch_norm_1 stay BatchNormalizations"],
    }
    why = ": the layer in front of it has other users, or cannot absorb it."
    assert [note for note in folded.notes if "BatchNorm" in note] == [start + why for start in stay[left]]
    assert_same_function(program, folded, {"x": image(4, seed=1)})


class Mixed(nn.Module):
    """A MixConv: parts of the channels go through convolutions of their own, and one BatchNorm follows them all."""

    def __init__(self, parts: list[nn.Module], *, width: int = 12, between: nn.Module | None = None) -> None:
        super().__init__()
        self.parts, self.between = nn.ModuleList(parts), between
        self.norm, self.head = nn.BatchNorm2d(width), nn.Conv2d(width, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pieces = [part(piece) for part, piece in zip(self.parts, x.chunk(len(self.parts), 1), strict=True)]
        joined = torch.cat(pieces, 1)
        y = self.norm(joined if self.between is None else self.between(joined)).relu()
        return self.head(y)


def depthwise(size: int) -> nn.Module:
    return nn.Conv2d(4, 4, size, padding=size // 2, groups=4, bias=False)


def chained(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.BatchNorm2d(4))


def twice(layer: nn.Module) -> list[nn.Module]:
    return [layer, depthwise(5), layer]


@pytest.mark.parametrize(
    ("parts", "options"),
    [
        ([depthwise(3), depthwise(5), depthwise(1)], {}),
        ([nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Conv2d(4, 2, 1, bias=False), depthwise(3)], {}),
        ([nn.ConvTranspose2d(4, 8, 3, padding=1, groups=2), nn.ConvTranspose2d(4, 2, 1), nn.Conv2d(4, 2, 1)], {}),
        ([chained(depthwise(3)), depthwise(5), chained(nn.Conv2d(4, 4, 1))], {}),
        ([depthwise(3), depthwise(5), depthwise(1)], {"between": nn.BatchNorm2d(12)}),
    ],
    ids=["depthwise", "groups and widths", "transposed", "norms of their own", "two norms"],
)
def test_layers_that_are_joined_absorb_their_channels_of_a_batchnorm(
    parts: list[nn.Module], options: dict[str, Any]
) -> None:
    program = traced(randomized(Mixed(parts, **options)), x=image(shape=(12, 8, 8)))
    folded = fold_batchnorm(program)
    assert not [n for n in folded.exported.graph.nodes if row_of(n).normalizes]
    assert not [name for name in folded.state() if "norm" in name]
    assert folded.notes == program.notes
    x = {"x": image(3, seed=1, shape=(12, 8, 8))}
    assert_same_function(program, folded, x, tolerance=2e-6)
    split = with_split_norms(program)
    assert_same_function(program, split, x, tolerance=0)
    names = unfolded_names(split, folded)
    joined = {n.name for n in folded.exported.graph.nodes if row_of(n).joins}
    values = {n.name for n in split.exported.graph.nodes}
    assert joined <= names.keys()
    assert {*names.values()} <= values
    layers = {layer.node.name for name, layer in weight_layers(folded).items() if name.startswith("parts")}
    assert layers <= names.keys()
    assert len(layers) == 3


def test_channels_are_folded_in_float64() -> None:
    net = randomized(Mixed([nn.Conv2d(4, 6, 1, groups=2), nn.Conv2d(4, 6, 1, bias=False)]))
    folded = fold_batchnorm(traced(net, x=image(shape=(8, 8, 8)))).state()
    norm = net.norm
    factor = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    for i, own in enumerate((slice(6), slice(6, 12))):
        conv = net.parts[i]
        bias = 0.0 if conv.bias is None else conv.bias.double()
        weight = conv.weight.double() * factor[own].view(-1, 1, 1, 1)
        assert torch.equal(folded[f"parts.{i}.weight"], weight.float())
        shift = norm.bias.double() - norm.running_mean.double() * factor
        assert torch.equal(folded[f"parts.{i}.bias"], (shift[own] + bias * factor[own]).float())


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (
            Mixed([depthwise(3), nn.AvgPool2d(3, 1, 1), depthwise(5)]),
            "has parts that are no convolutions or linear layers",
        ),
        (Mixed(twice(depthwise(3))), "has parts with other users, or that cannot absorb it"),
    ],
)
def test_batchnorm_behind_other_things_that_are_joined_stays_and_is_told(net: Mixed, why: str) -> None:
    width = 4 * len(net.parts)
    program = traced(randomized(net), x=image(shape=(width, 8, 8)))
    folded = fold_batchnorm(program)
    assert folded.notes == (f"batch_norm stays a BatchNormalization: the concatenation in front of it {why}.",)
    assert_same_function(program, folded, {"x": image(3, seed=1, shape=(width, 8, 8))})


def test_a_concatenation_that_is_read_twice_keeps_its_batchnorms_and_one_note_names_them() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            joined = torch.cat([self.a(x), self.b(x)], 1)
            return sum(norm(joined) for norm in self.norms)  # type: ignore[return-value]

    folded = fold_batchnorm(traced(randomized(Dense()), x=image()))
    assert folded.notes == (
        "batch_norm, batch_norm_1, batch_norm_2 and 2 others stay BatchNormalizations: the concatenation in front of "
        "it has other users.",
    )


def test_a_folded_program_survives_saving() -> None:
    folded = fold_batchnorm(traced(randomized(Residual()), x=image()))
    again = from_exported(saved(folded.exported), ProgramOptions())
    assert list(again.state()) == list(folded.state())
    assert_same_function(folded, again, {"x": image()}, tolerance=0)


def test_with_state_changes_values_and_nothing_else() -> None:
    program = traced(nn.Linear(4, 3).eval(), x=image(shape=(4,)))
    changed = program.with_state({"weight": np.zeros((3, 4), np.float32)})
    np.testing.assert_array_equal(
        changed.run({"x": image(2, shape=(4,))})["output"][0], program.state()["bias"].detach()
    )
    assert program.state()["weight"].abs().sum() > 0
    with pytest.raises(ConfigError, match=r"no tensor 'wieght'. Did you mean weight\?"):
        program.with_state({"wieght": np.zeros((3, 4), np.float32)})
    with pytest.raises(ConfigError, match=r"weight must have shape \[3, 4\], got \[4, 3\]\."):
        program.with_state({"weight": np.zeros((4, 3), np.float32)})


def test_a_dynamic_axis_goes_by_the_inputs_new_name() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    options = ProgramOptions(inputs={"x": image()}, input_names=("pixels",), dynamic={("pixels", 3): "wide"})
    assert from_module(net, options).dynamic == {("pixels", 0): "batch", ("pixels", 3): "wide"}


def test_an_axis_that_cannot_be_dynamic_is_told() -> None:
    options = ProgramOptions(inputs={"x": image(shape=(4,))}, dynamic={("input", 1): "features"})
    program = from_module(nn.Linear(4, 3).eval(), options)
    assert program.dynamic == {("input", 0): "batch"}
    assert "The model allows no other size of input:1: it stays fixed despite --dynamic." in program.notes


class ReadsItsWeight(nn.Module):
    """A weight that something else than its layer reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x)) + self.linear.weight.sum()


class Scaled(nn.Module):
    """A matrix product whose bias and product have factors; the matrix is a bare parameter."""

    def __init__(self, beta: float = 1.0, alpha: float = 1.0) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 3))
        self.b = nn.Parameter(torch.randn(3))
        self.norm = nn.BatchNorm1d(3)
        self.factors = {"beta": beta, "alpha": alpha} if beta != alpha else {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.addmm(self.b, x, self.a, **self.factors))


class Bare(nn.Module):
    """A bare parameter without a bias in front of two BatchNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 3))
        self.first = nn.BatchNorm1d(3)
        self.second = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x @ self.a))


@pytest.mark.parametrize(("net", "left"), [(ReadsItsWeight(), 1), (Scaled(0.5, 2.0), 1), (Scaled(), 0), (Bare(), 2)])
def test_folding_changes_no_function_whatever_stands_in_front(net: nn.Module, left: int) -> None:
    program = traced(randomized(net), x=image(shape=(4,)))
    folded = fold_batchnorm(program)
    assert sum("batch_norm" in str(n.target) for n in folded.exported.graph.nodes) == left
    assert_same_function(program, folded, {"x": image(5, seed=2, shape=(4,))})
    assert list(fold_batchnorm(folded).state()) == list(folded.state())


def test_batchnorm_without_statistics_in_an_exported_program() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    program = from_exported(torch.export.export(net, (torch.zeros(2, 4),)), ProgramOptions())
    with torch.no_grad():
        wanted = net(torch.from_numpy(image(6, shape=(4,)))).numpy()
    np.testing.assert_allclose(program.run({"x": image(6, shape=(4,))})["output"], wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_exported_programs_of_other_floats_are_refused(dtype: torch.dtype) -> None:
    exported = torch.export.export(nn.Linear(4, 3).to(dtype).eval(), (torch.zeros(2, 4, dtype=dtype),))
    with pytest.raises(SourceError, match=r"weight must be float32, got \w+: export the program of model\.float\(\)"):
        from_exported(exported, ProgramOptions())


def test_later_training_of_the_users_module_does_not_reach_the_program() -> None:
    net = nn.Linear(4, 3).eval()
    program = traced(net, x=image(shape=(4,)))
    before = program.run({"x": image(shape=(4,))})["output"]
    with torch.no_grad():
        net.weight.zero_()
    np.testing.assert_array_equal(program.run({"x": image(shape=(4,))})["output"], before)
    program.module().to(torch.float64)
    assert net.weight.dtype == torch.float32


def test_only_inputs_with_the_batch_in_front_are_dynamic() -> None:
    class Weighted(nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return x @ w

    program = traced(Weighted(), x=image(1, shape=(8,)), w=image(8, shape=(4,)))
    assert program.dynamic == {("x", 0): "batch"}
    assert program.fixed_batch is None


def test_names_that_clash() -> None:
    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.output

    assert traced(Output(), x=image(shape=(4,))).output_names == ("output_output",)

    class Input(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.x

    with pytest.raises(SourceError, match=r"^x names both an input and a tensor of the model: rename one"):
        traced(Input(), x=image(shape=(4,)))


def test_a_buffer_that_changes_as_the_model_runs_is_told() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("n", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.n += 1
            return x + self.n

    notes = traced(Counts().eval(), x=image(shape=(4,))).notes
    assert "The model changes its buffer n as it runs; the file keeps its present value." in notes


def test_an_output_cannot_take_the_name_of_an_input() -> None:
    options = ProgramOptions(inputs={"x": image(shape=(4,))}, output_names=("input",))
    with pytest.raises(ConfigError, match=r"^--output-names: input names an input or a tensor of the model already"):
        from_module(nn.Linear(4, 3).eval(), options)


class Outputs(OrderedDict[str, torch.Tensor]):
    """A dict of some library's own, which tells torch how to take it apart but not by what keys."""


def test_outputs_of_a_container_without_key_paths_go_by_its_keys():
    pytree.register_pytree_node(
        Outputs,
        lambda made: (list(made.values()), list(made)),
        lambda values, keys: Outputs(zip(keys, values, strict=True)),
        serialized_type_name="tests.Outputs",
    )

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> Outputs:
            return Outputs(hidden=x.relu(), pooled=x.mean(1))

    assert traced(Net().eval(), x=image(2, shape=(4,))).output_names == ("hidden", "pooled")


def test_a_program_shares_tensors_only_where_it_may():
    module = nn.Linear(4, 3).eval()
    inputs = {"input": image(2, shape=(4,))}
    own, shared = (from_module(module, ProgramOptions(inputs=inputs, shares=shares)) for shares in (False, True))
    with torch.no_grad():
        module.weight.zero_()
    assert own.state()["weight"].any()
    assert not shared.state()["weight"].any()


class Stream(nn.Module):
    """A recurrent net whose state is an input: [layers, batch, hidden]."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layer = nn.GRU(6, 5, layers, batch_first=True)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer(x, h)


@pytest.mark.parametrize(("layers", "batch"), [(1, 2), (2, 2), (3, 1), (1, 1), (2, 4)])
def test_a_state_is_stretched_along_its_own_batch_axis(layers: int, batch: int) -> None:
    net = Stream(layers).eval()
    inputs = {"x": np.zeros((batch, 4, 6), np.float32), "h": np.zeros((layers, batch, 5), np.float32)}
    program = from_module(net, ProgramOptions(inputs=inputs))
    assert program.dynamic == {("x", 0): "batch", ("h", 1): "batch"}
    given = program.random_inputs(5)
    assert given["h"].shape == (layers, 5, 5)
    wanted = net(*map(torch.from_numpy, given.values()))
    for name, value in zip(program.output_names, wanted, strict=True):
        np.testing.assert_allclose(program.run(given)[name], value.detach().numpy(), atol=1e-6)


@pytest.mark.parametrize(("wanted", "batch"), [("example", 3), (1, 1), (4, 4)])
def test_a_fixed_batch_is_the_examples_or_the_one_that_was_asked_for(wanted: Any, batch: int) -> None:
    net = Stream(2).eval()
    inputs = {"x": np.zeros((3, 4, 6), np.float32), "h": np.zeros((2, 3, 5), np.float32)}
    program = from_module(net, ProgramOptions(inputs=inputs, fixed_batch=wanted))
    assert (program.fixed_batch, program.dynamic) == (batch, {})
    assert program.notes == (f"Exported with a fixed batch: x [{batch}, 4, 6], h [2, {batch}, 5].",)
    again = from_exported(program.exported, ProgramOptions(fixed_batch="example"))
    assert again.fixed_batch == batch


class Cached(nn.Module):
    """It returns what no graph can hold, unless its configuration says otherwise, as generation models do."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)
        self.layer = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.layer(x)
        return (y, SimpleNamespace(past=y)) if self.config.use_cache else y


def test_caches_are_switched_off_for_the_trace_alone() -> None:
    net, options = Cached().eval(), ProgramOptions(inputs={"x": np.zeros((2, 6), np.float32)})
    program = from_module(net, options)
    assert [*program.run({"x": np.ones((3, 6), np.float32)})] == ["output"]
    assert "keeps no cache" in " ".join(program.notes)
    assert net.config.use_cache
    net.can_generate = lambda: False  # an encoder, whose configuration has the setting too
    assert from_module(net, options).notes == ()


class Attends(nn.Module):
    """Its attention cannot be traced, unless its configuration asks for plain operators."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self.layer = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y if self.config._attn_implementation == "eager" or y.sum() > 0 else -y


def test_attention_is_eager_where_nothing_else_can_be_traced() -> None:
    net = Attends().eval()
    program = from_module(net, ProgramOptions(inputs={"x": np.zeros((2, 6), np.float32)}))
    assert program.notes == (
        "The model is exported with eager attention, because it could not be traced with its own.",
    )
    assert net.config._attn_implementation == "sdpa"
    net.config = SimpleNamespace(_attn_implementation=None)
    with pytest.raises(SourceError, match=r"y\.sum\(\) > 0"):
        from_module(net, ProgramOptions(inputs={"x": np.zeros((2, 6), np.float32)}))
