"""Passes over the traced graph, at every depth of it."""

import contextlib
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnxscript import rewriter
from torch import nn

from qcompress.artifacts import FloatWeight
from qcompress_exporters.onnx_format import trace as trace_module
from qcompress_exporters.onnx_format.lower import lower
from qcompress_exporters.onnx_format.opsets import BASE_OPSET
from qcompress_exporters.onnx_format.passes.default_attributes import DropDefaultAttributes
from qcompress_exporters.onnx_format.passes.order_loops import OrderLoops
from qcompress_exporters.onnx_format.passes.shorten_names import ShortenNames
from qcompress_exporters.onnx_format.trace import trace
from qcompress_exporters.parity.sessions import run, session
from tests.helpers.nets import traced

TEXT = """<ir_version: 8, opset_import: ["" : 18]>
g (float[n, 3] x, bool flag) => (float[n, 3] y) {
    one = Constant <value_float = 1.0> ()
    moved = Add (x, one)
    y = If (flag) <
        then_branch = then () => (float[n, 3] inner) { inner = Mul (moved, one) },
        else_branch = otherwise () => (float[n, 3] other) { other = Neg (moved) }
    >
}"""


class Bag(nn.Module):
    """A layer that becomes a loop in ONNX."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(40, 8, mode="sum"), nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.bag(ids))


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs_of(attribute.g)


def test_nothing_of_the_tracer_is_left_in_a_loop() -> None:
    module = Bag().eval()
    ids = np.array([[0, 5, 39], [7, 7, 1]])
    program = traced(module, ids=ids)
    graph = trace(program)
    state = program.state()
    floats = {n: FloatWeight(values=state[n].numpy(), reason="original") for n in graph.state_names}
    lowered = lower(graph, floats, BASE_OPSET, sign=False)
    found = list(graphs_of(lowered.model.graph))
    assert len(found) > 1
    for part in found:
        assert not part.metadata_props, part.name
        for node in part.node:
            assert [*node.metadata_props, node.doc_string, node.name] == ["", ""]
            assert all(len(name) <= 2 or name in floats for name in node.output if part is not found[0])
    onnx.checker.check_model(lowered.model, full_check=True)
    assert not found[0].value_info
    data = lowered.serialize()
    assert b"site-packages" not in data
    assert b"test_passes" not in data
    got = run(session(data, "exact"), {"ids": ids})
    with torch.no_grad():
        np.testing.assert_allclose(got["output"], module(torch.from_numpy(ids)).numpy(), rtol=1e-5, atol=1e-6)


def test_names_are_short_and_unique_in_subgraphs_too() -> None:
    model = ir.from_onnx_text(TEXT)
    ShortenNames(["moved"])(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    names = [name for part in graphs_of(proto.graph) for node in part.node for name in node.output]
    assert sorted(names) == ["0", "1", "2", "moved", "y"]
    got = run(session(proto.SerializeToString(), "exact"), {"x": np.ones((1, 3), np.float32), "flag": np.array(True)})
    assert got["y"].tolist() == [[2.0, 2.0, 2.0]]


LOOP = """<ir_version: 8, opset_import: ["" : 18]>
g (int64 n, float[2] a, float[2] b) => (float[2] y, float[2] z) {
    go = Constant <value = bool {1}> ()
    y, z = Loop (n, go, FIRST) <
        body = step (int64 i, bool on, VARIABLES) => (bool more, NEXT) {
            more = Identity (on)
            one_next = Add (one, two)
            two_next = Mul (one, two)
        }
    >
}"""


def test_variables_of_a_loop_come_in_one_order() -> None:
    in_order = LOOP.replace("FIRST", "a, b").replace("VARIABLES", "float[2] one, float[2] two")
    in_order = in_order.replace("NEXT", "float[2] one_next, float[2] two_next")
    other = LOOP.replace("FIRST", "b, a").replace("VARIABLES", "float[2] two, float[2] one").replace("y, z =", "z, y =")
    other = other.replace("NEXT", "float[2] two_next, float[2] one_next")
    found = []
    for text in (in_order, other):
        model = ir.from_onnx_text(text)
        OrderLoops()(model)
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        for node in proto.graph.node:
            node.name = ""
        found.append(proto.graph.SerializeToString())
        feeds = {"n": np.array(2), "a": np.full(2, 2, np.float32), "b": np.full(2, 3, np.float32)}
        got = run(session(proto.SerializeToString(), "exact"), feeds)
        assert [got["y"].tolist(), got["z"].tolist()] == [[11, 11], [30, 30]]
    assert found[0] == found[1]


def test_attributes_that_say_the_default_go() -> None:
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 18]>
    g (float[1, 3, 8, 8] x, float[4, 3, 3, 3] w) => (float[1, 4, 8, 8] y) {
        y = Conv <kernel_shape = [3, 3], strides = [1, 1], pads = [1, 1, 1, 1], group = 1, auto_pad = "NOTSET"> (x, w)
    }""")
    DropDefaultAttributes()(model)
    assert {name: a.value for name, a in model.graph[0].attributes.items()} == {"pads": (1, 1, 1, 1)}


def test_attributes_without_effect_go() -> None:
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 18]>
    g (float[n, 6] x, float[6] w, int64[2] known) => (float[m, 3] y, float[n, 6] z)
    <int64[2] shape = {-1, 3}, int64[2] zero = {0, 6}> {
        y = Reshape <allowzero = 1> (x, shape)
        normed = LayerNormalization <axis = -1, epsilon = 0.00001> (x, w)
        flat = Reshape <allowzero = 1> (normed, zero)
        z = Reshape <allowzero = 1> (flat, known)
    }""")
    for node in model.graph:
        if "epsilon" in node.attributes:
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-05)  # as torch.onnx writes it: a float64
    DropDefaultAttributes()(model)
    assert [list(node.attributes) for node in model.graph] == [[], [], ["allowzero"], ["allowzero"]]


def test_rules_that_are_tried_at_their_operators_alone_do_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class Steps(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.clamp(torch.relu(x), max=6).reshape(2, -1).reshape(2, 4, -1)
            return (y.transpose(1, 2).transpose(1, 2) * 1 + 0)[:, :, ::1]

    program = traced(Steps(), x=np.zeros((2, 4, 6), np.float32))
    quick = trace(program).base
    assert not any("try_rewrite" in vars(rule) for rule in rewriter._DEFAULT_REWRITE_RULES)  # as it was
    monkeypatch.setattr(trace_module, "quick_rules", contextlib.nullcontext)
    assert ir.to_proto(quick).SerializeToString() == ir.to_proto(trace(program).base).SerializeToString()
