"""Activation grids without training: run the compressed program over calibration batches and watch its sites."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompress.artifacts import ActivationGrid, Floats
from qcompress.data import Dataset
from qcompress.errors import DataError
from qcompress.posthoc import calibration
from qcompress.program import FloatProgram
from qcompress.sites import MarkedRunner, Site, mark

BATCH = 32

Track = Callable[[Iterable[Any]], Iterable[Any]]


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
    track: Track = iter,
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

    size = program.fixed_batch or BATCH
    if data.samples < size and program.fixed_batch is not None:
        raise DataError(f"The model takes batches of {size} alone, {data.name} has {data.samples} samples: give more.")
    usable = data if program.fixed_batch is None else data.head(data.samples - data.samples % size)
    for _, batch in zip(track(range(-(-usable.samples // size))), usable.batches(size), strict=True):
        runner(batch.inputs, observe)
    return [_calibrated(site, seen, method, percentile) for site, seen in zip(sites, observers, strict=True)]


def _calibrated(site: Site, seen: calibration.Observer, method: str, percentile: float) -> Calibrated:
    scale, zero = calibration.grid(seen, site.bits, method, percentile=percentile)
    return Calibrated(
        ActivationGrid.from_zero_point(site.key, np.asarray(scale), zero, site.bits),
        calibration.saturation(seen, scale, zero, site.bits),
        calibration.sqnr_db(seen, scale, zero, site.bits),
    )
