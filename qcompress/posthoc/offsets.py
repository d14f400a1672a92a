"""Free offsets of activation grids moved onto their grids, so that integer kernels can take them as zero points.

An offset that is no multiple of the scale (LSQ+) folds exactly into the bias of an unpadded layer, and into that of no
other: padding sees none of it. There, either the activation is dequantized and the offset added in float, which is
exact, or the offset gives way: it moves by at most half a step, and the bias makes good what that changes on average.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qcompress.artifacts import ActivationGrid, FloatWeight
from qcompress.artifacts.base import Floats
from qcompress.compressed.model import CompressedModel
from qcompress.data.dataset import Dataset
from qcompress.graph.layers import Layer, bias_of, weight_layers
from qcompress.graph.program import state_nodes
from qcompress.graph.sites import OUTPUT, MarkedRunner, input_sites, mark
from qcompress.posthoc.activations import BATCH
from qcompress.posthoc.biases import in_steps

Doubles = npt.NDArray[np.float64]


@dataclass(slots=True)
class _Change:
    """How a layer's output changes when its input's offset moves, summed over the calibration data.

    Args:
        axis: of the output's channels.
        count: values of one channel.
        sum_O: of new minus old values, by channel.
        squares: of new minus old values.
        moments: sum and sum of squares of the old values.
    """

    axis: int
    count: int = 0
    totals: Doubles | None = None
    squares: float = 0.0
    moments: tuple[float, float] = (0.0, 0.0)

    def add(self, old: Floats, new: Floats) -> None:
        """Take in one batch."""
        difference, wide = new.astype(np.float64) - old, old.astype(np.float64)
        sum_O = difference.sum(axis=tuple(i for i in range(old.ndim) if i != self.axis % old.ndim))
        self.count += old.size // len(sum_O)
        self.totals = sum_O if self.totals is None else self.totals + sum_O
        self.squares += float(np.square(difference).sum())
        self.moments = self.moments[0] + float(wide.sum()), self.moments[1] + float(np.square(wide).sum())

    @property
    def means(self) -> Doubles:
        """What the output changes by on average."""
        assert self.totals is not None
        return self.totals / self.count

    def error(self, *, corrected: bool) -> float:
        """Root mean square of the change, less its mean where a bias makes that good, over the output's spread."""
        values = self.count * len(self.means)
        made_good = self.count * float(np.square(self.means).sum()) if corrected else 0.0
        variance = self.moments[1] / values - (self.moments[0] / values) ** 2
        noise = max(self.squares - made_good, 0.0) / values
        return float(np.sqrt(noise / max(variance, np.finfo(np.float64).tiny)))


def snap_offsets(
    model: CompressedModel, calibration: Dataset, sites: Iterable[tuple[str, int]] | None = None
) -> CompressedModel:
    """A model whose activation grids all have zero points, the biases of the layers behind them re-estimated.

    Args:
        model: for int8 compute; not modified.
        calibration: unlabelled inputs, on which it is seen what a moved offset changes on average.
        sites: whose offsets are moved; None: every one that no zero point stands for.

    Returns:
        The model. Its `snapped` says for the weight of each layer behind such a site what error is left at the layer's
        output: root mean square over the output's spread.

    Raises:
        DataError: the data does not fit the program.
    """
    free = {s for s in (model.activations if sites is None else sites) if model.activations[s].zero_point is None}
    if not free:
        return model
    keys = list(model.activations)
    grids = {s: g.snapped() if isinstance(g, ActivationGrid) and s in free else g for s, g in model.activations.items()}
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
            grid = grids[keys[index]]  # of what was there before: no change reaches the next layer
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
    return in_steps(replace(model, artifacts=artifacts, activations=grids, snapped=snapped))
