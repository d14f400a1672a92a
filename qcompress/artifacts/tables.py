"""The tables of artifacts and of activation grids by kind. A new one is a file beside this one and a line here."""

from collections.abc import Mapping
from typing import Any, Final

from qcompress.artifacts.activation_grid import ActivationGrid
from qcompress.artifacts.base import Artifact
from qcompress.artifacts.float_weight import FloatWeight
from qcompress.artifacts.integer_weight import IntegerWeight
from qcompress.artifacts.palettized_weight import PalettizedWeight
from qcompress.artifacts.site_grid import SiteGrid
from qcompress.artifacts.threshold_grid import ThresholdGrid
from qcompress.errors import ConfigError

ARTIFACTS: Final[Mapping[str, type[Artifact]]] = {
    kind.kind: kind for kind in (PalettizedWeight, IntegerWeight, FloatWeight)
}

GRIDS: Final[Mapping[str, type[SiteGrid]]] = {kind.kind: kind for kind in (ActivationGrid, ThresholdGrid)}


def grid_from_dict(fields: Mapping[str, Any], grids: Mapping[str, type[SiteGrid]] = GRIDS) -> SiteGrid:
    """Return the grid of stored fields; the exact inverse of any grid's `as_dict`.

    Args:
        fields: the stored fields. In folders of format 4 and older they name no kind, and it is read off the fields.
        grids: the known kinds.

    Raises:
        ConfigError: the kind is unknown, or a field is missing or has the wrong type or range.

    >>> grid = ActivationGrid.from_zero_point(("x", -1), scale=0.5, zero_point=2, bits=4)
    >>> grid_from_dict(grid.as_dict()) == grid
    True
    """
    kind = fields.get("kind", ThresholdGrid.kind if "thresholds" in fields else ActivationGrid.kind)
    if kind not in grids:
        raise ConfigError(f"The kind of a grid must be one of {', '.join(grids)}, got {kind!r}.")
    return grids[kind].from_dict(fields)
