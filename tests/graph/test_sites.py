"""Sites of activations: what is refused."""

import pytest
from torch import nn

from qcompress.errors import ConfigError
from qcompress.graph.sites import OUTPUT, activation_sites, mark
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
