"""Every encoding x width x granularity decodes in onnxruntime to exactly what the artifact says."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from qcompress.artifacts import ActivationGrid, Artifact, FloatWeight, IntegerWeight, PalettizedWeight
from qcompress.artifacts.granularity import lut_groups
from qcompress.artifacts.integer_range import IntegerRange
from qcompress.errors import ConfigError
from qcompress.palettes.vector import palettize_vectors
from qcompress_exporters.onnx_format.encodings.base import Encoding
from qcompress_exporters.onnx_format.encodings.codes import ENCODINGS, choose
from qcompress_exporters.onnx_format.encodings.floats import Float
from qcompress_exporters.onnx_format.encodings.palette import write_palette
from qcompress_exporters.onnx_format.encodings.table import write_int8, write_weight
from qcompress_exporters.onnx_format.graph_writer import GraphWriter
from qcompress_exporters.onnx_format.opsets import ir_version
from qcompress_exporters.onnx_format.targets import find
from qcompress_exporters.parity.sessions import optimized_ops, ort, run, session
from tests.helpers.examples import examples

WRITABLE = [(e, bits) for e in ENCODINGS for bits in range(1, 9) if e.opset(bits) is not None]
CASES = [pytest.param(e, bits, id=f"{e.name}-{bits}") for e, bits in WRITABLE]
OPSETS = [18, 21, 25]  # the last brings every native type, the first none


def empty_graph(opset: int) -> ir.Graph:
    return ir.Graph([], [], nodes=[], opset_imports={"": opset}, name="g")


def model_of(write: Callable[[GraphWriter], ir.Value], opset: int, of_type: ir.DataType) -> onnx.ModelProto:
    """A model without inputs whose one output is the value `weight`, which `write` writes."""
    graph = empty_graph(opset)
    value = write(GraphWriter(graph, ["x", "y"]))
    value.name, value.type = "weight", ir.TensorType(of_type)
    graph.outputs.append(value)
    model: onnx.ModelProto = ir.to_proto(ir.Model(graph, ir_version=ir_version(opset)))
    return model


def decoder(weight: PalettizedWeight, encoding: Encoding) -> onnx.ModelProto:
    return model_of(
        lambda writer: write_palette(writer, weight, encoding), encoding.opset(weight.bits) or 0, ir.DataType.FLOAT
    )


def uniform_decoder(weight: IntegerWeight, opset: int) -> onnx.ModelProto:
    return model_of(lambda writer: write_weight(writer, weight, "weight", opset).value, opset, ir.DataType.FLOAT)


def int8_decoder(weight: Artifact, opset: int) -> onnx.ModelProto:
    return model_of(lambda writer: write_int8(writer, weight, "weight", opset).value, opset, ir.DataType.INT8)


def value_of(model: onnx.ModelProto) -> np.ndarray[Any, Any]:
    return run(session(model.SerializeToString(), "exact"), {})["weight"]


def unoptimized(model: onnx.ModelProto) -> np.ndarray[Any, Any]:
    """What the nodes as they stand compute, none folded."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    active = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return run(active, {})["weight"]


def decoded(weight: PalettizedWeight, encoding: Encoding) -> np.ndarray[Any, Any]:
    return value_of(decoder(weight, encoding))


