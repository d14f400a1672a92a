"""Whole nets in integers: drawn ones by the hundred, and one with the parts of each known architecture."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qcompress.data.dataset import Dataset
from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress_program
from tests.helpers.agreement import FORMATS, Agreement
from tests.helpers.drawn_nets import draw_net
from tests.helpers.nets import traced
from tests.helpers.odd_nets import ODD, odd_inputs, odd_net

WIDTHS = ((8, 8), (4, 8), (4, 4), (2, 8), (7, 6), (8, 2))  # of weights, of activations
SCHEMES = ("uniform", "palette")
SEEDS = st.integers(0, 10**6)
# A code that falls on the other side of a tie runs through the rest of the net, more so the fewer codes there are.
DISTANCE = 0.75
# Nets of parts that others have too.
LIKE_OTHERS = (
    "dense", "pool and flatten", "mean keepdim", "channel shuffle", "pixel shuffle", "upsample", "chunks",
    "pre-activation", "moves", "two inputs", "dict outputs", "option A", "in place", "dropout", "mlp",
)  # fmt: skip

Inputs = Mapping[str, npt.NDArray[Any]]


def agreement(module: nn.Module, calibration: Inputs, inputs: Inputs, setting: int) -> Agreement:
    """A net compressed at widths and by a scheme that a number chooses."""
    bits, activation_bits = WIDTHS[setting % len(WIDTHS)]
    plan = Plan.from_flags(
        bits=bits, activation_bits=activation_bits, scheme=SCHEMES[setting // len(WIDTHS) % len(SCHEMES)]
    )
    program = traced(module, **{name: value[:2] for name, value in calibration.items()})
    return Agreement(compress_program(program, plan, calibration=Dataset(inputs=calibration, name="c.npz")), inputs)


def agrees(found: Agreement) -> bool:
    failures = found.exporter() + [text for form in FORMATS for text in found.failures(form)]
    assert failures == []
    assert found.distance("qdq") < DISTANCE
    return True


def drawn(seed: int, depth: int) -> Agreement:
    net, random = draw_net(seed, depth), np.random.default_rng(seed)
    calibration, inputs = ({"x": random.standard_normal((16, *net.shape)).astype(np.float32)} for _ in range(2))
    return agreement(net.module, calibration, inputs, seed)


@settings(max_examples=2)  # the slow test below draws many more, and deeper ones
@given(seed=SEEDS, depth=st.integers(0, 3))
def test_a_drawn_net_agrees(seed, depth):
    assert agrees(drawn(seed, depth))


@pytest.mark.slow
@settings(max_examples=200)
@given(seed=SEEDS, depth=st.integers(0, 8))
def test_two_hundred_drawn_nets_agree(seed, depth):
    assert agrees(drawn(seed, depth))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in LIKE_OTHERS else ()) for n in ODD])
def test_the_parts_of_known_architectures_agree(name):
    samples = 1 if name == "fixed batch" else 12
    found = agreement(odd_net(name), odd_inputs(name, 16), odd_inputs(name, samples, seed=1), list(ODD).index(name))
    assert agrees(found)
    in_float = {"u-net": {"up.weight"}}.get(name, set())  # a transposed convolution
    assert {weight for weight, layer in found.layers().items() if layer.compute == "float"} == in_float
