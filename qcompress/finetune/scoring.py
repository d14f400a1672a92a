"""Scores a model on validation data while it trains."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch.utils import _pytree as pytree

from qcompress.data.dataset import Dataset
from qcompress.finetune.prepared import Prepared
from qcompress.graph.conversion import to_numpy, to_torch
from qcompress.graph.program import FloatProgram
from qcompress.metrics.metric import Metric

Arrays = Mapping[str, npt.NDArray[Any]]

_BATCH: Final = 256


def score(run: Callable[[Arrays], Arrays], data: Dataset, metric: Metric) -> float:
    """Returns the metric of a model on data with labels.

    Args:
        run: inputs by name -> outputs by name.
        data: the data.
        metric: the metric.
    """
    parts = [run(batch.inputs) for batch in data.batches(_BATCH)]
    outputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return float(np.mean(metric(outputs, data.labels)))


def scorer(program: FloatProgram, data: Dataset, metric: Metric, device: str) -> Callable[[Prepared], float]:
    """Returns a function that scores a prepared model, for `run.Validation`.

    Args:
        program: the model's program, which names inputs and outputs.
        data: the validation data.
        metric: the metric.
        device: where the model is.
    """

    def scored(prepared: Prepared) -> float:
        def run(arrays: Arrays) -> Arrays:
            inputs = [to_torch(values).to(device) for values in program.bind(arrays)]
            outputs = pytree.tree_leaves(prepared(**dict(zip(program.input_names, inputs, strict=True))))
            named = zip(program.output_names, outputs, strict=True)
            return {name: to_numpy(value.float()) for name, value in named if isinstance(value, torch.Tensor)}

        return score(run, data, metric)

    return scored
