"""Scores a model on validation data while it trains."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import torch
from torch.utils import _pytree as pytree

from qcompress.data.dataset import Dataset
from qcompress.finetune.prepared import Prepared
from qcompress.graph.conversion import to_numpy, to_torch
from qcompress.graph.program import FloatProgram
from qcompress.metrics.metric import Metric, compare
from qcompress.metrics.result import MetricResult
from qcompress.quantizers import AbstractQuantizer

Arrays = Mapping[str, npt.NDArray[Any]]

_BATCH: Final = 256


@final
class Scorer:
    """Compares a model in training with the original on data with labels.

    Args:
        program: the original, which names inputs and outputs.
        data: the validation data.
        metric: the metric.
        device: where the models are.

    Attributes:
        original: the metric of the original.
    """

    def __init__(self, program: FloatProgram, data: Dataset, metric: Metric, device: str) -> None:
        self._program, self._data, self._metric, self._device = program, data, metric, device
        self._outputs = self._collected(program.runner(device))
        self.original = float(np.mean(metric(self._outputs, data.labels)))

    def __call__(self, prepared: Prepared) -> MetricResult:
        """Returns the comparison; metrics that give one number over all samples have no interval in it."""
        program = self._program

        def run(arrays: Arrays) -> Arrays:
            inputs = [to_torch(values).to(self._device) for values in program.bind(arrays)]
            outputs = pytree.tree_leaves(prepared(**dict(zip(program.input_names, inputs, strict=True))))
            named = zip(program.output_names, outputs, strict=True)
            return {name: to_numpy(value.float()) for name, value in named if isinstance(value, torch.Tensor)}

        return compare(self._metric, self._outputs, self._collected(run), self._data.labels, resamples=0)

    def _collected(self, run: Callable[[Arrays], Arrays]) -> dict[str, npt.NDArray[Any]]:
        parts = [run(batch.inputs) for batch in self._data.batches(_BATCH)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def hardened(prepared: Prepared) -> list[AbstractQuantizer]:
    """Returns the quantizers whose weights `finalize` changes, as DKM's do: their soft weights become hard."""
    quantizers = prepared.quantizers()
    return [quantizers[name] for name, drop in prepared.drops().items() if drop]


@contextlib.contextmanager
def in_training(quantizers: Sequence[AbstractQuantizer]) -> Iterator[None]:
    """Lets quantizers of a model in eval mode compute as in training for a while; their state stays as it is."""
    states = [copy.deepcopy(quantizer.state_dict()) for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.train()
    try:
        yield
    finally:
        for quantizer, state in zip(quantizers, states, strict=True):
            quantizer.load_state_dict(state)
            quantizer.eval()
