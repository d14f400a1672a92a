"""Opens data and reads samples by their indices, so that nothing is in memory before it is needed."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np

from qcompress.data.arrays import Arrays
from qcompress.data.randomness import Seeds, kept_states, seed_globals
from qcompress.data.spec import open_spec
from qcompress.data.stored import Indices, Samples
from qcompress.data.transform import Batch, Transform, find_transform, transformed
from qcompress.errors import DataError


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DataReader:
    """Opened data; made by `open_data`.

    Args:
        samples: the raw samples.
        name: its name in reports; never a path of the machine.
        source: the option and its argument, for messages.
        transform: turns a batch of raw arrays into a batch of the model's inputs.
        transform_name: its name in messages and digests; empty if it is not the user's.
        notes: notes for the user.
    """

    samples: Samples
    name: str = "data"
    source: str = "data"
    transform: Transform | None = None
    transform_name: str = ""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, indices: Indices, seeds: Seeds | None = None) -> Batch:
        """Return some samples, transformed into the model's inputs.

        Args:
            indices: which ones, in which order.
            seeds: one per sample, for user code that draws from the global generators of Python, numpy or torch, which
                are put back after it; the first one is the transform's. None: user code draws as it likes.

        Raises:
            DataError: they cannot be read, or the transform fails.
        """
        with self.named_errors():
            raw, labels = self.samples.take(indices, seeds)
            if self.transform is None or seeds is None:
                return Batch(self._transformed(raw), labels)
            with kept_states():
                seed_globals(int(seeds[0]))
                return Batch(self._transformed(raw), labels)

    @property
    def has_labels(self) -> bool:
        """Whether samples have labels; a dataset is asked for one."""
        with self.named_errors():
            return next(self.samples.labels(), None) is not None

    def example(self) -> Arrays:
        """Return the first two samples, transformed, for tracing; a single sample is repeated."""
        return self.read(np.arange(2) % len(self)).inputs

    @contextlib.contextmanager
    def named_errors(self) -> Iterator[None]:
        """Put the option and its argument before messages about the data."""
        try:
            yield
        except DataError as e:
            raise DataError(f"{self.source}: {e}") from e.__cause__

    def _transformed(self, raw: Arrays) -> Arrays:
        try:
            return transformed(self.transform, raw)
        except DataError as e:
            who = f"--transform {self.transform_name}: " if self.transform_name else ""
            raise DataError(f"{who}{e}") from e.__cause__


def open_data(spec: str, *, transform: str | Transform | None = None, what: str = "--data") -> DataReader:
    """Open a data file, a folder or the user's factory, whose samples are read when they are needed.

    Args:
        spec: see `load_data`.
        transform: a function, or `module:fn`, that turns raw batches into the model's inputs.
        what: the option that `spec` was given to, for messages.

    Raises:
        ConfigError: the transform cannot be found.
        DataError: the data cannot be opened, or its arrays do not fit together.
        DependencyError: the images need Pillow, which is not installed.
    """
    function, transform_name = find_transform(transform)
    try:
        found = open_spec(spec, what)
    except DataError as e:
        raise DataError(f"{what} {spec}: {e}") from e.__cause__
    return DataReader(
        samples=found.samples,
        name=found.name,
        source=f"{what} {spec}",
        transform=function or found.transform,
        transform_name=transform_name,
        notes=found.notes,
    )
