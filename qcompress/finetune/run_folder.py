"""The folder of a training run: what began it, its compressed model, and the names of its files."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import torch

from qcompress.compressed.folder import PLAN, PROGRAM, REPORT, WEIGHTS, save_program
from qcompress.errors import ConfigError, OutputError
from qcompress.files import half_written, read_plain, sync, write_whole
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


def start_folder(folder: Path, run: Mapping[str, Any]) -> None:
    """Makes the folder of a run, or checks that a run to go on with is the same.

    Args:
        folder: of the run; missing, empty, or of the same run.
        run: what decides the result, which JSON can hold.

    Raises:
        ConfigError: another run is there.
        OutputError: the folder cannot be made or read.
    """
    path = folder / RUN
    if path.exists():
        try:
            old = json.loads(read_plain(path))
        except (OSError, ValueError):
            raise OutputError(f"{path} cannot be read; name another folder by -o.") from None
        kept = old if isinstance(old, dict) else {}
        for key, value in run.items():
            if kept.get(key) != value:
                was, now = _changed(kept.get(key), value)
                raise ConfigError(
                    f"--resume needs the command that started the run in {folder}: {key} was {was}, now it is {now}. "
                    "Use the same, or name another folder by -o."
                )
        _sweep(folder)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
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
        save_program(trained, part / FLOAT)
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
    try:
        with half_written(folder / "model") as part:
            yield part
    except OSError as e:
        raise OutputError(f"{folder} cannot be written: {e.strerror}.") from None


def _changed(old: object, new: object) -> tuple[str, str]:
    """Returns two values as text; of texts of many lines, the first lines that differ.

    >>> _changed("a = 1\\nb = 2", "a = 1\\nb = 3"), _changed(0, None)
    (('b = 2', 'b = 3'), ('0', 'null'))
    """
    if isinstance(old, str) and isinstance(new, str):
        lines = zip_longest(old.splitlines(), new.splitlines(), fillvalue="unset")
        old, new = next(((a, b) for a, b in lines if a != b), (old, new))
    return _shown(old), _shown(new)


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
