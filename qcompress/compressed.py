"""A compressed model: the float program and one artifact per tensor; saved as a folder without any pickle of ours."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, final, get_args

import ml_dtypes
import numpy as np
import numpy.typing as npt
import safetensors
from safetensors.numpy import save

from qcompress.artifacts import ARTIFACTS, AnyGrid, Artifact, ThresholdGrid, bits_per_weight, grid_from_dict
from qcompress.errors import ConfigError, OutputError, SourceError
from qcompress.files import sync
from qcompress.packing import pack, unpack
from qcompress.plan import Plan, load_plan

if TYPE_CHECKING:
    import torch

    from qcompress.program import FloatProgram

# 2: int8 palettes, one scale for a whole palette, activation grids. 3: float16 palettes. 4: grids with thresholds.
FORMAT_VERSION: Final = 4
_READABLE: Final = (1, 2, 3, FORMAT_VERSION)

# What layers compute in: floats; int8 with the activation grids of the model; int8 with scales found at run time.
Compute = Literal["float", "int8", "dynamic8"]

WEIGHTS: Final = "weights.safetensors"
PLAN: Final = "plan.toml"
PROGRAM: Final = "program.pt2"
REPORT: Final = "report.json"

_KEY: Final = "qcompress"  # of our entry in the safetensors header
# How arrays of an artifact are called on disk: the tensor's name and one of these.
_SUFFIX: Final = {"codes": "_codes", "lut": "_lut", "scale": "_scale", "zero_point": "_zero_point", "": ""}


@dataclass(frozen=True, slots=True)
class LayerGain:
    """What solving a layer's weight on calibration data gained, on that data and in the net compressed so far.

    Args:
        weight: qualified name.
        nearest_db: output over noise with each weight at the nearest level, dB; None: no noise.
        solved_db: the same with what was solved, and the bias corrected.
    """

    weight: str
    nearest_db: float | None
    solved_db: float | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedModel:
    """What every method ends in, for a whole model.

    Args:
        program: the float program that the artifacts belong to (BatchNorm folded).
        artifacts: one per tensor of the program's state, by qualified name.
        plan: the plan that made them.
        source_digest: short digest of the model that came in.
        plan_digest: digest of the plan as it was resolved.
        notes: what a user should be told of how it was made.
        activations: the grids that values between layers are quantized to, by their sites.
        compute: what layers compute in: `float`, `int8` or `dynamic8`.
        saturation: share of the calibration data that each grid clips, as it was found; not saved.
        snapped: error at the output of each layer whose input's offset was moved onto the grid, over the output's
            spread, by the layer's weight; see `posthoc.offsets`.
        gains: of the layers that were solved; not saved.
        solved_on: what inputs they were solved on; empty: none; not saved.

    Raises:
        ConfigError: another `compute`, or a grid under a site that is not its own.
    """

    program: "FloatProgram"
    artifacts: Mapping[str, Artifact]
    plan: Plan
    source_digest: str
    plan_digest: str
    notes: tuple[str, ...] = ()
    activations: Mapping[tuple[str, int], AnyGrid] = field(default_factory=dict)
    compute: Compute = "float"
    saturation: Mapping[tuple[str, int], float] = field(default_factory=dict)
    snapped: Mapping[str, float] = field(default_factory=dict)
    gains: tuple[LayerGain, ...] = ()
    solved_on: str = ""

    def __post_init__(self) -> None:
        if self.compute not in get_args(Compute):
            raise ConfigError(
                f"CompressedModel.compute must be one of {', '.join(get_args(Compute))}, got {self.compute!r}."
            )
        for site, grid in self.activations.items():
            if site != grid.site:
                raise ConfigError(
                    f"CompressedModel.activations must hold each grid under its site, {grid.site}, got {site}."
                )

    @property
    def nbytes(self) -> int:
        """Ideal bytes: packed codes, tables, scales, float leftovers and activation grids."""
        return sum(a.nbytes for a in self.artifacts.values()) + sum(g.nbytes for g in self.activations.values())

    def to_module(self) -> "torch.nn.Module":
        """A plain float module that holds the dequantized weights."""
        return self.program.with_state({name: a.dequantize() for name, a in self.artifacts.items()}).module()

    def report(self) -> dict[str, Any]:
        """What `report.json` says: each tensor with its kind of artifact, bytes, and why it stayed float; each grid."""
        return {
            "format_version": FORMAT_VERSION,
            "nbytes": self.nbytes,
            "tensors": [
                {
                    "name": name,
                    "artifact": a.kind,
                    "shape": list(a.shape),
                    "nbytes": a.nbytes,
                    "bits_per_weight": round(bits_per_weight(a), 4),
                    "reason": getattr(a, "reason", None),
                }
                for name, a in self.artifacts.items()
            ],
            "compute": self.compute,
            "activations": [
                {
                    "site": list(site),
                    "scale": float(grid.scale),
                    "zero_point": grid.zero_point,
                    "offset": float(grid.offset),
                    "bits": grid.bits,
                    **({"thresholds": grid.thresholds.tolist()} if isinstance(grid, ThresholdGrid) else {}),
                }
                for site, grid in self.activations.items()
            ],
            "notes": list(self.notes),
        }

    def save(self, folder: str | Path) -> None:
        """Write the folder, whole or not at all.

        Raises:
            OutputError: it exists, or cannot be written.
        """
        import torch

        folder = Path(folder)
        if folder.exists():
            raise OutputError(f"{folder} exists: name another folder, or remove it first.")
        try:
            part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        except OSError as e:
            raise OutputError(f"{folder} cannot be written: {e.strerror}.") from None
        try:
            (part / WEIGHTS).write_bytes(self._to_safetensors())
            (part / PLAN).write_text(self.plan.to_toml(), encoding="utf-8")
            (part / REPORT).write_text(json.dumps(self.report(), indent=1) + "\n", encoding="utf-8")
            torch.export.save(self.program.without_origins().exported, part / PROGRAM)
            part.chmod(0o755)
            for written in (*part.iterdir(), part):
                sync(written)
            os.replace(part, folder)
            sync(folder.parent)
        except OSError as e:
            raise OutputError(f"{folder} cannot be written: {e.strerror}.") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _to_safetensors(self) -> bytes:
        tensors: dict[str, npt.NDArray[Any]] = {}
        header: dict[str, Any] = {}
        for name, artifact in self.artifacts.items():
            arrays, fields = artifact.to_arrays()
            shapes = {}
            for key, array in arrays.items():
                if key == "codes":
                    shapes[key] = list(array.shape)
                    array = pack(array, fields["bits"])
                tensors[name + _SUFFIX[key]] = np.array(array, order="C")
            header[name] = {"kind": artifact.kind, "fields": fields, "codes_shape": shapes.get("codes")}
        about = {
            "format_version": FORMAT_VERSION,
            "artifacts": header,
            "source_digest": self.source_digest,
            "plan_digest": self.plan_digest,
            "input_names": list(self.program.input_names),
            "output_names": list(self.program.output_names),
            "dynamic": [[name, axis, label] for (name, axis), label in self.program.dynamic.items()],
            "notes": list(self.notes),
            "activations": [grid.as_dict() for grid in self.activations.values()],
            "compute": self.compute,
            "snapped": dict(self.snapped),
        }
        return save(tensors, {_KEY: json.dumps(about)})

    @classmethod
    def load(cls, folder: str | Path) -> "CompressedModel":
        """Read a folder that `save` wrote. Nothing in it is executed.

        Args:
            folder: the folder.

        Raises:
            SourceError: not such a folder, damaged, or of a newer format.
        """
        from qcompress.program import FloatProgram
        from qcompress.sources.exported_program import load_exported

        folder = Path(folder)
        about, artifacts = read_artifacts(folder)
        exported = load_exported(folder / PROGRAM)
        signature = exported.graph_signature
        if (len(about["input_names"]), len(about["output_names"])) != (
            len(signature.user_inputs),
            len(signature.user_outputs),
        ):
            raise SourceError(f"{folder}: {WEIGHTS} names other inputs or outputs than {PROGRAM} has.")
        program = FloatProgram(
            exported,
            tuple(about["input_names"]),
            tuple(about["output_names"]),
            {(name, axis): label for name, axis, label in about["dynamic"]},
        )
        unknown = sorted(set(program.state()) ^ set(artifacts))
        if unknown:
            raise SourceError(
                f"{folder}: {WEIGHTS} and {PROGRAM} do not belong together: {unknown[0]} is in one alone."
            )
        for name, value in program.state().items():
            if tuple(value.shape) != artifacts[name].shape:
                raise SourceError(
                    f"{folder}: {name} must have shape {list(value.shape)} as in {PROGRAM}, got "
                    f"{list(artifacts[name].shape)}: the folder was put together from two."
                )
        return cls(
            program=program,
            artifacts={name: artifacts[name] for name in program.state()},
            plan=load_plan(folder / PLAN),
            source_digest=about["source_digest"],
            plan_digest=about["plan_digest"],
            notes=tuple(about["notes"]),
            activations=_activations(about),
            compute=about["compute"],
            snapped=about["snapped"],
        )


def read_artifacts(folder: Path) -> tuple[dict[str, Any], dict[str, Artifact]]:
    """The artifacts of a saved folder, without its program: numpy only.

    Returns:
        What the header says of the model, and the artifacts by name.

    Raises:
        SourceError: damaged, or of a format that this version does not read.
    """
    path = folder / WEIGHTS
    try:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        about = json.loads(header["__metadata__"][_KEY])
        version = int(about["format_version"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise SourceError(f"{path} is not the weights file of a compressed model: save it again.") from None
    if version not in _READABLE:
        raise SourceError(
            f"{folder} has format {version}, this version reads {', '.join(map(str, _READABLE))}: "
            + ("use a newer qcompress." if version > FORMAT_VERSION else "save it again with the version before.")
        )
    if version == 1:
        about |= {"activations": [], "compute": "float", "snapped": {}}
    if not _complete(about):
        raise SourceError(f"{path} is damaged: its header lacks what the format holds.")
    try:
        _activations(about)
        stored = {name: _array(entry) for name, entry in safetensors.deserialize(data)}  # type: ignore[no-untyped-call]
        artifacts = {name: _artifact(name, entry, stored) for name, entry in about["artifacts"].items()}
    except (ValueError, LookupError, TypeError, OverflowError, safetensors.SafetensorError, ConfigError) as e:
        reason = e.args[0] if isinstance(e, ConfigError) else "an array is missing or does not fit"
        raise SourceError(f"{path} is damaged: {reason}") from None
    return about, artifacts


def _complete(about: Mapping[str, Any]) -> bool:
    """Whether the header has every field of the format, each of its type."""
    dynamic = about.get("dynamic")
    return (
        isinstance(about.get("artifacts"), dict)
        and all(isinstance(about.get(key), str) for key in ("source_digest", "plan_digest"))
        and all(_is_texts(about.get(key)) for key in ("input_names", "output_names", "notes"))
        and isinstance(dynamic, list)
        and all(isinstance(d, list) and [type(v) for v in d] == [str, int, str] for d in dynamic)
        and isinstance(about.get("activations"), list)
        and all(isinstance(grid, dict) for grid in about["activations"])
        and about.get("compute") in get_args(Compute)
        and isinstance(about.get("snapped"), dict)
        and all(type(error) is float for error in about["snapped"].values())
    )


def _activations(about: Mapping[str, Any]) -> dict[tuple[str, int], AnyGrid]:
    """The activation grids of a header by site; ConfigError for what is none, or two at one site."""
    grids = [grid_from_dict(fields) for fields in about["activations"]]
    sites = {grid.site: grid for grid in grids}
    if len(sites) < len(grids):
        raise ConfigError("every activation grid must have a site of its own.")
    return sites


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _artifact(name: str, entry: Mapping[str, Any], stored: Mapping[str, npt.NDArray[Any]]) -> Artifact:
    fields = entry["fields"]
    numbers = ("bits", "axis", "block_size", "rows_per_lut")
    if not isinstance(fields, dict) or any(type(fields.get(key)) not in (int, type(None)) for key in numbers):
        raise TypeError(name)  # True is an int to Python, and none to numpy
    arrays = {key: stored[name + suffix] for key, suffix in _SUFFIX.items() if name + suffix in stored}
    if entry["codes_shape"] is not None:
        arrays.pop("", None)
        shape = tuple(entry["codes_shape"])
        arrays["codes"] = unpack(arrays["codes"], fields["bits"], int(np.prod(shape))).reshape(shape)
    return ARTIFACTS[entry["kind"]].from_arrays(arrays, fields)


_DTYPES: Final = {
    "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip


def _array(entry: Mapping[str, Any]) -> npt.NDArray[Any]:
    return np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
