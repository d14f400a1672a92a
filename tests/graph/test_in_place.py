"""In-place operators become functional ones, and the result stays that of the module, whatever memory is shared."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qcompress.graph.in_place import out_of_place
from qcompress.graph.marks import MarkedRunner, mark
from qcompress.graph.program import FloatProgram
from qcompress.graph.sites import OUTPUT
from tests.helpers.nets import image, randomized, traced


class Net(nn.Module):
    """Two convolutions and BatchNorm around what a function does with a value."""

    def __init__(self, function: Callable[[Tensor, "Net"], object]) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.register_buffer("count", torch.ones(4, 1, 1))
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(self.norm(self.first(x)), self)


def writes(program: FloatProgram) -> list[str]:
    return [
        n.name for n in program.exported.graph.nodes if getattr(getattr(n.target, "_schema", None), "is_mutable", 0)
    ]


def names(program: FloatProgram) -> list[str]:
    return [n.name for n in program.exported.graph.nodes if n.op == "call_function"]


def column_then_add(y: Tensor, net: Net) -> object:
    y[:, 0].add_(1)
    return y


def add_then_read_old_view(y: Tensor, net: Net) -> object:
    view = y[:, :2]
    y.add_(1)
    return view * 2, y


def part_of_a_chunk(y: Tensor, net: Net) -> object:
    left, right = y.chunk(2, 1)
    left = functional.relu_(left)
    return left + right, y * 2


def through_dropout(y: Tensor, net: Net) -> object:
    z = functional.dropout(y, 0.5, training=False)  # outside of training, it returns its very input
    z = z.mul_(2)
    return z + y


def of_flattened(y: Tensor, net: Net) -> object:
    flat = y.flatten(1)
    return flat.clamp_(-0.5, 0.5), y + 1


def assigned(y: Tensor, net: Net) -> object:
    y[:, 1] = 0
    y[..., 0] *= 3
    return net.second(y)


def unused(y: Tensor, net: Net) -> object:
    functional.relu(net.second(y), inplace=True).flip(1)
    return y.tanh()


def wider_type(y: Tensor, net: Net) -> object:
    count = (y > 0).sum((1, 2, 3)).to(torch.int32)
    return y * count.add_(torch.ones((), dtype=torch.int64))[:, None, None, None]


def masked(y: Tensor, net: Net) -> object:
    return net.second(y.masked_fill_(y > 0.3, 0.1))


def transposed(y: Tensor, net: Net) -> object:
    return net.second(y.transpose_(2, 3)) + 1


SAFE: dict[str, Callable[[Tensor, Net], object]] = {
    "relu": lambda y, net: net.second(functional.relu_(y)).relu_(),
    "a chain": lambda y, net: functional.hardtanh_(functional.relu_(y).add_(1), 0, 1).mul_(2),
    "hardswish": lambda y, net: net.second(functional.hardswish(y, inplace=True)),
    "a sum": lambda y, net: net.second(y).add_(y).clamp_(min=0),
    "statements": lambda y, net: (y.add_(1), y.relu_(), net.second(y))[-1],
    "read before": lambda y, net: y.sum((1, 2, 3))[:, None, None, None] + functional.silu(y, inplace=True),
    "an old view": lambda y, net: y[:, :1].exp() + y.relu_(),
    "dropout": lambda y, net: net.second(functional.dropout(y, 0.5, training=False, inplace=True)),
    "unused": unused,
    "masked": masked,
}
SHARED: dict[str, Callable[[Tensor, Net], object]] = {
    "a view is written": column_then_add,
    "a view is read later": add_then_read_old_view,
    "a part is written": part_of_a_chunk,
    "dropout returns its input": through_dropout,
    "a flattened value is written": of_flattened,
    "assignments": assigned,
    "a wider type": wider_type,
    "no twin": transposed,
}


def check(net: nn.Module, program: FloatProgram) -> None:
    assert not writes(program)
    with torch.no_grad():
        wanted = net(torch.from_numpy(image(3, seed=2)))
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    values = [n.name for n in program.exported.graph.nodes if n.op == "call_function" and is_float(n)]
    marked = MarkedRunner(mark(program, [(name, OUTPUT) for name in values]))  # a mark copies the value
    for found in (program.run({"x": image(3, seed=2)}), marked({"x": image(3, seed=2)}, lambda i, value, first: value)):
        for value, result in zip(wanted, found.values(), strict=True):
            np.testing.assert_allclose(result, value.numpy(), atol=1e-5)


def is_float(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32 and value.ndim > 0


@pytest.mark.parametrize("name", SAFE)
def test_a_twin_takes_the_place_of_an_in_place_operator_under_its_name(name: str) -> None:
    net = randomized(Net(SAFE[name]))
    program = traced(net, x=image(2))
    check(net, program)
    found = names(program)
    assert "batch_norm" in found  # functionalization would have given it another name
    assert name == "unused" or any(value.rstrip("0123456789").endswith("_") for value in found)


@pytest.mark.parametrize("name", SHARED)
def test_shared_memory_is_left_to_torch(name: str) -> None:
    net = randomized(Net(SHARED[name]))
    check(net, traced(net, x=image(2)))


def test_an_activation_in_place_gives_the_same_graph_but_for_names() -> None:
    graphs = []
    for inplace in (False, True):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace), nn.Conv2d(4, 4, 1), nn.Hardswish(inplace)).eval()
        graphs.append([str(n.target) for n in traced(net, x=image(2)).exported.graph.nodes])
    assert graphs[0] == graphs[1]


def test_writes_to_inputs_and_buffers_are_dropped() -> None:
    """Each run starts from what is stored, and no caller's array changes."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("count", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            self.count[0] = 5
            return self.fc(x.relu_()) + self.count

    net = Writes().eval()
    x = image(2, shape=(4,))
    with torch.no_grad():
        wanted = net(torch.from_numpy(x.copy())).numpy()
        net.count.fill_(1)
    program = traced(net, x=x)
    assert not writes(program)
    for _ in range(2):
        given = x.copy()
        np.testing.assert_allclose(program.run({"x": given})["output"], wanted, atol=1e-6)
        np.testing.assert_array_equal(given, x)
    assert program.output_names == ("output",)
    assert any("changes its buffer count as it runs" in note for note in program.notes)


def test_a_graph_without_writes_is_returned_as_it_is() -> None:
    exported = torch.export.export(nn.Linear(4, 3).eval(), (torch.zeros(2, 4),))
    assert out_of_place(exported) is exported
