"""A new kind of artifact and a new kind of grid: a class, and what writes and reads it, handed over in a table."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompress.artifacts import Artifact, Integers, SiteGrid
from qcompress.artifacts.site_grid import Site
from qcompress.errors import ConfigError, SourceError
from qcompress.graph.marks import mark
from qcompress_exporters.onnx_format import metadata
from qcompress_exporters.onnx_format.encodings.formats import Written
from qcompress_exporters.onnx_format.encodings.table import WEIGHTS
from qcompress_exporters.onnx_format.graph_writer import GraphWriter
from qcompress_exporters.onnx_format.int8.grid_format import FileGrid, Quantizer, StoredCodes, scalar
from qcompress_exporters.onnx_format.int8.grids import GRIDS, file_grids, grid_entry, wrong_grids
from qcompress_exporters.onnx_format.lower import FORMATS, lower, lower_integer, serialize
from qcompress_exporters.onnx_format.names import code_name
from qcompress_exporters.onnx_format.opsets import BASE_OPSET
from qcompress_exporters.parity.checks import check_codes
from qcompress_exporters.parity.decode import decoded, mismatches
from qcompress_exporters.parity.replay import reference_state, replay
from tests.helpers import small_models
from tests.helpers.integer_chain import MODES, Case, case


@dataclass(frozen=True, kw_only=True)
class SignWeight:
    """Ones and minus ones times a scale."""

    kind: ClassVar[str] = "signs"
    bits: ClassVar[int] = 1
    reason: ClassVar[str] = ""
    no_integers: ClassVar[str] = ""
    decoded_dtype: ClassVar[np.dtype[Any]] = np.dtype(np.float32)
    negative: np.ndarray[Any, np.dtype[np.bool_]]
    scale: np.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.negative.shape

    @property
    def nbytes(self) -> int:
        return -(-self.negative.size // 8) + 4

    def integers(self) -> Integers:
        return Integers(np.where(self.negative, np.int8(-1), np.int8(1)), np.asarray(self.scale), None)

    def dequantize(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.where(self.negative, -self.scale, self.scale)

    def rescaled(self, factor_O: Any, axis: int) -> Self:
        return self

    def raised(self, least_O: Any) -> Self:
        return self

    def halved(self) -> Self:
        return self

    def with_zeros(self, where: Any) -> Self:
        return self

    def parts(self, axis: int, elements: int) -> list[Self]:
        return []

    def to_arrays(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"negative": self.negative}, {"scale": float(self.scale)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any], fields: Mapping[str, Any]) -> Self:
        return cls(negative=arrays["negative"], scale=np.float32(fields["scale"]))


class Signs:
    """Writes `SignWeight`."""

    def write(self, writer: GraphWriter, weight: SignWeight, opset: int) -> Written:
        values = [writer.constant(np.asarray(value, np.float32)) for value in (-weight.scale, weight.scale)]
        return Written(writer.node("Where", [writer.tensor(weight.negative), *values]), "signs")

    def write_int8(self, writer: GraphWriter, weight: SignWeight, opset: int) -> Written:
        values = [writer.constant(np.asarray(value, np.int8)) for value in (-1, 1)]
        return Written(writer.node("Where", [writer.tensor(weight.negative), *values]), "signs")


@dataclass(frozen=True, kw_only=True)
class FloorGrid:
    """Codes count whole steps: x_hat = floor(x / scale) * scale."""

    kind: ClassVar[str] = "floor"
    zero_point: ClassVar[int] = 0
    stored_zero_point: ClassVar[int] = 0
    nbytes: ClassVar[int] = 4
    site: Site
    scale: Any
    bits: int

    @property
    def levels(self) -> int:
        return (1 << self.bits) - 1

    @property
    def offset(self) -> Any:
        return np.zeros((), np.float32)

    @property
    def free_offset(self) -> Any:
        return self.offset

    def quantize(self, x: Any) -> Any:
        return np.clip(np.floor(x / self.scale), 0, self.levels).astype(np.uint8)

    def dequantize(self, u: Any) -> Any:
        return u.astype(np.float32) * self.scale

    def snapped(self) -> Self:
        return self

    def as_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "site": list(self.site), "scale": float(self.scale), "bits": self.bits}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        return cls(site=tuple(fields["site"]), scale=np.asarray(fields["scale"], np.float32), bits=fields["bits"])


class Floors:
    """Writes and reads `FloorGrid`."""

    def stored(self, grid: FloorGrid) -> FloorGrid:
        return grid

    def write(self, writer: GraphWriter, grid: FloorGrid, value: ir.Value, site: int | None) -> Quantizer:
        scale = writer.constant(grid.scale)
        steps = writer.add("Floor", [writer.add("Div", [value, scale])])
        ends = [writer.constant(np.asarray(end, np.float32)) for end in (0, grid.levels)]
        name = None if site is None else code_name(site)
        codes = writer.add("Cast", [writer.add("Clip", [steps, *ends])], name, to=ir.DataType.UINT8)
        return Quantizer(codes, scale, compares=True)

    def read(self, stored: StoredCodes) -> FileGrid | None:
        node = stored.codes.producer()
        for op_type in ("Cast", "Clip", "Floor"):
            if node is None or node.op_type != op_type or node.inputs[0] is None:
                return None
            node = node.inputs[0].producer()
        if node is None or node.op_type != "Div":
            return None
        scale = np.asarray(scalar(node.inputs[1]), np.float32)
        grid = FloorGrid(site=stored.site, scale=scale, bits=stored.bits)
        return FileGrid(grid, 0, grid.levels)


WITH_SIGNS = {**WEIGHTS, SignWeight.kind: Signs()}
WITH_FLOORS = {**GRIDS, FloorGrid.kind: Floors()}


def sign_weight(like: Artifact) -> SignWeight:
    return SignWeight(negative=like.dequantize() < 0, scale=np.float32(0.3))


def test_the_toys_answer_what_is_asked_of_them() -> None:
    found = case("linear", bits=4, activation_bits=4)
    assert isinstance(sign_weight(found.model.artifacts["layer.weight"]), Artifact)
    assert isinstance(FloorGrid(site=("x", -1), scale=np.asarray(np.float32(1)), bits=4), SiteGrid)


@pytest.fixture
def small() -> Case:
    return case("linear", bits=4, activation_bits=4)


def test_a_new_kind_of_weight_is_written_and_decoded(small: Case) -> None:
    artifacts = {**small.model.artifacts, "layer.weight": sign_weight(small.model.artifacts["layer.weight"])}
    graph = small_models.trace_once(small.model.program)
    lowered = lower(graph, artifacts, BASE_OPSET, weights=WITH_SIGNS)
    values = decoded(lowered.model)
    assert mismatches(lowered.model, values) == []
    assert values["layer.weight"].tobytes() == artifacts["layer.weight"].dequantize().tobytes()
    assert lowered.encodings["layer.weight"] == "signs"
    with pytest.raises(
        ConfigError,
        match=r"^layer\.weight: the kind of an artifact must be one of palette, uniform, float, got 'signs'\.$",
    ):
        lower(graph, artifacts, BASE_OPSET)


@pytest.mark.parametrize("form", FORMATS)
def test_new_kinds_of_weights_and_grids_compute_in_integers(form: str, small: Case) -> None:
    artifacts = {**small.model.artifacts, "layer.weight": sign_weight(small.model.artifacts["layer.weight"])}
    grids: list[SiteGrid] = list(small.model.activations.values())
    grids[0] = FloorGrid(site=grids[0].site, scale=np.asarray(np.float32(grids[0].scale)), bits=4)
    sites = [grid.site for grid in grids]
    marked = mark(small.model.program, sites)
    graph = small_models.trace_once(marked)
    lowered = lower_integer(graph, artifacts, BASE_OPSET, grids, FORMATS[form], formats=WITH_FLOORS, weights=WITH_SIGNS)
    assert {layer.weight: layer.compute for layer in lowered.layers} == {"layer.weight": "int8", "head.weight": "int8"}
    entries = [grid_entry(grid, WITH_FLOORS) for grid in grids]
    said = {metadata.GRIDS: metadata.grids_text(entries), metadata.SITES: metadata.sites_text("int8", sites)}
    model = onnx.load_from_string(lowered.serialize(said))
    read = file_grids(model, sites, WITH_FLOORS)
    assert wrong_grids(model, sites, read) == []
    assert read[0].grid == grids[0]
    values = decoded(model)
    assert mismatches(model, values) == []
    state = reference_state(marked, values, read)
    for mode in MODES:
        check = check_codes(replay(marked, model, sites, state, read, [{"x": small.x}], mode), mode, len(small.x))
        assert check.ok, check.detail
    with pytest.raises(SourceError, match=r"^The file does not quantize q0 as its metadata says: export it again\.$"):
        file_grids(model, sites)
    with pytest.raises(ConfigError, match=r"^x: the kind of a grid must be one of even, thresholds, got 'floor'\.$"):
        lower_integer(graph, small.model.artifacts, BASE_OPSET, grids, FORMATS[form])


@pytest.mark.parametrize("scale", [-1.0, 0.0, float("nan")])
def test_a_scale_that_no_grid_has_is_refused(scale: float, small: Case) -> None:
    model = small.proto("qdq")
    node = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
    tensor = next(t for t in model.graph.initializer if t.name == node.input[1])
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(scale, np.float32), tensor.name))
    changed = onnx.load_from_string(serialize(model, {p.key: p.value for p in model.metadata_props}))
    with pytest.raises(SourceError, match=r"^The file's grid of x holds numbers that no grid has: export it again\.$"):
        file_grids(changed, list(small.model.activations))


def test_metadata_without_grids_is_refused(small: Case) -> None:
    model = onnx.load_from_string(serialize(small.proto("qdq"), {}))
    with pytest.raises(
        SourceError, match=r"^The file carries no digests of its activations' grids: export it again\.$"
    ):
        file_grids(model, list(small.model.activations))


def test_equal_inputs_give_equal_bytes(small: Case) -> None:
    again = case("linear", bits=4, activation_bits=4)
    assert all(small.file(form).data == replace(again, built={}).file(form).data for form in FORMATS)
