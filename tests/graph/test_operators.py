"""The table of operators: every row names an operator that torch has, once."""

import pytest
import torch
from torch._ops import OpOverload

from qcompress.graph.operators import _TABLE, OPERATORS, UNLISTED, functional_name, kind_of_conv
from qcompress.kinds import KINDS

IN_ATEN = [name for name in OPERATORS if name != "getitem"]


def overload(name: str) -> OpOverload:
    head, _, tail = name.partition(".")
    found = getattr(getattr(torch.ops.aten, head), tail)
    assert isinstance(found, OpOverload)
    return found


def test_no_operator_stands_twice() -> None:
    names = [name for names, _ in _TABLE for name in names.split()]
    assert len(names) == len(set(names)) == len(OPERATORS)


@pytest.mark.parametrize("name", IN_ATEN)
def test_rows_fit_the_schemas(name: str) -> None:
    schema, row = overload(name)._schema, OPERATORS[name]
    assert not schema.is_mutable
    if row.layer is not None:
        given = (*row.layer.weights, row.layer.data, row.layer.bias)
        assert {argument for argument in given if argument} <= {argument.name for argument in schema.arguments}
        assert row.layer.kind in KINDS
    if row.splits:
        assert "Tensor[]" in str(schema.returns[0].type).replace("List[Tensor]", "Tensor[]")
    if row.is_fresh:
        assert all(returned.alias_info is None for returned in schema.returns)


@pytest.mark.parametrize(
    "name", ["relu_.default", "add_.Tensor", "hardswish_.default", "copy_.default", "fill_.Tensor"]
)
def test_a_functional_twin_is_an_operator_of_torch(name: str) -> None:
    twin = functional_name(name)
    assert twin is not None
    assert overload(name)._schema.is_mutable
    assert not overload(twin)._schema.is_mutable


@pytest.mark.parametrize("name", ["relu.default", "_to_copy.default", "__and__.Tensor", "getitem", ""])
def test_other_names_have_no_twin(name: str) -> None:
    assert functional_name(name) is None


def test_an_unlisted_operator_has_no_property() -> None:
    assert UNLISTED.layer is None
    assert not any(getattr(UNLISTED, field) for field in UNLISTED.__slots__)


@pytest.mark.parametrize(
    ("shape", "groups", "transposed", "kind"),
    [
        ((8, 4, 3), 1, False, "conv"),
        ((8, 1, 3), 1, False, "conv"),
        ((8, 2, 3), 2, None, "conv"),
        ((8, 1, 3), 4, False, "depthwise"),
        ((4, 1, 3), 4, True, "conv_transpose"),
        ((8, 1, 3), "4", "yes", "conv"),
    ],
)
def test_sorts_of_convolutions(shape: tuple[int, ...], groups: object, transposed: object, kind: str) -> None:
    assert kind_of_conv(shape, groups, transposed) == kind
