"""Recurrent layers as products: what they take, step by step, and what solving their weights gains."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompress.data.dataset import Dataset
from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.settings import PosthocSettings
from qcompress.posthoc.walk import Reached, walk
from tests.helpers.nets import traced

CELLS: dict[type[nn.RNNBase], Callable[..., Any]] = {nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell, nn.RNN: nn.RNNCell}


class Net(nn.Module):
    """A recurrent layer, and a linear one behind its last step."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.r = kind(6, 20, **options)
        self.last = nn.Linear((self.r.proj_size or 20) * (1 + self.r.bidirectional), 3)

    def forward(self, x: Tensor) -> Tensor:
        states = self.r(x)[0]
        return self.last(states[:, -1] if self.r.batch_first else states[-1])


def sequences(samples: int, *, seed: int, batch_first: bool = True) -> np.ndarray[Any, Any]:
    """Values that hang together, along the steps and among the features."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, 9, 6))
    for step in range(1, 9):
        x[:, step] = 0.8 * x[:, step - 1] + 0.6 * x[:, step]
    mixed = x @ np.random.default_rng(0).standard_normal((6, 6)) + 0.5
    return (mixed if batch_first else mixed.swapaxes(0, 1)).astype(np.float32)


def unrolled(layer: nn.RNNBase, x: Tensor) -> dict[str, Tensor]:
    """What each weight is multiplied with, [steps, batch, width]: one cell, step after step."""
    found = {}
    x = x.transpose(0, 1) if layer.batch_first else x
    for number in range(layer.num_layers):
        outputs = []
        for suffix in ("", "_reverse")[: 1 + layer.bidirectional]:
            cell = CELLS[type(layer)](x.shape[-1], layer.hidden_size, bias=layer.bias)
            own = {n: getattr(layer, f"{n}_l{number}{suffix}") for n, _ in cell.named_parameters()}
            state: Any = torch.zeros(x.shape[1], layer.hidden_size)
            state = (state, state) if isinstance(layer, nn.LSTM) else state
            before, after = [], []
            for step in reversed(x) if suffix else x:
                before.append(state[0] if isinstance(state, tuple) else state)
                state = torch.func.functional_call(cell, own, (step, state))
                after.append(state[0] if isinstance(state, tuple) else state)
            if suffix:
                before, after = before[::-1], after[::-1]
            found[f"r.weight_ih_l{number}{suffix}"] = x
            found[f"r.weight_hh_l{number}{suffix}"] = torch.stack(before)
            outputs.append(torch.stack(after))
        x = torch.cat(outputs, -1)
    return found


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
        (nn.GRU, {"num_layers": 2, "bias": False}),
        (nn.RNN, {"bidirectional": True, "batch_first": True}),
    ],
    ids=["lstm", "gru", "rnn"],
)
def test_products_take_the_sequence_and_the_states_before_each_step(
    kind: type[nn.RNNBase], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    net = Net(kind, **options).eval()
    x = sequences(4, seed=1, batch_first=net.r.batch_first)
    reached: dict[str, Reached] = {}

    def settle(found: Reached) -> dict[str, Tensor]:
        reached[found.layer.weight] = found
        return {}

    walk(traced(net, x=x), [{"x": x}], settle)
    wanted = unrolled(net.r, torch.tensor(x))
    assert list(reached) == [*wanted, "last.weight"]
    for name, values in wanted.items():
        torch.testing.assert_close(reached[name].inputs[0], values)
        torch.testing.assert_close(reached[name].float_inputs[0], values)
        bias = getattr(net.r, name.removeprefix("r.").replace("weight", "bias")) if net.r.bias else None
        assert reached[name].bias == (name.replace("weight", "bias") if net.r.bias else None)
        product = nn.functional.linear(values, getattr(net.r, name.removeprefix("r.")), bias)
        torch.testing.assert_close(reached[name].outputs[0], product)
        torch.testing.assert_close(reached[name].run(reached[name].weight)[0], product)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(nn.LSTM, {"num_layers": 2}), (nn.LSTM, {"proj_size": 12, "bidirectional": True}), (nn.GRU, {}), (nn.RNN, {})],
    ids=["lstm", "projected", "gru", "rnn"],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_solved_weights_give_outputs_nearer_to_the_float_model(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = Net(kind, batch_first=True, **options).eval()
    program, test = traced(net, x=sequences(2, seed=1)), sequences(128, seed=2)
    wanted = net(torch.tensor(test)).detach().numpy()
    data = Dataset(inputs={"x": sequences(256, seed=3)}, labels=None, name="x")

    def noise(settings: PosthocSettings, calibration: Dataset | None) -> float:
        small = compress_program(program, Plan.from_flags(bits=3), settings, calibration=calibration)
        state = {name: artifact.dequantize() for name, artifact in small.artifacts.items()}
        (got,) = small.program.with_state(state).runner("cpu")({"x": test}).values()
        return float(np.square(got - wanted).mean())

    assert noise(PosthocSettings(effort="balanced"), data) < 0.5 * noise(PosthocSettings(effort="fast"), None)
