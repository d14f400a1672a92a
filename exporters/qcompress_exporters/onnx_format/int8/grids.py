"""The table of formats of activation grids, and the grids of a file."""

import json
from collections.abc import Sequence
from typing import Final

import onnx
import onnx_ir as ir

from qcompress.artifacts import ActivationGrid, SiteGrid, ThresholdGrid
from qcompress.artifacts.digest import short_digest
from qcompress.artifacts.site_grid import Site
from qcompress.errors import ConfigError, SourceError
from qcompress_exporters.onnx_format import metadata
from qcompress_exporters.onnx_format.int8.even_grid import EvenGrid
from qcompress_exporters.onnx_format.int8.grid_format import FileGrid, Formats, StoredCodes, format_of
from qcompress_exporters.onnx_format.int8.thresholds import Thresholds
from qcompress_exporters.onnx_format.names import code_name, code_scale_name

# A new kind of grid is a file that writes and reads it, and a line here.
GRIDS: Final[Formats] = {ActivationGrid.kind: EvenGrid(), ThresholdGrid.kind: Thresholds()}


def grid_entry(grid: SiteGrid, formats: Formats = GRIDS) -> metadata.GridEntry:
    """Return what a file's metadata says of a grid."""
    stored = format_of(grid, formats).stored(grid)
    return metadata.GridEntry(grid.bits, _digest(stored), float(stored.free_offset))


def wrong_grids(model: onnx.ModelProto, sites: Sequence[Site], read: Sequence[FileGrid | None]) -> list[str]:
    """Return the names of the sites whose grid is not what export took the digest of.

    Args:
        model: one of our files, for int8 compute.
        sites: their keys.
        read: their grids, from `read_grids`.
    """
    entries = _entries(model, len(sites))
    found = zip(sites, read, entries, strict=True)
    return [site[0] for site, grid, entry in found if grid is None or _digest(grid.grid) != entry.digest]


def file_grids(model: onnx.ModelProto, sites: Sequence[Site], formats: Formats = GRIDS) -> list[FileGrid]:
    """Read the grids of a file's sites; see `read_grids`.

    Raises:
        SourceError: a site is missing, not written as we write it, or holds numbers that no grid has.
    """
    found = read_grids(model, sites, formats)
    if None in found:
        name = sites[found.index(None)][0]
        raise SourceError(f"The file's grid of {name} holds numbers that no grid has: export it again.")
    return [grid for grid in found if grid is not None]


def read_grids(model: onnx.ModelProto, sites: Sequence[Site], formats: Formats = GRIDS) -> list[FileGrid | None]:
    """Read the grids of a file's sites.

    Args:
        model: one of our files, for int8 compute.
        sites: their keys, as the file's metadata says them.
        formats: what reads each kind of grid.

    Returns:
        One for each site; None where the file holds numbers that no grid has.

    Raises:
        SourceError: a site is missing, or not written as we write it.
    """
    graph = ir.from_proto(model).graph
    values = {**graph.initializers, **{o.name: o for node in graph for o in node.outputs if o.name}}
    scales = {code_name(i): values.get(code_scale_name(i)) for i in range(len(sites))}
    found = []
    for i, (site, entry) in enumerate(zip(sites, _entries(model, len(sites)), strict=True)):
        codes = values.get(code_name(i))
        node = None if codes is None else codes.producer()
        if node is not None and node.op_type == "Identity":  # another site has the same codes
            codes = node.inputs[0]
        if codes is None:
            raise _not_as_said(code_name(i))
        name = str(codes.name)
        found.append(_read(StoredCodes(site, codes, scales.get(name), entry.bits, entry.offset), name, formats))
    return found


def _read(stored: StoredCodes, name: str, formats: Formats) -> FileGrid | None:
    try:
        found = next((grid for f in formats.values() if (grid := f.read(stored)) is not None), None)
    except ConfigError:
        return None
    if found is None:
        raise _not_as_said(name)
    return found


def _entries(model: onnx.ModelProto, count: int) -> list[metadata.GridEntry]:
    entries = metadata.grids_from(metadata.entry_of(model, metadata.GRIDS) or "")
    if len(entries) != count:
        raise SourceError("The file carries no digests of its activations' grids: export it again.")
    return entries


def _digest(stored: SiteGrid) -> str:
    return short_digest(json.dumps(stored.as_dict(), sort_keys=True).encode())


def _not_as_said(codes: str) -> SourceError:
    return SourceError(f"The file does not quantize {codes} as its metadata says: export it again.")
