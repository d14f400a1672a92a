"""What is computed from a model's own tensors alone becomes a tensor, under the name of the largest one behind it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

from qcompress.graph.layers import weight_layers
from qcompress.graph.options import ProgramOptions
from qcompress.graph.program import FloatProgram
from qcompress.graph.tracing import from_exported, from_module

ROWS, IMAGES = (3, 16), (3, 4, 5, 5)
HELD = "parametrizations.weight.original"


class Net(nn.Module):
    """A function of the input and of some tensors: shapes of parameters, or buffers."""

    def __init__(self, function: Callable[["Net", Tensor], Tensor], **tensors: tuple[int, ...] | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor):
                self.register_buffer(name, tensor)
            else:
                setattr(self, name, nn.Parameter(torch.randn(tensor)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def linear(how: Callable[[Net], Tensor], **tensors: tuple[int, ...] | Tensor) -> nn.Module:
    """A linear layer whose weight is computed."""
    return Net(lambda m, x: functional.linear(x, how(m)), **tensors)


def standardised(m: Net, x: Tensor) -> Tensor:
    w = m.w
    return functional.conv2d(x, (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5))


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(16, 8), "weight", 0.5)


def traced(net: nn.Module, shape: tuple[int, ...], **options: bool) -> tuple[FloatProgram, dict[str, np.ndarray]]:
    x = torch.randn(shape)
    return from_module(net.eval(), ProgramOptions(inputs={"x": x.numpy()}, **options)), {"x": x.numpy()}


COMPUTED = {
    "a mask": (pruned, ROWS, "weight_orig", 0),
    "scaled": (lambda: linear(lambda m: m.w / 8, w=(8, 16)), ROWS, "w", 0),
    "normalized": (lambda: linear(lambda m: functional.normalize(m.w), w=(8, 16)), ROWS, "w", 0),
    "joined": (lambda: linear(lambda m: torch.cat([m.a, m.b]), a=(8, 16), b=(4, 16)), ROWS, "a", 0),
    "an update": (lambda: linear(lambda m: m.w + m.b @ m.a, a=(2, 16), b=(8, 2), w=(8, 16)), ROWS, "w", 0),
    "gathered": (lambda: linear(lambda m: m.w[[0, 2]], w=(8, 16)), ROWS, "w", 0),
    "of 8-bit codes": (
        lambda: linear(lambda m: m.q.float() * m.s, q=torch.ones(2, 16, dtype=torch.int8), s=(2, 16)),
        ROWS,
        "s",
        0,
    ),
    "transposed behind it": (lambda: Net(lambda m, x: x @ (m.w * 2).t(), w=(8, 16)), ROWS, "w", 0),
    "axes moved": (
        lambda: Net(lambda m, x: functional.conv2d(x, m.w.permute(3, 2, 0, 1)), w=(3, 3, 4, 8)), IMAGES, "w", 0,
    ),
    "standardised": (lambda: Net(standardised, w=(8, 4, 3, 3)), IMAGES, "w", 0),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(4, 8, 3)), IMAGES, f"{HELD}1", 0),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(16, 8)), ROWS, HELD, 0),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(16, 8)), ROWS, HELD, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTED)
def test_a_computed_weight_is_a_tensor_of_the_program(name: str) -> None:
    torch.manual_seed(0)
    make, shape, weight, axis = COMPUTED[name]
    net = make()
    program, inputs = traced(net, shape)
    layer = weight_layers(program)[weight]
    assert layer.axis == axis
    assert len([n for n in program.exported.graph.nodes if n.op == "call_function"]) <= 3
    left = {n for n in program.state() if n not in (weight, "bias")}
    assert not left, f"{left} should be gone"
    wanted = net(torch.from_numpy(inputs["x"])).detach().numpy()
    np.testing.assert_allclose(program.run(inputs)["output"], wanted, rtol=0, atol=1e-6)
    again = from_exported(program.exported, ProgramOptions(inputs=inputs))
    assert {n: t.tolist() for n, t in again.state().items()} == {n: t.tolist() for n, t in program.state().items()}
    uncomputed, _ = traced(net, shape, computes=False)
    assert weight not in weight_layers(uncomputed) or name == "an update"
    np.testing.assert_allclose(uncomputed.run(inputs)["output"], wanted, rtol=0, atol=1e-6)


def test_zeros_behind_a_mask_are_zeros() -> None:
    program, _ = traced(pruned(), ROWS)
    assert int((program.state()["weight_orig"] == 0).sum()) == 64


def test_a_mask_is_no_tensor_of_the_program() -> None:
    net = nn.Sequential(pruned(), nn.ReLU(), nn.Linear(8, 2))
    assert [*traced(net, ROWS)[0].state()] == ["0.bias", "0.weight_orig", "2.weight", "2.bias"]


STAYS = {
    "used elsewhere": lambda: Net(lambda m, x: functional.linear(x, m.w * 2) @ m.w, w=(8, 16)),
    "computed in two ways": lambda: Net(lambda m, x: functional.linear(x, m.w * 2) + x @ m.w.exp().t(), w=(8, 16)),
    "larger": lambda: Net(lambda m, x: functional.linear(x, m.w.repeat(4, 1)), w=(8, 16)),
    "of integers alone": lambda: linear(lambda m: m.q * 2.0, q=torch.ones(8, 16, dtype=torch.int64)),
    "of the input's size": lambda: Net(lambda m, x: (m.w * 2).expand(x.shape[0], 16) * x, w=(1, 16)),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_an_operator(name: str) -> None:
    torch.manual_seed(0)
    net = STAYS[name]()
    program, inputs = traced(net, ROWS)
    state = {n: t.detach() for n, t in [*net.named_parameters(), *net.named_buffers()]}
    stays = name != "of the input's size"  # there the part that has a size of its own is computed
    assert all(torch.equal(t, state[n]) == stays for n, t in program.state().items())
    wanted = net(torch.from_numpy(inputs["x"])).detach().numpy()
    np.testing.assert_allclose(program.run(inputs)["output"], wanted, rtol=1e-6, atol=1e-6)


def test_a_value_that_is_returned_stays_an_operator() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 16))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return functional.linear(x, self.w * 2), self.w * 3

    net = Two()
    program, inputs = traced(net, ROWS)
    assert torch.equal(program.state()["w"], net.w.detach())
    assert program.run(inputs)["output_1"].shape == (8, 16)


def test_what_is_computed_twice_is_computed_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            w = self.w * 2
            q, k = w.chunk(2)
            return functional.linear(functional.linear(x, w), q) + x @ k.t() + (x @ w.permute(1, 0))[:, :8]

    net = Shared()
    program, inputs = traced(net, ROWS)
    assert torch.equal(program.state()["w"], 2 * net.w.detach())
    wanted = net(torch.from_numpy(inputs["x"])).detach().numpy()
    np.testing.assert_allclose(program.run(inputs)["output"], wanted, rtol=1e-5, atol=1e-5)
