"""The hinge: the frozen weights and grids that every method ends in and every exporter starts from. numpy only."""

from qcompress.artifacts.activation_grid import ActivationGrid
from qcompress.artifacts.base import Artifact, Integers
from qcompress.artifacts.float_weight import FloatWeight
from qcompress.artifacts.integer_weight import IntegerWeight
from qcompress.artifacts.palettized_weight import PalettizedWeight
from qcompress.artifacts.site_grid import SiteGrid
from qcompress.artifacts.tables import ARTIFACTS, GRIDS
from qcompress.artifacts.threshold_grid import ThresholdGrid

__all__ = [
    "ARTIFACTS",
    "GRIDS",
    "ActivationGrid",
    "Artifact",
    "FloatWeight",
    "IntegerWeight",
    "Integers",
    "PalettizedWeight",
    "SiteGrid",
    "ThresholdGrid",
]
