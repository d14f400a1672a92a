"""The generated graph computes what a node-by-node interpreter computes, in every mode."""

import copy
import operator

import pytest
import torch
from torch import nn
from torch.fx import Interpreter
from torch.nn import functional

from qcompress.finetune.attach import prepare
from qcompress.graph.batchnorm import unfolded_names
from qcompress.graph.marks import mark, site_op
from qcompress.graph.nodes import row_of
from qcompress.graph.program import state_nodes
from qcompress.graph.sites import OUTPUT
from qcompress.plan.plan import Plan


class Net(nn.Module):
    """BatchNorm, two dropouts, a site that is used twice, a tensor that is moved, a constant."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False)
        self.drop, self.drop2d, self.fc = nn.Dropout(0.3), nn.Dropout2d(0.3), nn.Linear(8 * 36, 4)

    def forward(self, x):
        y = functional.relu(self.norm1(self.conv1(x)))
        y = y + self.norm2(self.conv2(self.drop2d(y))) * torch.tensor(0.5)
        return self.fc(self.drop(y.relu().flatten(1))), y.mean((2, 3))


class Reference(Interpreter):
    """Runs the marked program with the live tensors, one node after the other."""

    def __init__(self, tuned):
        super().__init__(marked(tuned).exported.graph_module)
        self.tuned, self.seen = tuned, set()

    def run_node(self, n):
        args, _ = self.fetch_args_kwargs_from_env(n)
        if n.target is site_op:
            value, index = args
            first = index not in self.seen
            self.seen.add(index)
            return self.tuned.activations[index](value) if first else value
        if row_of(n).normalizes and self.tuned.parts.batchnorm == "train":
            norm = self.tuned.model.norm1 if "norm1" in str(n.args[3]) else self.tuned.model.norm2
            return norm(args[0])
        if row_of(n).drops and self.tuned.training:
            drop = functional.dropout2d if "feature" in str(n.target) else functional.dropout
            return drop(args[0], args[1])
        return super().run_node(n)


def marked(tuned):
    parts = tuned.parts
    names = unfolded_names(parts.program, parts.folded)
    keys = [(names.get(s.name, s.name) if s.index == OUTPUT else s.name, s.index) for s in parts.sites]
    return mark(parts.program, keys)


def outputs(tuned, x):
    """Returns the outputs that the reference computes."""
    program, model = marked(tuned), tuned.model
    names = state_nodes(program.exported)
    values = []
    for node in program.exported.graph.find_nodes(op="placeholder"):
        name = names.get(node)
        if name is None:
            values.append(x)
        elif name in tuned.parts.program.exported.constants:
            values.append(tuned.parts.program.state()[name])
        else:
            values.append(operator.attrgetter(name)(model))
    return Reference(tuned).run(*values)


@pytest.fixture
def x():
    return torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batchnorm", ["train", "freeze"])
@pytest.mark.parametrize("training", [True, False])
def test_the_graph_computes_what_an_interpreter_computes(x, batchnorm, training):
    tuned = prepare(Net(), Plan.from_flags(bits=3, activation_bits=4), example_inputs=(x,), batchnorm=batchnorm)
    assert any(site.index == OUTPUT for site in tuned.parts.sites)
    tuned.train(training)
    again = copy.deepcopy(tuned)
    torch.manual_seed(5)
    wanted = outputs(again, x)
    torch.manual_seed(5)
    found = tuned(x)
    assert all(map(torch.equal, found, wanted))
    assert all(torch.equal(a, b) for a, b in zip(tuned.buffers(), again.buffers(), strict=True))
    if training:
        for outs in (found, wanted):
            sum(out.square().sum() for out in outs).backward()
        for mine, theirs in zip(tuned.parameters(), again.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_dropout_and_batchnorm_follow_the_mode(x):
    tuned = prepare(Net(), Plan.from_flags(bits=3, activation_bits=4), example_inputs=(x,))
    tuned.train()
    before = tuned.model.norm1.running_mean.clone()
    assert not torch.equal(tuned(x)[0], tuned(x)[0])
    assert not torch.equal(tuned.model.norm1.running_mean, before)
    tuned.eval()
    before = tuned.model.norm1.running_mean.clone()
    assert torch.equal(tuned(x)[0], tuned(x)[0])
    assert torch.equal(tuned.model.norm1.running_mean, before)


@pytest.mark.parametrize(("name", "found"), [("conv2.weight", "conv2.weight"), ("norm1.bias", "norm1.bias")])
def test_the_first_value_that_is_not_finite_is_named(x, name, found):
    tuned = prepare(Net(), Plan.from_flags(bits=3, activation_bits=4), example_inputs=(x,))
    assert tuned.first_not_finite(x) is None
    place = tuned._places[name]
    with torch.no_grad():
        place.weight()[0] = torch.nan
    assert tuned.first_not_finite(x) == found


def test_a_layer_that_overflows_is_named_by_its_weight(x):
    tuned = prepare(Net(), Plan.from_flags(bits=3), example_inputs=(x,))
    assert tuned.first_not_finite(3e38 * x.sign()) in ("conv1.weight", "batch_norm")


def test_copies_and_state_dicts_train_on_their_own(x):
    tuned = prepare(Net(), Plan.from_flags(bits=2, activation_bits=4), example_inputs=(x,)).train()
    tuned(x)[0].sum().backward()  # rows are kept for the next step
    other, third = copy.deepcopy(tuned), copy.deepcopy(tuned)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(x)[0].sum().backward()
    optimizer.step()
    third.load_state_dict(other.state_dict())
    for model in (tuned, other, third):
        model.eval()
    assert torch.equal(other(x)[0], third(x)[0])
    assert not torch.equal(other(x)[0], tuned(x)[0])
    assert other.model.conv1 is not tuned.model.conv1
    assert other.quantizers()["conv1.weight"] is other.model.conv1.parametrizations.weight[0]
