"""The protocol of formats, each of which writes the activation grids of one kind and reads them back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import onnx_ir as ir

from qcompress.artifacts import SiteGrid
from qcompress.artifacts.site_grid import Site
from qcompress.errors import ConfigError, SourceError
from qcompress_exporters.onnx_format.graph_writer import GraphWriter


class Quantizer(NamedTuple):
    """The nodes that quantize a value.

    Args:
        codes: uint8.
        scale: of the codes.
        shifted: the value with a free offset taken off, which the layer in front can do in its bias; None: no offset.
        compares: whether the value is compared with thresholds, so that no layer in front can give the codes itself.
    """

    codes: ir.Value
    scale: ir.Value
    shifted: ir.Value | None = None
    compares: bool = False


@dataclass(frozen=True, slots=True)
class FileGrid:
    """The grid of one site as a file has it.

    Args:
        grid: what the file's nodes compute.
        low: smallest code that the file lets pass.
        high: largest such code; clamps of the model may leave fewer codes than the grid has.
        folded: whether the layers behind it have its free offset in their biases.
        taken: whether the layer in front of it has its free offset in the bias.
    """

    grid: SiteGrid
    low: int
    high: int
    folded: bool = False
    taken: bool = False


class StoredCodes(NamedTuple):
    """The codes of one site in a file, for a format to read their grid.

    Args:
        site: key of the site.
        codes: the uint8 value.
        scale: the value that goes by the name of the site's scale; None if no value does.
        bits: width of a code, from the file's metadata.
        offset: free offset, from the file's metadata; 0 for a grid with a zero point.
    """

    site: Site
    codes: ir.Value
    scale: ir.Value | None
    bits: int
    offset: float


class GridFormat(Protocol):
    """Writes and reads the grids of one kind."""

    def stored(self, grid: Any) -> SiteGrid:
        """Return the grid that `read` gives back for a grid: equal codes and values, in one way to say them."""

    def write(self, writer: GraphWriter, grid: Any, value: ir.Value, site: int | None) -> Quantizer:
        """Write the nodes that quantize a value.

        Args:
            writer: of the graph.
            grid: of the kind.
            value: float32; only its quantizer takes it, unless it has users already.
            site: index of the site that names the codes (and the scale, where `read` needs it); None: short names.
        """

    def read(self, stored: StoredCodes) -> FileGrid | None:
        """Return the grid of a site; None if the file's nodes are not such as `write` writes.

        Raises:
            ConfigError: the nodes hold numbers that no grid has.
        """


def scalar(value: ir.Value | None) -> Any:
    """Return a 0-d constant.

    Raises:
        SourceError: it is something else.
    """
    constant = None if value is None else value.const_value
    if constant is None or len(constant.shape):
        raise SourceError("The file's scales and zero points must be scalar constants: export it again.")
    return constant.numpy()


def format_of(grid: SiteGrid, formats: "Formats") -> GridFormat:
    """Return the format that writes a grid.

    Raises:
        ConfigError: no format writes grids of this kind.
    """
    if grid.kind not in formats:
        raise ConfigError(f"{grid.site[0]}: the kind of a grid must be one of {', '.join(formats)}, got {grid.kind!r}.")
    return formats[grid.kind]


Formats = Mapping[str, GridFormat]