@st.composite
def palettes(
    draw: st.DrawFn, bits: int, lut_dtypes: tuple[str, ...] = ("float32", "float16", "int8")
) -> PalettizedWeight:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    random = np.random.default_rng(draw(st.integers(0, 999)))
    entries = draw(st.integers(1, 1 << bits))
    axis = draw(st.integers(0, min(1, len(shape) - 1)))
    vector_dim = draw(st.none() | st.integers(2, 4))
    rows_per_lut = None if vector_dim else draw(st.none() | st.integers(1, 4))
    lut_shape = (lut_groups(shape[axis], rows_per_lut), entries, *([vector_dim] if vector_dim else []))
    lut_dtype = draw(st.sampled_from(lut_dtypes))
    if lut_dtype == "int8":
        lut = random.integers(-128, 128, lut_shape).astype(np.int8)
        scale_shape = draw(st.sampled_from([(), (shape[axis],)]))
    else:
        lut = random.standard_normal(lut_shape).astype(lut_dtype)
        scale_shape = draw(st.sampled_from([None, (), (shape[axis],)]))
    count = -(-int(np.prod(shape)) // vector_dim) if vector_dim else shape
    return PalettizedWeight(
        codes=random.integers(0, entries, count).astype(np.uint8),
        lut=lut,
        bits=bits,
        axis=axis,
        rows_per_lut=rows_per_lut,
        scale=None if scale_shape is None else np.asarray(random.standard_normal(scale_shape), np.float32),
        weight_shape=shape if vector_dim else None,
    )


@st.composite
def grids(draw: st.DrawFn, bits: int) -> IntegerWeight:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    random = np.random.default_rng(draw(st.integers(0, 999)))
    limits = IntegerRange(bits, draw(st.booleans()))
    axis = draw(st.none() | st.integers(0, len(shape) - 1))
    block_size = None if axis is None else draw(st.none() | st.integers(1, 4))
    scale_shape: tuple[int, ...] = () if axis is None else (shape[axis],)
    if axis is not None and block_size is not None:
        scale_shape = (*shape[:axis], -(-shape[axis] // block_size), *shape[axis + 1 :])

    def codes(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        drawn = random.integers(limits.n, limits.p + 1, shape)
        return np.asarray(drawn, np.int8 if limits.signed else np.uint8)

    return IntegerWeight(
        codes=codes(shape),
        scale=np.asarray(random.standard_normal(scale_shape), np.float32),
        bits=bits,
        axis=axis,
        block_size=block_size,
        zero_point=codes(scale_shape) if draw(st.booleans()) else None,
    )


@pytest.mark.parametrize(("encoding", "bits"), CASES)
@examples(25)
@given(data=st.data())
def test_onnxruntime_decodes_the_artifact_bit_for_bit(encoding: Encoding, bits: int, data: st.DataObject) -> None:
    weight = data.draw(palettes(bits))
    got, wanted = decoded(weight, encoding), weight.dequantize()
    assert got.shape == wanted.shape
    assert got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize(("encoding", "bits"), CASES)
@pytest.mark.parametrize("vector_dim", [2, 4, 8])
def test_onnxruntime_decodes_vectors_that_k_means_found(encoding: Encoding, bits: int, vector_dim: int) -> None:
    values = np.random.default_rng(bits).standard_normal((13, 5, 3, 1)).astype(np.float32)  # no vector_dim divides it
    weight = palettize_vectors(values, bits, vector_dim)
    assert decoded(weight, encoding).tobytes() == weight.dequantize().tobytes()


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("rows_per_lut", [None, 4, 5])
def test_widths_that_do_not_divide_a_byte_are_written_alike_at_every_opset(bits: int, rows_per_lut: int | None) -> None:
    random = np.random.default_rng(bits)
    weight = PalettizedWeight(
        codes=random.integers(0, 1 << bits, (16, 5, 3)).astype(np.uint8),
        lut=random.standard_normal((lut_groups(16, rows_per_lut), 1 << bits)).astype(np.float32),
        bits=bits,
        rows_per_lut=rows_per_lut,
    )
    assert {choose(bits, opset).name for opset in OPSETS} == {"planes"}
    model = decoder(weight, choose(bits, 18))
    assert value_of(model).tobytes() == weight.dequantize().tobytes()
    assert optimized_ops(model.SerializeToString()) == {}
    # MNN multiplies integer matrices wrong.
    assert not {"MatMul", "MatMulInteger"} & {node.op_type for node in model.graph.node}


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
    for opset in find(target).opsets:
        encoding = choose(bits, opset)
        assert (encoding.opset(bits) or 99) <= opset


def test_a_table_that_two_weights_need_is_written_once() -> None:
    writer = GraphWriter(empty_graph(21))
    weight = PalettizedWeight(codes=np.zeros((4, 8), np.uint8), lut=np.zeros((1, 8), np.float32), bits=3)
    ranges = []
    for _ in range(2):
        write_palette(writer, weight, choose(3, 21))
        ranges.append(sum(node.op_type == "Range" for node in writer.graph))
    assert ranges == [2, 2]  # of the words of 12 bits, and of the bytes of their second plane


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("bits", range(1, 9))
@examples(25)
@given(data=st.data())
def test_onnxruntime_decodes_a_uniform_grid_bit_for_bit(opset: int, bits: int, data: st.DataObject) -> None:
    weight = data.draw(grids(bits))
    model, wanted = uniform_decoder(weight, opset), weight.dequantize()
    for got in (value_of(model), unoptimized(model)):
        assert got.shape == wanted.shape
        assert got.tobytes() == wanted.tobytes()
    assert optimized_ops(model.SerializeToString()) == {}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("bits", range(1, 9))
@examples(25)
@given(data=st.data())
def test_integer_compute_gets_the_values_as_int8(opset: int, bits: int, data: st.DataObject) -> None:
    weight = data.draw(palettes(bits, ("int8",)) | grids(bits).filter(lambda g: g.integers() is not None))
    found = weight.integers()
    assert found is not None
    model = int8_decoder(weight, opset)
    for got in (value_of(model), unoptimized(model)):
        assert got.shape == weight.shape
        assert got.dtype == np.int8
        assert got.tobytes() == found[0].tobytes()
    assert optimized_ops(model.SerializeToString()) == {}


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_palette_of_floats_on_a_grid_is_written_as_int8_too(bits: int) -> None:
    limits = IntegerRange(bits, signed=True)
    lut = (np.arange(limits.n, limits.p + 1, dtype=np.float32) + np.float32(0.5)) * np.float32(0.37)
    codes = np.random.default_rng(bits).integers(0, len(lut), (5, 3, 2)).astype(np.uint8)
    weight = PalettizedWeight(codes=codes, lut=lut[None], bits=bits)
    if bits == 8:  # half steps up to 255
        with pytest.raises(
            ConfigError,
            match=r"^weight: int8 compute must have weights that are int8 values times a scale, got a palette "
            r"artifact of other values: compress it with scheme uniform, or to a palette of int8 "
            r"entries, or compute in float\.$",
        ):
            int8_decoder(weight, 21)
        return
    got = value_of(int8_decoder(weight, 21))
    np.testing.assert_array_equal(got, 2 * (codes.astype(int) + limits.n) + 1)


def test_a_float_tensor_is_no_int8() -> None:
    with pytest.raises(ConfigError, match=r"got a float artifact of other values"):
        int8_decoder(FloatWeight(values=np.zeros(3, np.float32), reason="by plan"), 21)


def test_floats_are_not_written_as_int8() -> None:
    weight = FloatWeight(values=np.zeros(3, np.float32), reason="by plan")
    with pytest.raises(ConfigError, match=r"^A float artifact must have int8 codes to be written as such, and it has"):
        Float().write_int8(GraphWriter(empty_graph(21)), weight, 21)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_layers_on_a_uniform_grid_fold_to_nothing_but_themselves(bits: int, opset: int) -> None:
    limits = IntegerRange(bits, signed=True)
    weight = IntegerWeight(
        codes=np.random.default_rng(bits).integers(limits.n, limits.p + 1, (24, 16)).astype(np.int8),
        scale=np.linspace(0.1, 0.3, 16, dtype=np.float32),
        bits=bits,
        axis=1,
    )
    for model, op, from_type, to_type in (
        (uniform_decoder(weight, opset), "MatMul", onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT),
        (int8_decoder(weight, opset), "MatMulInteger", onnx.TensorProto.UINT8, onnx.TensorProto.INT32),
    ):
        model.graph.node.append(helper.make_node(op, ["x", "weight"], ["y"]))
        model.graph.input.append(helper.make_tensor_value_info("x", from_type, ["batch", 24]))
        model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", to_type, ["batch", 16]))
        onnx.checker.check_model(model, full_check=True)
        assert "DequantizeLinear" not in {node.op_type for node in model.graph.node}
        assert optimized_ops(model.SerializeToString()) == {op: 1}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_uniform_grid_takes_its_ideal_bytes(bits: int, opset: int) -> None:
    weight = IntegerWeight(codes=np.zeros((64, 64), np.int8), scale=np.ones(64, np.float32), bits=bits, axis=0)
    of_grid = 0 if bits == 8 or choose(bits, opset).name == "native" else 1 << bits  # shared by all of that width
    for model, itemsize, scale in ((uniform_decoder(weight, opset), 4, 4 * 64), (int8_decoder(weight, opset), 1, 0)):
        ideal = 64 * 64 * bits // 8 + scale + itemsize * of_grid
        payload = sum(len(t.raw_data) for t in model.graph.initializer)
        assert ideal <= payload <= ideal + 130  # shapes, and what decode tables are computed from
        assert len(model.SerializeToString()) - ideal < 900


def test_the_grid_of_a_width_is_written_once() -> None:
    writer = GraphWriter(empty_graph(25))
    weight = IntegerWeight(codes=np.zeros((4, 8), np.int8), scale=np.array(0.5, np.float32), bits=7)
    for name in ("a", "b"):
        write_weight(writer, weight, name, 25)
    constants = [value.const_value for value in writer.graph.initializers.values()]
    assert sum(tuple(tensor.shape) == (128,) for tensor in constants if tensor is not None) == 1


@examples(100)
@given(st.integers(1, 8), st.data())
def test_activations_are_quantized_as_onnxruntime_quantizes_them(bits: int, data: st.DataObject) -> None:
    zero_point = data.draw(st.integers(0, 255))
    scale = np.array(data.draw(st.floats(2.0**-20, 2.0**20, width=32)), np.float32)
    grid = ActivationGrid.from_zero_point(("x", -1), scale, zero_point, bits)
    random = np.random.default_rng(zero_point)
    halves = np.arange(-600, 600, dtype=np.float32) / 2  # ties, up to the rounding of the product
    x = np.concatenate([halves, random.standard_normal(400).astype(np.float32) * 60]) * scale
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "z"], ["u"]),
        helper.make_node("Clip", ["u", "low", "high"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "z"], ["values"]),
    ]
    constants = {"scale": grid.scale, "z": np.uint8(zero_point), "low": np.uint8(0), "high": np.uint8(grid.levels)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [
            helper.make_tensor_value_info("codes", onnx.TensorProto.UINT8, x.shape),
            helper.make_tensor_value_info("values", onnx.TensorProto.FLOAT, x.shape),
        ],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=ir_version(18))
    got = run(session(model.SerializeToString(), "exact"), {"x": x})
    codes = grid.quantize(x)
    assert got["codes"].tobytes() == codes.tobytes()
    assert got["values"].tobytes() == grid.dequantize(codes).tobytes()
