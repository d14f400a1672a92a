"""Rows, LUT groups and vectors: every view has an exact inverse."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompress.artifacts.granularity import (
    from_rows,
    from_vectors,
    group_of_row,
    lut_groups,
    output_axis,
    rows,
    vectors,
)
from qcompress.errors import ConfigError

SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=5)


@st.composite
def weight_and_axis(draw):
    shape = draw(SHAPES)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape), axis


@given(weight_and_axis())
def test_from_rows_inverts_rows(case):
    weight, axis = case
    rows_OR = rows(weight, axis)
    assert rows_OR.shape == (weight.shape[axis], weight.size // weight.shape[axis])
    np.testing.assert_array_equal(from_rows(rows_OR, weight.shape, axis), weight)


@given(weight_and_axis())
def test_a_row_holds_what_its_output_channel_holds(case):
    weight, axis = case
    for channel, row in enumerate(rows(weight, axis)):
        np.testing.assert_array_equal(row, np.take(weight, channel, axis).ravel())


@given(weight_and_axis(), st.integers(1, 7), st.booleans())
def test_from_vectors_inverts_vectors(case, d, along):
    weight, axis = case
    along_axis = axis if along else None
    vectors_VD = vectors(weight, d, along_axis)
    assert vectors_VD.shape == (-(-weight.size // d), d)
    np.testing.assert_array_equal(from_vectors(vectors_VD, weight.shape, along_axis), weight)


@given(weight_and_axis(), st.integers(1, 7))
def test_the_tail_is_padded_with_the_last_element(case, d):
    weight, _ = case
    padding = vectors(weight, d).ravel()[weight.size :]
    assert (padding == weight.ravel()[-1]).all()


@given(st.integers(1, 30), st.none() | st.integers(1, 40))
def test_groups_are_runs_of_rows_and_only_the_last_may_be_shorter(channels, rows_per_lut):
    group_O = group_of_row(channels, rows_per_lut)
    sizes = np.bincount(group_O)
    assert len(group_O) == channels
    assert len(sizes) == lut_groups(channels, rows_per_lut)
    assert (np.diff(group_O) >= 0).all()
    assert (sizes[:-1] == (rows_per_lut or channels)).all()
    assert 1 <= sizes[-1] <= (rows_per_lut or channels)


def test_a_scalar_is_one_row():
    scalar = np.array(3.0, np.float32)
    assert rows(scalar).shape == (1, 1)
    assert from_rows(rows(scalar), ()) == scalar


def test_a_weight_without_elements_is_a_view_of_nothing():
    empty = np.zeros((0, 3), np.float32)
    assert from_rows(rows(empty), empty.shape).shape == (0, 3)
    assert from_vectors(vectors(empty, 2), empty.shape).shape == (0, 3)
    assert lut_groups(0, 4) == 1


@pytest.mark.parametrize(
    ("kind", "axis"), [("conv", 0), ("depthwise", 0), ("conv_transpose", 1), ("linear", 0), ("embedding", 0)]
)
def test_output_channels_are_counted_by_axis_1_of_transposed_convolutions_only(kind, axis):
    assert output_axis(kind) == axis


@pytest.mark.parametrize("rows_per_lut", [0, -3])
def test_a_group_of_no_rows_is_refused(rows_per_lut):
    wanted = rf"^rows_per_lut must be at least 1, got {rows_per_lut}\.$"
    with pytest.raises(ConfigError, match=wanted):
        lut_groups(8, rows_per_lut)
    with pytest.raises(ConfigError, match=wanted):
        group_of_row(8, rows_per_lut)


def test_a_vector_of_no_elements_is_refused():
    with pytest.raises(ConfigError, match=r"^vector_dim must be at least 1, got 0\.$"):
        vectors(np.zeros(4), 0)


@given(weight_and_axis(), st.integers(1, 5), st.booleans())
def test_tensors_have_the_same_views(case, d, along):
    weight, axis = case
    tensor, along_axis = torch.from_numpy(weight), axis if along else None
    rows_OR, vectors_VD = rows(tensor, axis), vectors(tensor, d, along_axis)
    np.testing.assert_array_equal(rows_OR.numpy(), rows(weight, axis))
    np.testing.assert_array_equal(vectors_VD.numpy(), vectors(weight, d, along_axis))
    assert torch.equal(from_rows(rows_OR, weight.shape, axis), tensor)
    assert torch.equal(from_vectors(vectors_VD, weight.shape, along_axis), tensor)


def test_gradients_pass_through_views_of_tensors():
    weight = torch.arange(5.0, requires_grad=True)
    vectors(weight, 2)[:, 1].sum().backward()
    assert weight.grad.tolist() == [0, 1, 0, 1, 1]
