"""The zoo's runner on nets drawn here, without the packages that its nets come from."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the benchmarks importable, as they are when one of them runs."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def zoo() -> ModuleType:
    return importlib.import_module("_zoo")


class Steps(nn.Module):
    """A convolution over time with a state along another axis, whose output has both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv1d(4, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y = self.last(self.conv(x).relu().transpose(1, 2) + state[0][:, None])
        return y, state + y.mean((1, 2))[None, :, None]


class Images(nn.Module):
    """Two convolutions with a function between them that has no integer operator."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.norm(self.one(x)).relu())
        return out


class Doubtful(nn.Module):
    """A branch on a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_a_net_with_a_length_and_a_state_goes_through() -> None:
    nets = importlib.import_module("zoo_nets.net")
    net = nets.Net(
        "steps",
        "drawn",
        lambda: nets.example(Steps(), x=torch.randn(6, 4, 10), state=torch.randn(1, 6, 8)),
        lengths=(7, 16),
        length_axes={"x": 2},
        batch_axes={"state": 1},
    )
    record = zoo().measured(net, "W4")
    assert (record.outcome, record.detail) == ("ok", "")
    assert (record.batches, record.lengths) == ((1, 2, 3), "any")
    assert record.difference < 1e-5
    assert record.ideal < record.nbytes
    assert 0 < record.left_float < 1
    assert record.largest_float.startswith(("conv.bias [8]", "last.bias [4]"))
    assert record.seconds > 0


def test_a_convolutional_net_computes_in_integers_and_stands_on_the_page() -> None:
    nets = importlib.import_module("zoo_nets.net")
    net = nets.Net("images", "drawn", lambda: nets.example(Images(), x=nets.images(12)), convolutional=True)
    records = [zoo().measured(net, mode) for mode in ("W4", "W8A8")]
    assert [r.outcome for r in records] == ["ok", "ok"], records
    assert records[1].int8 >= 2
    assert records[1].float_between == 0
    assert records[1].sqnr > 20
    page = importlib.import_module("_zoo_docs").page(records, {"images": net})
    assert "**1 of 1 nets go through.**" in page
    assert "| images | drawn | 0.00 M |" in page


def test_what_cannot_be_traced_is_an_outcome_with_a_reason() -> None:
    nets = importlib.import_module("zoo_nets.net")
    net = nets.Net("doubtful", "drawn", lambda: nets.Example(Doubtful(), {"x": torch.randn(6, 3)}))
    record = zoo().measured(net, "W4")
    assert record.outcome == "data-dependent"
    assert record.detail.startswith("torch.export cannot trace the model")
    page = importlib.import_module("_zoo_docs").page([record], {"doubtful": net})
    assert "- doubtful, W4: *data-dependent*. torch.export cannot trace" in page


def test_layers_without_norms_are_standardized() -> None:
    nets = importlib.import_module("zoo_nets.net")
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3)
    example = nets.example_without_norms(nn.Sequential(layer), input=nets.images(16))
    with torch.no_grad():
        output = example.module(**example.inputs)
    np.testing.assert_allclose(output.mean((0, 2, 3)), 1, atol=1e-3)
    np.testing.assert_allclose(output.std((0, 2, 3)), 1, atol=1e-2)


def test_float_operators_between_integer_ones_are_counted() -> None:
    def node(op: str, takes: str, gives: str) -> onnx.NodeProto:
        return helper.make_node(op, [takes], [gives])

    graph = helper.make_graph(
        [
            node("Relu", "x", "before"),
            node("QuantizeLinear", "before", "q"),
            node("QLinearConv", "q", "c"),
            node("MaxPool", "c", "pooled"),  # takes and gives codes
            node("DequantizeLinear", "pooled", "f"),
            node("Sigmoid", "f", "s"),  # the one in between
            node("QuantizeLinear", "s", "t"),
            node("QLinearConv", "t", "d"),
            node("DequantizeLinear", "d", "e"),
            node("Softmax", "e", "y"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    assert zoo().operators(graph) == (2, 1)
