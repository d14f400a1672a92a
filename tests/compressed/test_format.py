"""The promise of the saved form: what a released version wrote stays readable, and damage is told as damage."""

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompress.artifacts import ActivationGrid, ThresholdGrid
from qcompress.artifacts.digest import digest
from qcompress.compressed.folder import FORMAT_VERSION, read_artifacts
from qcompress.compressed.model import CompressedModel
from qcompress.errors import ConfigError, OutputError, SourceError
from qcompress.openers import load_source

FIXTURES = Path(__file__).parents[1] / "fixtures"
V1, V2, V3, V4, V5 = (FIXTURES / f"compressed_v{version}" for version in (1, 2, 3, 4, 5))

# Of the decoded tensors. A change here means that users' files read differently: never change it, fix the reader.
DIGESTS_V1 = {
    "grouped.weight": "wd7g55ETEPn",
    "grouped.bias": "t17qVVGaJXl",
    "vectors.weight": "safQBaa6pfd",
    "vectors.bias": "jwIhdZsR6Zn",
    "across.weight": "ThovgrFHwz7",
    "blocks.weight": "Fcq2YlOngr1",
    "signed.weight": "WR_1v0CMreG",
    "signed.bias": "06Z-MEo4AQD",
}
NBYTES_V1 = 349
DIGESTS_V2 = {**DIGESTS_V1, "integers.weight": "lTYiTw-lERu", "scaled.weight": "gwZwsGnjCFe"}
NBYTES_V2 = 439
DIGESTS_V3 = {**DIGESTS_V2, "halves.weight": "fNjW523kSJF"}
NBYTES_V3 = 473
NBYTES_V4 = NBYTES_V3 + 16

X = np.sin(np.arange(1, 25, dtype=np.float64)).reshape(3, 8).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the newest fixture, to be damaged."""
    shutil.copytree(V5, tmp_path / "small")
    return tmp_path / "small"


def edit_header(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change what the weights file says of the model."""
    path = folder / "weights.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    about = json.loads(header["__metadata__"]["qcompress"])
    edit(about)
    header["__metadata__"]["qcompress"] = json.dumps(about)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def stored_grids(model: CompressedModel) -> list[dict[str, Any]]:
    """The activation grids as JSON holds them."""
    return [grid.as_dict() for grid in model.activations.values()]


def test_every_format_has_its_fixture() -> None:
    assert [f"compressed_v{n}" for n in range(1, FORMAT_VERSION + 1)] == sorted(p.name for p in FIXTURES.glob("*_v*"))


def test_version_1_is_read_to_the_same_values() -> None:
    about, artifacts = read_artifacts(V1)
    assert about["format_version"] == 1
    assert {name: digest(a.dequantize()) for name, a in artifacts.items()} == DIGESTS_V1
    assert sum(a.nbytes for a in artifacts.values()) == NBYTES_V1


def test_the_whole_model_of_version_1() -> None:
    small = CompressedModel.load(V1)
    assert (small.source_digest, small.plan_digest, small.notes) == ("0123456789a", "abcdefghijk", ("a note",))
    assert (small.program.input_names, small.program.output_names) == (("x",), ("scores",))
    assert small.program.dynamic == {("x", 0): "batch"}
    assert small.plan.default.bits == 3
    assert (small.activations, small.compute) == ({}, "float")
    wanted = [
        [263.611023, -473.403198, 155.881134],
        [200.376648, -359.262512, 118.403358],
        [186.802933, -334.761261, 110.358437],
    ]
    decoded = small.program.with_state({name: a.dequantize() for name, a in small.artifacts.items()})
    np.testing.assert_allclose(decoded.run({"x": X})["scores"], wanted, rtol=1e-5)
    assert [t.name for t in load_source(V1).tensors()] == list(DIGESTS_V1)


