"""Names of values: those that parity looks up are no other value's, however many values there are."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from qcompress.data.dataset import as_dataset
from qcompress.deployment import Compute
from qcompress.errors import SourceError
from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.settings import PosthocSettings
from qcompress_exporters import export
from qcompress_exporters.onnx_format.passes.shorten_names import ShortenNames
from qcompress_exporters.parity.sessions import run, session
from tests.helpers.nets import traced


class Long(nn.Module):
    """More values than there are short names without a `q0`: those of two characters are 3,844."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(1700):
            x = x.neg()
        return self.last(x)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, q0: Tensor) -> Tensor:
        return self.layer(q0)


X = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)


def exported(net: nn.Module, name: str, compute: Compute, path: Path) -> None:
    torch.manual_seed(0)
    plan = Plan.from_flags(bits=8, activation_bits=8 if compute == "int8" else None)
    settings = PosthocSettings(effort="fast", compute=compute)
    export(compress_program(traced(net.eval(), **{name: X}), plan, settings, calibration=as_dataset({name: X})), path)


def test_no_value_gets_a_name_that_others_will_have() -> None:
    x = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, value = [], x
    for number in range(3000):
        nodes.append(ir.node("Neg", [value], name="", outputs=[ir.Value(name=f"value_{number}")]))
        value = nodes[-1].outputs[0]
    model = ir.Model(ir.Graph([x], [value], nodes=nodes, opset_imports={"": 18}), ir_version=10)
    ShortenNames(avoid=["q0", "s17", "0"])(model)
    names = [node.outputs[0].name for node in nodes[:-1]]
    assert len(set(names)) == 2999
    assert not {"q0", "s17", "0"} & set(names)
    assert {"q1", "1"} <= set(names)


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["int8", "dynamic8"])
def test_short_names_leave_those_of_codes_alone(compute: Compute, tmp_path: Path) -> None:
    exported(Long(), "x", compute, tmp_path / "net.onnx")
    found = session((tmp_path / "net.onnx").read_bytes(), "deployed")
    assert run(found, {"x": X})["output"].shape == (4, 6)


@pytest.mark.parametrize("compute", ["int8", "dynamic8"])
def test_an_input_with_the_name_of_codes_is_refused(compute: Compute, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"give the name q0 to codes .* choose another with --input-names"):
        exported(Named(), "q0", compute, tmp_path / "net.onnx")
