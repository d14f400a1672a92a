"""Weights that a mask has set to 0 are exactly 0 in the file, whatever finds the codes."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from qcompress.plan.plan import Plan
from qcompress.posthoc.compress import compress


def pruned(layer: nn.Module) -> nn.Module:
    return prune.random_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
@pytest.mark.parametrize("flags", [{"rows_per_lut": 4}, {"scheme": "uniform"}, {"lut_dtype": "int8"}])
def test_zeros_stay(effort: str, flags: dict[str, object]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(pruned(nn.Linear(16, 12)), nn.ReLU(), nn.Linear(12, 4)).eval()
    data = {"x": np.random.default_rng(0).standard_normal((512, 16)).astype(np.float32)}
    small = compress(net, Plan.from_flags(bits=3, **flags), calibration=data, effort=effort)
    got = small.artifacts["0.weight_orig"].dequantize()
    assert not got[net[0].weight.detach().numpy() == 0].any()
    assert np.corrcoef(got.ravel(), net[0].weight.detach().numpy().ravel())[0, 1] > 0.95


def test_at_1_bit_both_levels_serve_the_weights() -> None:
    torch.manual_seed(0)
    net = pruned(nn.Linear(16, 64)).eval()
    small = compress(net, Plan.from_flags(bits=1), example_inputs=(torch.randn(2, 16),), effort="fast")
    assert {float(v) < 0 for v in np.unique(small.artifacts["weight_orig"].dequantize())} == {False, True}
