"""Checkpoints of a training run: one safetensors file each, written whole or not at all; no pickle."""

import contextlib
import json
from pathlib import Path
from typing import Any, Final, final

import safetensors
from safetensors.torch import save
from torch import Tensor

from qcompress.errors import OutputError, SourceError
from qcompress.files import write_whole
from qcompress.finetune.trainer import TrainingState

_KEY: Final = "qcompress"  # key of our entry in the safetensors header
_STEM: Final = "step-"


@final
class Checkpoints:
    """The checkpoints in a folder.

    Args:
        folder: is made by the first `write`.
        keep: how many of the last ones stay.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self._folder, self._keep = folder, keep

    def write(self, state: TrainingState) -> None:
        """Writes a checkpoint, and removes those that are too old.

        Raises:
            OutputError: it cannot be written. Earlier ones stay as they are.
        """
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as e:
            raise OutputError(f"{self._folder} cannot be written: {e.strerror}.") from None
        path = self._folder / f"{_STEM}{state.values['step']:09d}.safetensors"
        write_whole(path, save(state.tensors, {_KEY: json.dumps(state.values)}))
        for old in self._paths()[self._keep :]:
            with contextlib.suppress(OSError):
                old.unlink()

    def latest(self) -> TrainingState | None:
        """Returns the last checkpoint that can be read; None: there is none yet.

        Raises:
            SourceError: there are checkpoints, but none can be read.
        """
        paths = self._paths()
        for path in paths:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
                return _read(path)
        if paths:
            raise SourceError(f"{paths[0]} is damaged, and so are older checkpoints; start over in another folder.")
        return None

    def _paths(self) -> list[Path]:
        """Returns the files, the newest first."""
        return sorted(self._folder.glob(f"{_STEM}*.safetensors"), reverse=True)


def _read(path: Path) -> TrainingState:
    with safetensors.safe_open(path, "pt") as file:
        values: dict[str, Any] = json.loads(file.metadata()[_KEY])
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not isinstance(values["step"], int) or not isinstance(values["total"], int):
        raise TypeError(path)
    return TrainingState(tensors, values)
