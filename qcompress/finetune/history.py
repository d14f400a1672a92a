"""The history of a training run: a line per epoch, and the numbers of its quantizers; as CSV files."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

from qcompress.finetune.prepared import Prepared
from qcompress.quantizers import AbstractQuantizer
from qcompress.quantizers.positive import LearnedValues

# (epoch, tensor, what it is, number)
QuantizerRow = tuple[int, str, str, float]
QUANTIZER_COLUMNS: Final = ("epoch", "tensor", "value", "number")

_LISTED: Final = 16  # numbers of a tensor up to which they are listed one by one


@final
@dataclass(frozen=True, slots=True)
class EpochRow:
    """A line of the history.

    Args:
        epoch: counted from 1.
        step: steps that are done.
        loss: mean over the epoch, penalties included.
        task_loss: without penalties.
        rate: the learning rate of the last step, as a share of the highest.
        score: the metric on validation data, of the weights as they are stored; None without such data.
        trained_score: the metric with the weights that training computed with, where the method stores others (DKM,
            whose soft weights become hard); None elsewhere.
        error: mean over weights of the relative distance of the stored weight from the float one.
    """

    epoch: int
    step: int
    loss: float
    task_loss: float
    rate: float
    score: float | None
    trained_score: float | None
    error: float

    @property
    def numbers(self) -> list[Any]:
        """The fields, in their order."""
        return [*asdict(self).values()]


@torch.no_grad()
def quantizer_values(prepared: Prepared) -> list[tuple[str, str, float]]:
    """Returns the numbers of all quantizers that training moves: (tensor, what it is, number).

    Scales, offsets, thresholds and palettes are listed one by one, of many the mean alone; `error` is the relative
    distance of the stored weight from the float one. Regularizers may add numbers: `BinRegularizer` the loss of each
    bin.
    """
    found: list[tuple[str, str, float]] = []
    for name, quantizer in prepared.quantizers().items():
        for key, value in _values(quantizer).items():
            numbers = value.double().flatten()
            listed = numbers.tolist() if len(numbers) <= _LISTED else [float(numbers.mean())]
            few = len(listed) > 1
            found += [(name, f"{key}[{i}]" if few else key, number) for i, number in enumerate(listed)]
    found += [(name, "error", error) for name, error in prepared.errors().items()]
    for regularizer in prepared.regularizers:
        own = getattr(regularizer, "numbers", None)
        found += [] if own is None else own()
    return found


def _values(quantizer: AbstractQuantizer) -> dict[str, Tensor]:
    """Returns what training moves, by name: the values of scales and the like, not the parameters behind them."""
    learned = {name: module for name, module in quantizer.named_modules() if isinstance(module, LearnedValues)}
    values = {name.removesuffix(".value"): module() for name, module in learned.items()}
    rest = (item for item in quantizer.state_dict().items() if item[0].rpartition(".")[0] not in learned)
    return values | {key: v for key, v in rest if isinstance(v, Tensor) and v.is_floating_point()}


def csv_text(columns: Iterable[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a CSV file; None becomes an empty field.

    >>> csv_text(["a", "b"], [[1, None]])
    'a,b\\n1,\\n'
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([["" if value is None else value for value in row] for row in rows])
    return text.getvalue()
