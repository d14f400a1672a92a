"""Lengths of token sequences: dynamic where the model allows it, checked, and told where they have limits."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from qcompress.graph.options import ProgramOptions
from qcompress.graph.program import FloatProgram
from qcompress.graph.tracing import from_exported, from_module
from tests.helpers.nets import image, traced
from tests.helpers.token_nets import (
    POSITIONS,
    Causal,
    Columns,
    Encoder,
    FixedLength,
    Tagger,
    Translator,
    example,
    tokens,
)


def assert_follows(program: FloatProgram, net: nn.Module, inputs: dict[str, Any]) -> None:
    got = program.run(inputs)
    with torch.no_grad():
        wanted = net(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    wanted = wanted if isinstance(wanted, dict) else {"output": wanted}
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "longest"), [(Encoder, POSITIONS), (Causal, POSITIONS), (Tagger, None), (Translator, None)]
)
def test_the_length_of_tokens_is_dynamic_and_has_one_name(make: type[nn.Module], longest: int | None) -> None:
    net = make().eval()
    program = traced(net, **example(net, 1, 9))
    lengths = {name: label for (name, axis), label in program.dynamic.items() if axis == 1}
    assert lengths.pop("decoder_ids", "decoder_ids_sequence") == "decoder_ids_sequence"
    assert lengths == dict.fromkeys(lengths, "sequence")
    for length, other in ((2, 7), (POSITIONS, 3)):
        assert_follows(program, net, example(net, 3, length, other))
    notes = [note for note in program.notes if note.startswith("Lengths")]
    named = ", ".join(lengths)
    assert notes == ([] if longest is None else [f"Lengths of {named} may be up to {longest}."])


@pytest.mark.parametrize("length", [2, 3, POSITIONS - 1, POSITIONS])
def test_an_example_of_any_length_finds_the_table_of_positions(length: int) -> None:
    program = traced(Causal().eval(), **example(Causal(), 2, length))
    assert program.notes == (f"Lengths of ids may be up to {POSITIONS}.",)


@pytest.mark.parametrize(("make", "length"), [(FixedLength, 16), (Columns, 6), (Tagger, 1)])
def test_a_length_that_must_stay_stays_and_is_named(make: type[nn.Module], length: int) -> None:
    net = make().eval()
    program = traced(net, ids=tokens(2, length))
    assert program.dynamic == {("ids", 0): "batch"}
    assert program.notes == (f"The length of ids ({length}) stays fixed: no other could be traced.",)
    assert_follows(program, net, {"ids": tokens(5, length)})


class Filters(nn.Module):
    """Convolutions over tokens, which need five of them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(30, 4)
        self.filters = nn.Conv1d(4, 6, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.filters(self.tokens(ids).transpose(1, 2)).amax(2)


def test_the_shortest_length_is_told_and_random_inputs_are_longer() -> None:
    program = traced(Filters().eval(), ids=tokens(2, 12))
    assert program.notes == ("Lengths of ids may be 5 or more.",)
    assert program.random_inputs(3)["ids"].shape == (3, 12)


class Forgets(nn.Module):
    """Its graph holds a number that the trace took from the example: it is wrong at other lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(30, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids).sum(1)
        return x if torch.compiler.is_exporting() else x + ids.shape[1]


def test_a_length_at_which_the_graph_is_not_the_model_stays_fixed() -> None:
    program = traced(Forgets().eval(), ids=tokens(2, 8))
    assert program.dynamic == {("ids", 0): "batch"}


class Captions(nn.Module):
    """Tokens beside an image that is as high as a sentence is long."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(30, 4)
        self.look = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self.look(x).mean((2, 3)) + (self.tokens(ids) * weight[..., None]).sum(1)


def test_floats_are_stretched_with_tokens_alone() -> None:
    given = {"x": image(2, shape=(3, 8, 8)), "ids": tokens(2, 8), "weight": np.ones((2, 8), np.float32)}
    program = traced(Captions().eval(), **given)
    assert {key for key in program.dynamic if key[1]} == {("ids", 1), ("weight", 1)}


def test_axes_that_the_user_named_are_the_only_ones_beside_the_batch() -> None:
    net, given = Tagger().eval(), {"ids": tokens(2, 8)}
    named = from_module(net, ProgramOptions(inputs=given, dynamic={("ids", 1): "words"}))
    assert named.dynamic == {("ids", 0): "batch", ("ids", 1): "words"}
    none = from_module(net, ProgramOptions(inputs=given, dynamic={}))
    assert none.dynamic == {("ids", 0): "batch"}
    assert none.notes == ()


def test_exported_programs_keep_their_lengths() -> None:
    net, auto = nn.Embedding(30, 4), torch.export.Dim.AUTO
    fixed = from_exported(torch.export.export(net, (torch.zeros(2, 8, dtype=torch.int64),)), ProgramOptions())
    assert fixed.dynamic == {("input", 0): "batch"}
    free = torch.export.export(net, (torch.zeros(2, 8, dtype=torch.int64),), dynamic_shapes=({0: auto, 1: auto},))
    assert from_exported(free, ProgramOptions()).dynamic == {("input", 0): "batch", ("input", 1): "sequence"}


class Counts(nn.Module):
    """It counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(30, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.tokens(ids)


def test_checks_leave_the_users_module_as_it_was() -> None:
    net = Counts().eval()
    traced(net, ids=tokens(2, 8))
    assert net.calls == 0
