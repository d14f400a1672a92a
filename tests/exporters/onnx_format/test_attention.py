"""Attention whose outputs are transposed and viewed goes through, whatever kernel it was traced with."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.settings import PosthocSettings
from qcompress_exporters import build
from qcompress_exporters.parity.sessions import run, session
from tests.helpers.nets import traced

JOINS: dict[str, Callable[[Tensor], Tensor]] = {
    "reshaped": lambda y: y.reshape(y.shape[0], y.shape[1], -1),
    "viewed": lambda y: y.contiguous().view(y.shape[0], y.shape[1], -1),
    "flattened": lambda y: y.flatten(2),
}


class Attention(nn.Module):
    """Four heads with a bias for each pair of positions."""

    def __init__(self, join: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.join = join
        self.split, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.bias = nn.Parameter(torch.randn(4, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.view(*x.shape[:2], 4, 8).transpose(1, 2) for part in self.split(x).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[None])
        return self.out(self.join(y.transpose(1, 2)))


@pytest.mark.parametrize("join", JOINS)
def test_a_file_computes_what_the_program_does(join: str) -> None:
    torch.manual_seed(0)
    x = np.random.default_rng(0).standard_normal((3, 6, 32)).astype(np.float32)
    program = traced(Attention(JOINS[join]).eval(), x=x)
    small = compress_program(program, Plan.from_flags(bits=4), PosthocSettings(effort="fast"))
    assert {n for n, a in small.artifacts.items() if a.reason} == {"split.bias", "out.bias"}
    floats = program.with_state({n: a.dequantize() for n, a in small.artifacts.items()})
    got = run(session(build(small).data, "exact"), {"x": x})["output"]
    np.testing.assert_allclose(got, floats.run({"x": x})["output"], rtol=1e-4, atol=1e-5)
