"""Activation grids without training: run the compressed program over calibration batches and watch its sites."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qcompress.artifacts import ActivationGrid, SiteGrid
from qcompress.artifacts.base import Floats
from qcompress.data.dataset import Dataset
from qcompress.errors import DataError
from qcompress.graph.program import FloatProgram
from qcompress.graph.sites import MarkedRunner, Site, input_sites, mark
from qcompress.posthoc import calibration
from qcompress.progress import Track, untracked

BATCH = 32


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What calibration found for one site.

    Args:
        grid: the grid.
        saturation: share of the observed values that the grid clips, 0 to 1.
        sqnr_db: signal to quantization noise of the grid on what was observed; infinite for zeros alone.
    """

    grid: ActivationGrid
    saturation: float
    sqnr_db: float


def calibrate(
    program: FloatProgram,
    sites: Sequence[Site],
    data: Dataset,
    *,
    method: str = "mse",
    percentile: float = 99.99,
    device: str = "cpu",
    track: Track = untracked,
) -> list[Calibrated]:
    """Grids for the sites of a program, from what its values are on some inputs.

    Args:
        program: the one to be deployed, its weights those that it will compute with.
        sites: from `activation_sites`.
        data: inputs; labels are not looked at.
        method: a key of `calibration.METHODS`.
        percentile: for the method of that name.
        device: where the program runs.
        track: passes batches on: a progress bar.

    Raises:
        ConfigError: an unknown method.
        DataError: the data does not fit the program, or an activation is not finite.
    """
    observers = [calibration.Observer(f"the activation {site.name}") for site in sites]
    runner = MarkedRunner(mark(program, [site.key for site in sites]), device)

    def observe(index: int, value: Floats, first: bool) -> Floats:
        if first:
            observers[index].observe(value)
        return value

    size, usable = program.fixed_batch or BATCH, whole_batches(program, data)
    for _, batch in zip(track(range(-(-usable.samples // size)), "calibrating"), usable.batches(size), strict=True):
        runner(batch.inputs, observe)
    return [_calibrated(site, seen, method, percentile) for site, seen in zip(sites, observers, strict=True)]


def whole_batches(program: FloatProgram, data: Dataset) -> Dataset:
    """What of some data a program can run on: all of it, or whole batches where it takes one size alone.

    Raises:
        DataError: fewer samples than one batch, or samples that do not fit.
    """
    size = program.fixed_batch
    if size is not None and data.samples < size:
        raise DataError(f"The model takes batches of {size} alone, {data.name} has {data.samples} samples: give more.")
    usable = data if size is None else data.head(data.samples - data.samples % size)
    program.bind(next(usable.batches(size or 1)).inputs)
    return usable


def constant_inputs(data: Dataset) -> Iterator[str]:
    """A note for each input that says the same in every sample: its grid is legal, and fits nothing else.

    >>> list(constant_inputs(Dataset(inputs={"x": np.zeros((3, 2), np.float32)}, name="zeros.npz")))
    ['calibration data zeros.npz: input x is the same in all 3 samples, and its grids fit nothing else']
    """
    for name, values in data.inputs.items():
        if (values == values[:1]).all() and (data.samples > 1 or (values == values.flat[0]).all()):
            many = f"all {data.samples} samples" if data.samples > 1 else "the one sample at every place"
            yield f"calibration data {data.name}: input {name} is the same in {many}, and its grids fit nothing else"


def widened(program: FloatProgram, grids: Sequence[SiteGrid], activation_bits: Mapping[str, int]) -> list[SiteGrid]:
    """The grids that have more bits than was asked for the layers that take them, or for any where none does.

    Args:
        program: BatchNorm folded.
        grids: all of them.
        activation_bits: what was asked for, by the layer's weight.
    """
    if not activation_bits:
        return []
    asked: dict[int, int] = {}
    for name, index in input_sites(mark(program, [grid.site for grid in grids])).items():
        if name in activation_bits:
            asked[index] = max(asked.get(index, 0), activation_bits[name])
    most = max(activation_bits.values())
    return [grid for index, grid in enumerate(grids) if grid.bits > asked.get(index, most)]


def _calibrated(site: Site, seen: calibration.Observer, method: str, percentile: float) -> Calibrated:
    scale, zero = calibration.grid(seen, site.bits, method, percentile=percentile)
    return Calibrated(
        ActivationGrid.from_zero_point(site.key, np.asarray(scale), zero, site.bits),
        calibration.saturation(seen, scale, zero, site.bits),
        calibration.sqnr_db(seen, scale, zero, site.bits),
    )
