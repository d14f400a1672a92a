"""Every encoding x width x granularity decodes in onnxruntime to exactly what the artifact says."""

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from qcompress.artifacts import PalettizedWeight
from qcompress.granularity import lut_groups
from qcompress_exporters.encodings import words
from qcompress_exporters.encodings.base import Encoding, GraphWriter
from qcompress_exporters.encodings.palette import ENCODINGS, choose, write_palette
from qcompress_exporters.names import ShortNames
from qcompress_exporters.sessions import optimized_ops, run, session
from qcompress_exporters.targets import Target, ir_version

WRITABLE = [(e, bits) for e in ENCODINGS for bits in range(1, 9) if e.opset(bits) is not None]
CASES = [pytest.param(e, bits, id=f"{e.name}-{bits}") for e, bits in WRITABLE]


def decoder(weight: PalettizedWeight, encoding: Encoding) -> onnx.ModelProto:
    """A model without inputs whose one output is the decoded weight."""
    writer = GraphWriter(ShortNames(["x", "y"]))
    write_palette(writer, weight, "weight", encoding)
    output = helper.make_tensor_value_info("weight", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph(writer.nodes, "g", [], [output], writer.initializers)
    opset = encoding.opset(weight.bits) or 0
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version(opset))


def decoded(weight: PalettizedWeight, encoding: Encoding) -> np.ndarray[Any, Any]:
    return run(session(decoder(weight, encoding).SerializeToString(), "exact"), {})["weight"]


@st.composite
def palettes(draw: st.DrawFn, bits: int) -> PalettizedWeight:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    random = np.random.default_rng(draw(st.integers(0, 999)))
    entries = draw(st.integers(1, 1 << bits))
    if draw(st.booleans()):
        vector_dim = draw(st.integers(2, 4))
        return PalettizedWeight(
            codes=random.integers(0, entries, -(-int(np.prod(shape)) // vector_dim)).astype(np.uint8),
            lut=random.standard_normal((1, entries, vector_dim)).astype(np.float32),
            bits=bits,
            weight_shape=shape,
        )
    axis = draw(st.integers(0, min(1, len(shape) - 1)))
    rows_per_lut = draw(st.none() | st.integers(1, 4))
    scale = random.standard_normal(shape[axis]).astype(np.float32) if draw(st.booleans()) else None
    return PalettizedWeight(
        codes=random.integers(0, entries, shape).astype(np.uint8),
        lut=random.standard_normal((lut_groups(shape[axis], rows_per_lut), entries)).astype(np.float32),
        bits=bits,
        axis=axis,
        rows_per_lut=rows_per_lut,
        scale=scale,
    )


@pytest.mark.parametrize(("encoding", "bits"), CASES)
@settings(max_examples=25)
@given(data=st.data())
def test_onnxruntime_decodes_the_artifact_bit_for_bit(encoding: Encoding, bits: int, data: st.DataObject) -> None:
    weight = data.draw(palettes(bits))
    got, wanted = decoded(weight, encoding), weight.dequantize()
    assert got.shape == wanted.shape
    assert got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("bits", [3, 5, 6])
@pytest.mark.parametrize("rows_per_lut", [None, 4, 5])
def test_large_tensors_have_a_second_plane(
    bits: int, rows_per_lut: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "SMALL", 0)
    random = np.random.default_rng(bits)
    weight = PalettizedWeight(
        codes=random.integers(0, 1 << bits, (16, 5, 3)).astype(np.uint8),
        lut=random.standard_normal((lut_groups(16, rows_per_lut), 1 << bits)).astype(np.float32),
        bits=bits,
        rows_per_lut=rows_per_lut,
    )
    assert decoded(weight, words.Words()).tobytes() == weight.dequantize().tobytes()
    assert optimized_ops(decoder(weight, words.Words()).SerializeToString()) == {}
    assert "MatMul" not in {node.op_type for node in decoder(weight, words.Words()).graph.node}


@pytest.mark.parametrize(("encoding", "bits"), CASES)
@pytest.mark.parametrize("rows_per_lut", [None, 4, 5])
def test_a_layer_folds_to_nothing_but_itself(encoding: Encoding, bits: int, rows_per_lut: int | None) -> None:
    random = np.random.default_rng(bits)
    groups = lut_groups(16, rows_per_lut)
    weight = PalettizedWeight(
        codes=random.integers(0, 1 << bits, (16, 24)).astype(np.uint8),
        lut=random.standard_normal((groups, 1 << bits)).astype(np.float32),
        bits=bits,
        rows_per_lut=rows_per_lut,
    )
    model = decoder(weight, encoding)
    model.graph.node.append(helper.make_node("Gemm", ["x", "weight"], ["y"], transB=1))
    model.graph.input.append(helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 24]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 16]))
    onnx.checker.check_model(model, full_check=True)
    assert optimized_ops(model.SerializeToString()) == {"Gemm": 1}


@pytest.mark.parametrize(("encoding", "bits"), CASES)
def test_codes_take_their_ideal_bytes(encoding: Encoding, bits: int) -> None:
    weight = PalettizedWeight(codes=np.zeros((64, 64), np.uint8), lut=np.zeros((1, 1 << bits), np.float32), bits=bits)
    model = decoder(weight, encoding)
    codes = sum(len(t.raw_data) for t in model.graph.initializer if len(t.raw_data) > 256)
    lut = 4 << bits
    assert codes == 64 * 64 * bits // 8 + (lut if lut > 256 else 0)
    assert len(model.SerializeToString()) - weight.nbytes < 900


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("target", ["onnxruntime==1.18", "onnxruntime==1.23", "onnxruntime==1.24"])
def test_every_width_can_be_written_for_every_target(bits: int, target: str) -> None:
    for opset in Target.parse(target).opsets:
        encoding = choose(bits, opset)
        assert (encoding.opset(bits) or 99) <= opset


def test_a_table_that_two_weights_need_is_written_once() -> None:
    writer = GraphWriter(ShortNames([]))
    weight = PalettizedWeight(codes=np.zeros((4, 8), np.uint8), lut=np.zeros((1, 8), np.float32), bits=3)
    for name in ("a", "b"):
        write_palette(writer, weight, name, choose(3, 21))
    assert sum(node.op_type == "Range" for node in writer.nodes) == 1
