"""The folder of a training run: what began it, its compressed model, and the names of its files."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from qcompress.compressed.folder import PLAN, PROGRAM, REPORT, WEIGHTS
from qcompress.errors import ConfigError, OutputError
from qcompress.files import sync, write_whole
from qcompress.finetune.prepared import Prepared

TRAINING: Final = "training"  # folder of the checkpoints
RUN: Final = "run.json"
FLOAT: Final = "model.pt2"
STATE: Final = "state.pt"
HISTORY: Final = "history.csv"
QUANTIZERS: Final = "quantizers.csv"

# Files and folders on their way there, as `_part_of` and `write_whole` name them.
_BEGUN: Final = (".model.*", ".*.json.*", ".*.csv.*", ".*.svg.*", f"{TRAINING}/.*")
_SHOWN: Final = 60  # characters of a value in a message


def start_folder(folder: Path, run: Mapping[str, Any], *, resume: bool) -> None:
    """Makes the folder of a run, or checks that a run to go on with is the same.

    Args:
        folder: of the run.
        run: what decides the result, which JSON can hold.
        resume: whether a run may be there already.

    Raises:
        ConfigError: another run is there.
        OutputError: the folder cannot be made, or holds something else.
    """
    path = folder / RUN
    if path.exists():
        if not resume:
            raise OutputError(
                f"{folder} holds a training run: go on with it by --resume, or name another folder by -o."
            )
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise OutputError(f"{path} cannot be read; name another folder by -o.") from None
        for key, value in run.items():
            if not isinstance(old, dict) or old.get(key) != value:
                was = old.get(key) if isinstance(old, dict) else None
                raise ConfigError(
                    f"--resume needs the command that started the run in {folder}: {key} was {_shown(was)}, now it is "
                    f"{_shown(value)}; use the same, or name another folder by -o."
                )
        _sweep(folder)
        return
    if folder.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise OutputError(f"{folder} exists and holds no training run: name another folder by -o.")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as e:
        raise OutputError(f"{folder} cannot be made: {e.strerror}. Name another folder by -o.") from None
    write_whole(path, (json.dumps(run, indent=1) + "\n").encode())


def write_compressed(prepared: Prepared, folder: Path) -> None:
    """Writes the compressed model into an existing folder, file by file, its weights last.

    All models of a run have the same program and plan, so that files of two of them fit each other.

    Raises:
        OutputError: it cannot be written.
    """
    with _part_of(folder) as part:
        prepared.finalize().save(part / "model")
        for name in (PROGRAM, PLAN, REPORT, WEIGHTS):
            os.replace(part / "model" / name, folder / name)


def write_float(prepared: Prepared, folder: Path) -> None:
    """Writes the trained float model into an existing folder: `model.pt2`, and `state.pt`, its state dict.

    Raises:
        OutputError: it cannot be written.
    """
    small = prepared.finalize()
    trained = small.program.with_state({name: a.dequantize() for name, a in small.artifacts.items()})
    with _part_of(folder) as part:
        torch.save(prepared.model.state_dict(), part / STATE)
        torch.export.save(trained.exported, part / FLOAT)
        for name in (STATE, FLOAT):
            sync(part / name)
            os.replace(part / name, folder / name)


def _sweep(folder: Path) -> None:
    """Removes what a killed run left half written."""
    for part in (found for name in _BEGUN for found in folder.glob(name)):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                part.unlink()


@contextlib.contextmanager
def _part_of(folder: Path) -> Iterator[Path]:
    """Yields a new folder inside one, for files on their way there; it is removed afterwards."""
    part: Path | None = None
    try:
        part = Path(tempfile.mkdtemp(prefix=".model.", dir=folder))
        yield part
    except OSError as e:
        raise OutputError(f"{folder} cannot be written: {e.strerror}.") from None
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
