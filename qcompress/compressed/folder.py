"""The folder of a compressed model: packed arrays, plan, program and report. It holds no pickle.

`read_artifacts` reads the weights and needs numpy only.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import ml_dtypes
import numpy as np
import numpy.typing as npt
import safetensors
from safetensors.numpy import save

from qcompress.artifacts import ARTIFACTS, Artifact, SiteGrid
from qcompress.artifacts.packing import pack, unpack
from qcompress.artifacts.tables import grid_from_dict
from qcompress.deployment import Compute
from qcompress.errors import ConfigError, OutputError, SourceError
from qcompress.files import half_written, read_plain, sync
from qcompress.user_code import causes, one_line

if TYPE_CHECKING:
    from qcompress.graph.program import FloatProgram

# 2: int8 palettes, one scale for a whole palette, activation grids. 3: float16 palettes. 4: grids with thresholds.
# 5: grids name their kind.
FORMAT_VERSION: Final = 5
_READABLE: Final = (1, 2, 3, 4, FORMAT_VERSION)

WEIGHTS: Final = "weights.safetensors"
PLAN: Final = "plan.toml"
PROGRAM: Final = "program.pt2"
REPORT: Final = "report.json"

_KEY: Final = "qcompress"  # key of our entry in the safetensors header
# The suffix that each array of an artifact adds to the tensor's name on disk.
_SUFFIX: Final = {"codes": "_codes", "lut": "_lut", "scale": "_scale", "zero_point": "_zero_point", "": ""}


def write_folder(
    folder: Path, *, weights: bytes, plan: str, report: Mapping[str, Any], program: "FloatProgram"
) -> None:
    """Write the folder of a compressed model, whole or not at all.

    Args:
        folder: must not exist.
        weights: from `pack_artifacts`.
        plan: the plan as TOML.
        report: the content of `report.json`, which JSON can hold.
        program: the float program.

    Raises:
        OutputError: the folder exists, or cannot be written.
        SourceError: the program cannot be saved.
    """
    if folder.exists():
        raise OutputError(f"{folder} exists: name another folder, or remove it first.")
    try:
        with half_written(folder) as part:
            (part / WEIGHTS).write_bytes(weights)
            (part / PLAN).write_text(plan, encoding="utf-8")
            (part / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            save_program(program, part / PROGRAM)
            part.chmod(0o755)
            for written in (*part.iterdir(), part):
                sync(written)
            os.replace(part, folder)
            sync(folder.parent)
    except OSError as e:
        raise OutputError(f"{folder} cannot be written: {e.strerror}.") from None


def save_program(program: "FloatProgram", path: Path) -> None:
    """Write a program to a `.pt2` file.

    Raises:
        OSError: it cannot be written.
        SourceError: torch cannot save such a program.
    """
    import torch

    try:
        torch.export.save(program.exported, path)
    except OSError:
        raise
    except Exception as e:
        raise SourceError(
            f"torch.export.save cannot save the model's program: {one_line(causes(e)[-1])}. Export it to a file, which "
            "needs no saved program, or write that part of the model with tensors alone."
        ) from e


def pack_artifacts(artifacts: Mapping[str, Artifact], header: Mapping[str, Any]) -> bytes:
    """Return the bytes of a safetensors file that holds artifacts.

    Args:
        artifacts: by qualified name.
        header: further fields of the model, which JSON can hold; `read_artifacts` returns them.
    """
    tensors: dict[str, npt.NDArray[Any]] = {}
    entries: dict[str, Any] = {}
    for name, artifact in artifacts.items():
        arrays, fields = artifact.to_arrays()
        shapes = {}
        for key, array in arrays.items():
            if key == "codes":
                shapes[key] = list(array.shape)
                array = pack(array, fields["bits"])
            tensors[name + _SUFFIX[key]] = np.array(array, order="C")
        entries[name] = {"kind": artifact.kind, "fields": fields, "codes_shape": shapes.get("codes")}
    return save(tensors, {_KEY: json.dumps({"format_version": FORMAT_VERSION, "artifacts": entries, **header})})


def read_artifacts(folder: Path) -> tuple[dict[str, Any], dict[str, Artifact]]:
    """Read the artifacts of a saved folder, without its program; needs numpy only.

    Returns:
        The fields of the header, and the artifacts by name.

    Raises:
        SourceError: the folder is damaged, or has a format that this version does not read.
    """
    path = folder / WEIGHTS
    try:
        data = read_plain(path)
        length = int.from_bytes(data[:8], "little")
        file_header = json.loads(data[8 : 8 + length])
        header = json.loads(file_header["__metadata__"][_KEY])
        version = int(header["format_version"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise SourceError(f"{path} is not the weights file of a compressed model: save it again.") from None
    if version not in _READABLE:
        raise SourceError(
            f"{folder} has format {version}, this version reads {', '.join(map(str, _READABLE))}: "
            + ("use a newer qcompress." if version > FORMAT_VERSION else "save it again with the previous version.")
        )
    if version == 1:
        header |= {"activations": [], "compute": "float", "snapped": {}}
    if not _complete(header):
        raise SourceError(f"{path} is damaged: a field of its header is missing or invalid.")
    try:
        activations_of(header)
        stored = {name: _array(entry) for name, entry in safetensors.deserialize(data)}  # type: ignore[no-untyped-call]
        artifacts = {name: _artifact(name, entry, stored) for name, entry in header["artifacts"].items()}
    except (ValueError, LookupError, TypeError, OverflowError, safetensors.SafetensorError, ConfigError) as e:
        reason = e.args[0] if isinstance(e, ConfigError) else "an array is missing or does not fit"
        raise SourceError(f"{path} is damaged: {reason}") from None
    return header, artifacts


def read_program(folder: Path, header: Mapping[str, Any], artifacts: Mapping[str, Artifact]) -> "FloatProgram":
    """Read the float program of a saved folder.

    Args:
        folder: the folder.
        header: from `read_artifacts`.
        artifacts: from `read_artifacts`.

    Raises:
        SourceError: the program is damaged, or does not belong to the artifacts.
    """
    from qcompress.graph.in_place import out_of_place
    from qcompress.graph.program import FloatProgram
    from qcompress.sources.pt2.archive import load_exported

    exported = out_of_place(load_exported(folder / PROGRAM))
    signature = exported.graph_signature
    if (len(header["input_names"]), len(header["output_names"])) != (
        len(signature.user_inputs),
        len(signature.user_outputs),
    ):
        raise SourceError(f"{folder}: {WEIGHTS} names other inputs or outputs than {PROGRAM} has.")
    program = FloatProgram(
        exported,
        tuple(header["input_names"]),
        tuple(header["output_names"]),
        {(name, axis): label for name, axis, label in header["dynamic"]},
    )
    unknown = sorted(set(program.state()) ^ set(artifacts))
    if unknown:
        raise SourceError(
            f"{folder}: {WEIGHTS} and {PROGRAM} do not belong together: {unknown[0]} is in only one of them."
        )
    for name, value in program.state().items():
        if tuple(value.shape) != artifacts[name].shape:
            raise SourceError(
                f"{folder}: {name} must have shape {list(value.shape)} as in {PROGRAM}, got "
                f"{list(artifacts[name].shape)}: its files come from two different models."
            )
    return program


def _complete(header: Mapping[str, Any]) -> bool:
    """Return whether the header has every field of the format, each with the right type."""
    dynamic = header.get("dynamic")
    return (
        isinstance(header.get("artifacts"), dict)
        and all(isinstance(header.get(key), str) for key in ("source_digest", "plan_digest"))
        and all(_is_texts(header.get(key)) for key in ("input_names", "output_names", "notes"))
        and isinstance(dynamic, list)
        and all(isinstance(d, list) and [type(v) for v in d] == [str, int, str] for d in dynamic)
        and isinstance(header.get("activations"), list)
        and all(isinstance(grid, dict) for grid in header["activations"])
        and header.get("compute") in get_args(Compute)
        and isinstance(header.get("snapped"), dict)
        and all(type(error) is float for error in header["snapped"].values())
    )


def activations_of(header: Mapping[str, Any]) -> dict[tuple[str, int], SiteGrid]:
    """Return the activation grids of a header by site.

    Raises:
        ConfigError: an entry is not a grid, or two grids have the same site.
    """
    grids = [grid_from_dict(fields) for fields in header["activations"]]
    sites = {grid.site: grid for grid in grids}
    if len(sites) < len(grids):
        raise ConfigError("every activation grid must have its own site.")
    return sites


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _artifact(name: str, entry: Mapping[str, Any], stored: Mapping[str, npt.NDArray[Any]]) -> Artifact:
    fields = entry["fields"]
    numbers = ("bits", "axis", "block_size", "rows_per_lut")
    if not isinstance(fields, dict) or any(type(fields.get(key)) not in (int, type(None)) for key in numbers):
        raise TypeError(name)  # Python counts True as an int, numpy does not
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
