"""Sites of activations: what is refused."""

import pytest
import torch
from torch import nn

from qcompress.errors import ConfigError
from qcompress.graph.marks import mark
from qcompress.graph.sites import OUTPUT, activation_sites
from qcompress.graph.widths import activation_widths
from tests.helpers.nets import image, traced


@pytest.mark.parametrize("site", [("relu_3", OUTPUT), ("relu_3", 0), ("0.bias", OUTPUT), ("conv2d", 0)])
def test_a_site_of_another_model_is_refused(site: tuple[str, int]) -> None:
    program = traced(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), x=image(2))
    with pytest.raises(ConfigError, match=rf"^No activation '{site[0]}' in this model: the activation grids belong to"):
        mark(program, [site])


def test_an_unknown_placement_is_refused() -> None:
    program = traced(nn.Conv2d(3, 4, 3).eval(), x=image(2))
    with pytest.raises(ConfigError, match=r"^placement must be one of deploy, paper, got 'papers'\.$"):
        activation_sites(program, {}, "papers")  # type: ignore[arg-type]


class _Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return self.c(y + torch.relu(self.b(y)))


@pytest.mark.parametrize(
    ("fused", "at_branch"),
    [
        ({"sums", "clamps"}, ["relu"]),  # the clamp in front of the sum is part of the quantizer
        ({"clamps"}, ["relu"]),
        ({"sums"}, ["conv2d_1", "relu"]),  # an operand of a sum that computes on codes
        (set(), ["conv2d_1"]),
    ],
)
def test_sites_follow_what_the_deployment_fuses(fused: set[str], at_branch: list[str]) -> None:
    program = traced(_Sum().eval(), x=image(2))
    bits = dict.fromkeys(("a.weight", "b.weight", "c.weight"), 4)
    sites = {site.name: site.bits for site in activation_sites(program, bits, fused=frozenset(fused))}
    assert list(sites) == ["x", "conv2d", *at_branch, "add", "conv2d_2"]
    assert sites == {"x": 4, "conv2d": 8, **dict.fromkeys(at_branch, 8), "add": 4, "conv2d_2": 8}


def test_widths_are_those_of_the_values_that_layers_take() -> None:
    program = traced(_Sum().eval(), x=image(2))
    asked = dict.fromkeys(("a.weight", "b.weight", "c.weight"), 4)
    for placement, widths in (("deploy", [4, 8, 4]), ("paper", [4, 4, 4])):
        sites = activation_sites(program, asked, placement)  # type: ignore[arg-type]
        found = activation_widths(program, {site.key: site.bits for site in sites})
        assert found == dict(zip(asked, widths, strict=True))
    assert activation_widths(program, {("add", OUTPUT): 2}) == {"a.weight": None, "b.weight": None, "c.weight": 2}
