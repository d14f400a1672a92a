"""Move free offsets of activation grids onto the grid, so that integer kernels can take them as zero points.

An offset that is not a multiple of the scale (LSQ+) folds exactly into the bias of an unpadded layer. It does not fold
into the bias of a padded one, since the padding has no offset. There are two ways out: the activation is dequantized
and the offset added in float, which is exact; or the offset moves by at most half a step, and the bias compensates for
the mean of what that changes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qcompress.artifacts import FloatWeight
from qcompress.artifacts.base import Floats
from qcompress.compressed.model import CompressedModel
from qcompress.data.dataset import Dataset
from qcompress.graph.layers import Layer, bias_of, weight_layers
from qcompress.graph.marks import MarkedRunner, input_sites, mark
from qcompress.graph.program import state_nodes
from qcompress.graph.sites import OUTPUT
from qcompress.posthoc.activations import BATCH

Doubles = npt.NDArray[np.float64]


@dataclass(slots=True)
class _Change:
    """The change of a layer's output when its input's offset moves, summed over the calibration data.

    Args:
        axis: the output's axis of channels.
        count: number of values per channel.
        totals: float64 [O], sum of new minus old values; None before the first batch.
        squares: sum of squares of new minus old values.
        moments: sum and sum of squares of the old values.
    """

    axis: int
    count: int = 0
    totals: Doubles | None = None
    squares: float = 0.0
    moments: tuple[float, float] = (0.0, 0.0)

    def add(self, old: Floats, new: Floats) -> None:
        """Add one batch.

        Args:
            old: the output with the free offset, float32.
            new: the output with the moved offset, float32.
        """
        difference, wide = new.astype(np.float64) - old, old.astype(np.float64)
        sum_O = difference.sum(axis=tuple(i for i in range(old.ndim) if i != self.axis % old.ndim))
        self.count += old.size // len(sum_O)
        self.totals = sum_O if self.totals is None else self.totals + sum_O
        self.squares += float(np.square(difference).sum())
        self.moments = self.moments[0] + float(wide.sum()), self.moments[1] + float(np.square(wide).sum())

    @property
    def means(self) -> Doubles:
        """Mean change of the output, float64 [O]."""
        assert self.totals is not None
        return self.totals / self.count

    def error(self, *, corrected: bool) -> float:
        """Return the root mean square of the change over the output's standard deviation.

        Args:
            corrected: whether a bias compensates for the mean change.
        """
        values = self.count * len(self.means)
        compensated = self.count * float(np.square(self.means).sum()) if corrected else 0.0
        variance = self.moments[1] / values - (self.moments[0] / values) ** 2
        noise = max(self.squares - compensated, 0.0) / values
        return float(np.sqrt(noise / max(variance, np.finfo(np.float64).tiny)))


def snap_offsets(
    model: CompressedModel, calibration: Dataset, sites: Iterable[tuple[str, int]] | None = None
) -> CompressedModel:
    """Return a model whose activation grids have zero points, with the biases of the affected layers corrected.

    Args:
        model: for int8 compute; not modified.
        calibration: unlabelled inputs, on which the mean effect of a moved offset is measured.
        sites: the sites whose offsets move; None: all that have free offsets.

    Returns:
        The model. Its `snapped` holds the error that is left at the output of each affected layer, by the layer's
        weight: root mean square over the output's standard deviation.

    Raises:
        DataError: the data does not fit the program.
    """
    free = {s for s in (model.activations if sites is None else sites) if model.activations[s].zero_point is None}
    if not free:
        return model
    keys = list(model.activations)
    grids = {s: g.snapped() if s in free else g for s, g in model.activations.items()}
    inputs = input_sites(mark(model.program, keys))
    behind: dict[str, Layer] = {
        name: layer
        for name, layer in weight_layers(model.program).items()
        if name in inputs and keys[inputs[name]] in free
    }
    watched = mark(
        model.program.with_state({name: a.dequantize() for name, a in model.artifacts.items()}),
        [*keys, *((layer.node.name, OUTPUT) for layer in behind.values())],
    )
    changes = {name: _Change(-1 if layer.kind == "linear" else 1) for name, layer in behind.items()}
    names, runner = list(behind), MarkedRunner(watched)
    for batch in calibration.batches(model.program.fixed_batch or BATCH):
        values: dict[int, Floats] = {}

        def before(index: int, value: Floats, first: bool, values: dict[int, Floats] = values) -> Floats:
            if first:
                values[index] = value
            if not first or index >= len(keys):
                return value
            grid = model.activations[keys[index]]
            return grid.dequantize(grid.quantize(value))

        def after(index: int, value: Floats, first: bool, values: dict[int, Floats] = values) -> Floats:
            if index >= len(keys):
                if first:
                    changes[names[index - len(keys)]].add(values[index], value)
                return value
            grid = grids[keys[index]]  # of the old value: no change reaches the next layer
            return grid.dequantize(grid.quantize(values[index])) if first else value

        runner(batch.inputs, before)
        runner(batch.inputs, after)

    artifacts, state, snapped = dict(model.artifacts), state_nodes(model.program.exported), dict(model.snapped)
    for name, layer in behind.items():
        bias = bias_of(layer.node)
        corrected = bias is not None and bias in state
        if bias is not None and corrected:
            values_O = artifacts[state[bias]].dequantize() - changes[name].means
            artifacts[state[bias]] = FloatWeight(values=values_O.astype(np.float32), reason="not a weight")
        snapped[name] = changes[name].error(corrected=corrected)
    return replace(model, artifacts=artifacts, activations=grids, snapped=snapped)