def test_version_1_is_saved_as_the_newest_with_the_same_tensors(tmp_path: Path) -> None:
    CompressedModel.load(V1).save(tmp_path / "again")
    about, artifacts = read_artifacts(tmp_path / "again")
    assert about["format_version"] == FORMAT_VERSION
    assert {name: digest(a.dequantize()) for name, a in artifacts.items()} == DIGESTS_V1


def test_version_2_is_read_to_the_same_values() -> None:
    about, artifacts = read_artifacts(V2)
    assert about["format_version"] == 2
    assert {name: digest(a.dequantize()) for name, a in artifacts.items()} == DIGESTS_V2


def test_the_whole_model_of_version_2() -> None:
    small = CompressedModel.load(V2)
    assert small.nbytes == NBYTES_V2
    assert small.compute == "int8"
    third = np.array(1 / 3, np.float32)
    grids = [
        ActivationGrid(site=("grouped.weight", 0), scale=third, offset=0 * third, bits=8, signed=True),
        ActivationGrid.from_zero_point(("blocks.weight", 0), 0.1, 77, bits=4),
        ActivationGrid(
            site=("scores", -1), scale=third, offset=np.asarray(-third / 4, np.float32), bits=2, signed=False
        ),
    ]
    assert small.activations == {grid.site: grid for grid in grids}
    wanted = [[-12266.979, 6386.2637], [-9330.684, 4854.63], [-8700.389, 4525.8535]]
    decoded = small.program.with_state({name: a.dequantize() for name, a in small.artifacts.items()})
    np.testing.assert_allclose(decoded.run({"x": X})["scores"], wanted, rtol=1e-5)


def test_version_3_is_read_to_the_same_values() -> None:
    about, artifacts = read_artifacts(V3)
    assert about["format_version"] == 3
    assert {name: digest(a.dequantize()) for name, a in artifacts.items()} == DIGESTS_V3
    assert artifacts["halves.weight"].to_arrays()[0]["lut"].dtype == np.float16


def test_the_whole_model_of_version_3() -> None:
    small = CompressedModel.load(V3)
    assert small.nbytes == NBYTES_V3
    wanted = [
        [-3798.4448, -4104.617, 1408.4027, 7553.0234],
        [-2891.5078, -3124.5767, 1071.3969, 5745.718],
        [-2696.8286, -2914.205, 999.0563, 5357.7686],
    ]
    decoded = small.program.with_state({name: a.dequantize() for name, a in small.artifacts.items()})
    np.testing.assert_allclose(decoded.run({"x": X})["scores"], wanted, rtol=1e-5)


@pytest.mark.parametrize(("old", "wanted"), [(V2, DIGESTS_V2), (V3, DIGESTS_V3), (V4, DIGESTS_V3)])
def test_older_versions_are_saved_as_the_newest_with_the_same_values(
    tmp_path: Path, old: Path, wanted: dict[str, str]
) -> None:
    before = CompressedModel.load(old)
    before.save(tmp_path / "again")
    after = CompressedModel.load(tmp_path / "again")
    assert read_artifacts(tmp_path / "again")[0]["format_version"] == FORMAT_VERSION
    assert {name: digest(a.dequantize()) for name, a in after.artifacts.items()} == wanted
    assert stored_grids(after) == stored_grids(before)


def test_version_4_has_grids_with_thresholds() -> None:
    about, artifacts = read_artifacts(V4)
    assert about["format_version"] == 4
    assert {name: digest(a.dequantize()) for name, a in artifacts.items()} == DIGESTS_V3
    small, before = CompressedModel.load(V4), CompressedModel.load(V3)
    assert small.nbytes == NBYTES_V4
    *uniform, grid = small.activations.values()
    assert uniform == list(before.activations.values())
    assert isinstance(grid, ThresholdGrid)
    assert (grid.site, grid.bits, grid.levels) == (("scaled.weight", 0), 2, 3)
    assert (grid.zero_point, float(grid.offset)) == (0, 0.0)
    np.testing.assert_array_equal(grid.thresholds, np.sort(np.sin([1, 2, 3])).astype(np.float32))
    assert grid.scale == np.float32(1 / 3)


