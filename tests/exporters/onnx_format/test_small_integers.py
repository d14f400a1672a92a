"""Integers as varints: the same values in fewer bytes."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from qcompress_exporters.onnx_format.small_integers import shorten_integers


def model_of(values: np.ndarray) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph([], "g", [], [], [numpy_helper.from_array(values, "v")]))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@given(data=st.data())
def test_values_stay_and_files_never_grow(dtype: type[np.signedinteger], data: st.DataObject) -> None:
    info = np.iinfo(dtype)
    one = st.integers(int(info.min), int(info.max)) | st.integers(-1, 300)
    values = np.array(data.draw(st.lists(one, max_size=9)), dtype)
    model = model_of(values)
    before = model.ByteSize()
    shorten_integers(model)
    assert model.ByteSize() <= before
    again = numpy_helper.to_array(model.graph.initializer[0])
    assert again.dtype == values.dtype
    np.testing.assert_array_equal(again, values)


def test_what_would_grow_and_other_types_stay_as_they_are() -> None:
    for values in (np.array([-1]), np.zeros(3, np.uint8), np.ones(2, np.float32)):
        model = model_of(values)
        before = model.SerializeToString()
        shorten_integers(model)
        assert model.SerializeToString() == before
