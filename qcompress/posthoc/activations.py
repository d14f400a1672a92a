"""Activation grids without training: run the program over calibration batches and observe its sites."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from qcompress.artifacts import ActivationGrid, SiteGrid
from qcompress.artifacts.base import Floats
from qcompress.data.dataset import Dataset
from qcompress.errors import DataError
from qcompress.graph.marks import MarkedRunner, input_sites, mark
from qcompress.graph.program import FloatProgram
from qcompress.graph.sites import Site
from qcompress.posthoc.calibration import choose_grid, saturation, sqnr_db
from qcompress.posthoc.histogram import Observer
from qcompress.posthoc.settings import DEFAULTS, PosthocSettings
from qcompress.progress import ON_CPU, Execution

BATCH: Final = 32  # samples


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The result of calibration for one site.

    Args:
        grid: the grid.
        saturation: share of the observed values that the grid clips, 0 to 1.
        sqnr_db: signal-to-quantization-noise ratio on the observed values; infinite if all are 0.
    """

    grid: ActivationGrid
    saturation: float
    sqnr_db: float


def calibrate(
    program: FloatProgram,
    sites: Sequence[Site],
    data: Dataset,
    settings: PosthocSettings = DEFAULTS,
    execution: Execution = ON_CPU,
) -> list[Calibrated]:
    """Return grids for the sites of a program, chosen from its values on calibration inputs.

    Args:
        program: the program to deploy, with the weights that it will compute with.
        sites: from `activation_sites`.
        data: inputs; labels are ignored.
        settings: the calibration method and its percentile.
        execution: where the program runs; tracks batches.

    Raises:
        DataError: the data does not fit the program, or an activation is not finite.
    """
    observers = [Observer(f"the activation {site.name}") for site in sites]
    runner = MarkedRunner(mark(program, [site.key for site in sites]), execution.device)

    def observe(index: int, value: Floats, first: bool) -> Floats:
        if first:
            observers[index].observe(value)
        return value

    size, usable = program.fixed_batch or BATCH, whole_batches(program, data)
    batches = execution.track(range(-(-usable.samples // size)), "calibrating")
    for _, batch in zip(batches, usable.batches(size), strict=True):
        runner(batch.inputs, observe)
    return [_calibrated(site, seen, settings) for site, seen in zip(sites, observers, strict=True)]


def whole_batches(program: FloatProgram, data: Dataset) -> Dataset:
    """Return the samples that a program can run on: all, or, if its batch size is fixed, those in whole batches.

    Raises:
        DataError: there are fewer samples than one batch, or they do not fit the program.
    """
    size = program.fixed_batch
    if size is not None and data.samples < size:
        raise DataError(f"The model needs batches of {size} samples, but {data.name} has {data.samples}; add samples.")
    usable = data if size is None else data.head(data.samples - data.samples % size)
    program.bind(next(usable.batches(size or 1)).inputs)
    return usable


def constant_inputs(data: Dataset) -> Iterator[str]:
    """Yield a note for each input with the same values in all samples: its ranges are legal, but useless.

    >>> data = Dataset(inputs={"x": np.zeros((3, 2), np.float32)}, name="zeros.npz")
    >>> print(*constant_inputs(data))  # doctest: +NORMALIZE_WHITESPACE
    calibration data zeros.npz: all 3 samples have identical values for input x; the activation ranges will be wrong for
    other data
    """
    for name, values in data.inputs.items():
        if (values == values[:1]).all() and (data.samples > 1 or (values == values.flat[0]).all()):
            same = f"all {data.samples} samples have identical values for input {name}"
            if data.samples == 1:
                same = f"all values of input {name} in the only sample are equal"
            yield f"calibration data {data.name}: {same}; the activation ranges will be wrong for other data"


def widened(program: FloatProgram, grids: Sequence[SiteGrid], activation_bits: Mapping[str, int]) -> list[SiteGrid]:
    """Return the grids with more bits than requested.

    Args:
        program: BatchNorm folded.
        grids: all grids of the program.
        activation_bits: the requested bits, by the layer's weight. A grid is compared with the largest request of the
            layers that use it, or, if it is no layer's input, of all layers.
    """
    if not activation_bits:
        return []
    asked: dict[int, int] = {}
    for name, index in input_sites(mark(program, [grid.site for grid in grids])).items():
        if name in activation_bits:
            asked[index] = max(asked.get(index, 0), activation_bits[name])
    most = max(activation_bits.values())
    return [grid for index, grid in enumerate(grids) if grid.bits > asked.get(index, most)]


def _calibrated(site: Site, seen: Observer, settings: PosthocSettings) -> Calibrated:
    scale, zero = choose_grid(seen, site.bits, settings.calibration_method, settings.percentile)
    return Calibrated(
        ActivationGrid.from_zero_point(site.key, np.asarray(scale), zero, site.bits),
        saturation(seen, scale, zero, site.bits),
        sqnr_db(seen, scale, zero, site.bits),
    )