def test_the_report_lists_the_activation_grids() -> None:
    assert CompressedModel.load(V4).report()["activations"][1:] == [
        {
            "kind": "even", "site": ["blocks.weight", 0], "scale": float(np.float32(0.1)), "zero_point": 77,
            "offset": float(np.float32(-77) * np.float32(0.1)), "bits": 4, "signed": False,
        },
        {
            "kind": "even", "site": ["scores", -1], "scale": float(np.float32(1 / 3)), "zero_point": None,
            "offset": float(-np.float32(1 / 3) / 4), "bits": 2, "signed": False,
        },
        {
            "kind": "thresholds", "site": ["scaled.weight", 0], "scale": float(np.float32(1 / 3)), "zero_point": 0,
            "offset": 0.0, "bits": 2,
            "thresholds": np.sort(np.sin([1, 2, 3])).astype(np.float32).tolist(),
        },
    ]  # fmt: skip


def test_what_is_read_is_written_again_to_the_same_bytes(tmp_path: Path) -> None:
    CompressedModel.load(V5).save(tmp_path / "again")
    for name in ("weights.safetensors", "plan.toml", "report.json"):
        assert (tmp_path / "again" / name).read_bytes() == (V5 / name).read_bytes()
    with pytest.raises(OutputError, match=r"again exists: name another folder, or remove it first\.$"):
        CompressedModel.load(V5).save(tmp_path / "again")


def test_version_5_names_the_kinds_of_its_grids() -> None:
    header, artifacts = read_artifacts(V5)
    assert header["format_version"] == 5
    assert [grid["kind"] for grid in header["activations"]] == ["even", "even", "even", "thresholds"]
    assert {name: digest(a.dequantize()) for name, a in artifacts.items()} == DIGESTS_V3
    assert stored_grids(CompressedModel.load(V5)) == stored_grids(CompressedModel.load(V4))


def test_a_model_that_does_not_fit_itself_is_refused() -> None:
    small = CompressedModel.load(V2)
    with pytest.raises(
        ConfigError, match=r"^CompressedModel\.compute must be one of float, int8, dynamic8, got 'int4'\.$"
    ):
        replace(small, compute="int4")  # type: ignore[arg-type]
    grid = small.activations["scores", -1]
    with pytest.raises(
        ConfigError,
        match=r"^CompressedModel\.activations must hold each grid under its site, \('scores', -1\), got \('x', 0\)\.$",
    ):
        replace(small, activations={("x", 0): grid})


