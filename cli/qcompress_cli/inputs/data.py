"""Opens the data files of a run."""

from typing import TYPE_CHECKING

from qcompress_cli.inputs.project import RunOptions
from qcompress_cli.terminal.console import Ui

if TYPE_CHECKING:
    from qcompress.data.dataset import Dataset


def load_inputs(spec: str, given: RunOptions, ui: Ui, option: str) -> "Dataset":
    """Load inputs, transformed as the user asked.

    Args:
        spec: value of the option.
        given: the run's options.
        ui: shows the notes of the data.
        option: what messages call the data: `--data`.

    Raises:
        DataError: the data cannot be read.
    """
    from qcompress.data.dataset import load_data

    data = load_data(spec, transform=given.transform, what=option)
    for note in data.notes:
        ui.note(note)
    return data