def test_a_newer_format_says_so(folder: Path) -> None:
    edit_header(folder, lambda about: about.update(format_version=FORMAT_VERSION + 1))
    message = r"small has format 6, this version reads 1, 2, 3, 4, 5: use a newer qcompress\.$"
    with pytest.raises(SourceError, match=message):
        read_artifacts(folder)
    with pytest.raises(SourceError, match=message):
        load_source(folder).program(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", [0, -1, "one", None, [1], {}])
def test_a_format_that_there_is_not(folder: Path, version: object) -> None:
    edit_header(folder, lambda about: about.update(format_version=version))
    with pytest.raises(SourceError):
        read_artifacts(folder)


@pytest.mark.parametrize("name", ["weights.safetensors", "program.pt2", "plan.toml"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text"])
def test_a_damaged_member(folder: Path, name: str, damage: str) -> None:
    path = folder / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": data[: len(data) * 2 // 3], "text": b"[hello"}[damage])
    if (name, damage) == ("plan.toml", "cut"):
        path.write_bytes(data[:-5])  # else what is left is a plan
    with pytest.raises((SourceError, ConfigError), match=r"small/"):
        CompressedModel.load(folder)


def test_a_program_of_another_model(folder: Path, tmp_path: Path) -> None:
    edit_header(folder, lambda about: about["artifacts"].pop("across.weight"))
    with pytest.raises(SourceError, match=r"do not belong together: across\.weight is in only one of them\.$"):
        CompressedModel.load(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda about: about.pop("activations"), r"a field of its header is missing or invalid\.$"),
        (lambda about: about.update(activations=[None]), r"a field of its header is missing or invalid\.$"),
        (lambda about: about.update(compute="int4"), r"a field of its header is missing or invalid\.$"),
        (lambda about: about.update(compute=["int8"]), r"a field of its header is missing or invalid\.$"),
        (lambda about: about["activations"][0].update(bits=9), r"bits must be in \[1, 8\], got 9\.$"),
        (lambda about: about["activations"][0].update(scale=-0.5), r"scale must be finite and above 0, got -0\.5\.$"),
        (
            lambda about: about["activations"][3].update(thresholds=[0.5, 0.25, 1.0]),
            r"must be finite and ascend, got .*",
        ),
        (lambda about: about["activations"][3].update(thresholds=[0.5, "1", 2.0]), r"must be stored as floats, got .*"),
        (lambda about: about["activations"][3].update(thresholds=[float("nan")] * 3), r"must be finite and ascend, .*"),
        (lambda about: about["activations"][3].update(bits=3), r"must be float32 \[7\] at 3 bits, got float32 \[3\]\."),
        (lambda about: about["activations"][3].update(scale=0.0), r"scale must be finite and above 0, got 0\.0\."),
        (lambda about: about["activations"][3].pop("thresholds"), r"thresholds must be stored as list, got None\."),
        (lambda about: about["activations"][0].pop("signed"), r"signed must be stored as bool, got None\.$"),
        (
            lambda about: about["activations"].append(about["activations"][0]),
            r"every activation grid must have its own site\.$",
        ),
    ],
)
def test_damaged_activation_grids(folder: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    edit_header(folder, edit)
    with pytest.raises(SourceError, match=rf"weights\.safetensors is damaged: .*{message}"):
        read_artifacts(folder)


def mutations(about: dict[str, Any], chance: random.Random) -> None:
    """One value of the header replaced by another, or a key left out."""
    parents: list[tuple[Any, Any]] = []
    stack: list[Any] = [about]
    while stack:
        value = stack.pop()
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        parents += [(value, key) for key in keys]
        stack += [value[key] for key in keys if isinstance(value[key], dict | list)]
    parent, key = chance.choice(parents)
    new = chance.choice(
        [None, -1, 0, 1, 9, 1 << 62, 2.5, "x", "", [], [[-1]], [1 << 40] * 3, {}, {"a": 1}, True, "drop"]
    )
    if new == "drop":
        del parent[key]
    else:
        parent[key] = new


def test_whatever_the_header_says_values_or_a_source_error(folder: Path) -> None:
    chance = random.Random(0)
    good = (folder / "weights.safetensors").read_bytes()
    for _ in range(500):
        (folder / "weights.safetensors").write_bytes(good)
        edit_header(folder, lambda about: mutations(about, chance))
        try:
            artifacts = read_artifacts(folder)[1]
            for artifact in artifacts.values():
                artifact.dequantize()
        except SourceError:
            continue
        if chance.random() < 0.1:
            with contextlib.suppress(SourceError):
                CompressedModel.load(folder)


def test_whatever_byte_is_changed_values_or_a_source_error(folder: Path) -> None:
    chance = random.Random(1)
    path = folder / "weights.safetensors"
    good = path.read_bytes()
    for _ in range(500):
        data = bytearray(good)
        at = chance.randrange(len(data) if chance.random() < 0.3 else 3700)
        if chance.random() < 0.7:
            data[at] = chance.randrange(256)
        else:
            data[at : at + chance.randrange(20)] = bytes(chance.randrange(5))
        path.write_bytes(data)
        try:
            artifacts = read_artifacts(folder)[1]
            for artifact in artifacts.values():
                with np.errstate(over="ignore"):  # a scale may have become a large one
                    artifact.dequantize()
        except SourceError:
            pass
