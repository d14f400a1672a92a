"""Data for a model: inputs and, optionally, labels, in batches in their order, through the user's transform.

Nothing in a data file is executed, and no pickle is read; a `module:factory` or a transform is the user's own code.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt

from qcompress.artifacts.digest import short_digest
from qcompress.data.arrays import Arrays, as_array, hash_bytes
from qcompress.data.reader import DataReader, open_data
from qcompress.data.samples import join_batches
from qcompress.data.stored import Labels, StoredSamples
from qcompress.data.transform import Batch, Transform, transformed
from qcompress.errors import ConfigError, DataError

_TOGETHER: Final = 64  # samples that are transformed together


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """Samples for a model.

    Args:
        inputs: raw arrays by input name, samples along the first axis; kept read-only. A single unnamed one is `x`.
        labels: one per sample, or None.
        name: its name in reports; never a path of the machine.
        transform: turns a batch of raw arrays into a batch of the model's inputs; it is called with the array if there
            is one input, else with a dict.
        transform_name: the transform's name in messages and in the digest.
        notes: notes for the user, for example about arrays that were skipped.

    Raises:
        DataError: the arrays differ in length, are empty, are not numeric, or hold NaN or Inf.

    >>> data = Dataset(inputs={"x": np.arange(6, dtype=np.float32).reshape(3, 2)}, labels=np.array([0, 1, 1]))
    >>> data.samples, [len(batch) for batch in data.batches(2)], data.digest
    (3, [2, 1], 'th7QlcAtIJs')
    """

    inputs: Arrays
    labels: npt.NDArray[Any] | None = None
    name: str = "data"
    transform: Transform | None = None
    transform_name: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        StoredSamples(self.inputs, self.labels).check()
        object.__setattr__(self, "inputs", {name: _read_only(values) for name, values in self.inputs.items()})
        object.__setattr__(self, "labels", None if self.labels is None else _read_only(self.labels))

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(next(iter(self.inputs.values())))

    @cached_property
    def digest(self) -> str:
        """A digest of 11 characters of the arrays' names, dtypes, shapes and bytes, and of the transform's name."""
        parts = [f"transform {self.transform_name}".encode()]
        for name, values in sorted(self.inputs.items()):
            parts += [f"input {name} {values.dtype.str}{list(values.shape)}".encode(), hash_bytes(values)]
        if self.labels is not None:
            parts += [f"labels {self.labels.dtype.str}{list(self.labels.shape)}".encode(), hash_bytes(self.labels)]
        return short_digest(*parts)

    def batches(self, size: int) -> Iterator[Batch]:
        """All samples in order, `size` at a time; the last batch may be smaller.

        Raises:
            ConfigError: `size` is below 1.
            DataError: the transform fails, or does not return a batch of inputs.
        """
        if size < 1:
            raise ConfigError(f"The batch size must be at least 1, got {size}.")
        return (self._batch(start, min(start + size, self.samples)) for start in range(0, self.samples, size))

    def head(self, n: int) -> "Dataset":
        """The first `n` samples, or all if there are fewer.

        Raises:
            ConfigError: `n` is below 1.
        """
        if n < 1:
            raise ConfigError(f"The number of samples must be at least 1, got {n}.")
        if n >= self.samples:
            return self
        labels = None if self.labels is None else self.labels[:n]
        return replace(self, inputs={name: values[:n] for name, values in self.inputs.items()}, labels=labels)

    def reader(self) -> DataReader:
        """The same samples, read by their indices."""
        return DataReader(
            samples=StoredSamples(self.inputs, self.labels),
            name=self.name,
            source=self.name,
            transform=self.transform,
            transform_name=self.transform_name,
            notes=self.notes,
        )

    def example(self) -> Arrays:
        """The first two samples, transformed, for tracing; a single sample is repeated.

        >>> Dataset(inputs={"x": np.array([[5.0]])}).example()["x"].tolist()
        [[5.0], [5.0]]
        """
        if self.samples > 1:
            return self._batch(0, 2).inputs
        twice = {name: np.concatenate([values, values]) for name, values in self.inputs.items()}
        return replace(self, inputs=twice, labels=None)._batch(0, 2).inputs

    def _batch(self, start: int, stop: int) -> Batch:
        raw = {name: np.array(values[start:stop], order="C") for name, values in self.inputs.items()}
        labels = None if self.labels is None else np.array(self.labels[start:stop], order="C")
        try:
            return Batch(transformed(self.transform, raw), labels)
        except DataError as e:
            raise DataError(f"--transform {self.transform_name}, samples {start} to {stop - 1}: {e}") from e.__cause__


def as_dataset(data: object) -> Dataset:
    """Make a Dataset of arrays or batches.

    Args:
        data: a Dataset, arrays by name (`y`: labels), or batches: arrays, pairs (x, y) or dicts of arrays.

    Raises:
        DataError: it is none of these, or cannot be joined.

    >>> as_dataset({"x": np.zeros((3, 2)), "y": np.array([0, 1, 0])}).labels.tolist()
    [0, 1, 0]
    >>> as_dataset([np.zeros((2, 4)), np.zeros((3, 4))]).samples
    5
    """
    if isinstance(data, Dataset):
        return data
    if isinstance(data, Mapping):
        arrays = {str(name): as_array(values) for name, values in data.items()}
    elif isinstance(data, Iterable) and not isinstance(data, str | bytes):
        arrays = join_batches(data)
    else:
        raise DataError(f"data must be a Dataset, arrays by name or batches, got {type(data).__name__}.")
    labels = arrays.pop("y", None)
    return Dataset(inputs=arrays, labels=labels)


def load_data(spec: str, *, transform: str | Transform | None = None, what: str = "--data") -> Dataset:
    """Read all samples of a data file, a folder or the user's factory.

    Args:
        spec: one of

            - `FILE.npz`: `y` holds labels, every other array is the input of that name (text is skipped, with a note);
            - `FILE.npz:test_x,test_y`: x and labels by their keys; `FILE.npz:test_x`: x alone;
            - `FILE.npz:ids=a,mask=b,y=c`: inputs by name;
            - `FILE.npy`: x; a folder of `.npy` files: batches of x, joined in the order of their names;
            - a folder of images: uint8 [N, H, W, 3]. Sub-folders are classes, numbered in the order of their names;
              without a transform, the model gets float32 [N, 3, H, W] from 0 to 1;
            - `module:factory` or `path/file.py:factory`: is called without arguments and returns a torch Dataset or a
              sequence of samples: (x, y), x alone, a dict by name, or ((a, b), y) for several inputs by position.
        transform: a function, or `module:fn`, that turns raw batches into the model's inputs.
        what: the option that `spec` was given to, for messages.

    Raises:
        ConfigError: the transform cannot be found.
        DataError: the data cannot be read, or its arrays do not fit together.
        DependencyError: the images need Pillow, which is not installed.
    """
    reader = open_data(spec, transform=transform, what=what)
    with reader.named_errors():
        raw = reader.samples.arrays()
    inputs, labels = raw or _read_all(reader)
    with reader.named_errors():
        return Dataset(
            inputs=inputs,
            labels=labels,
            name=reader.name,
            transform=reader.transform if raw else None,
            transform_name=reader.transform_name,
            notes=reader.notes,
        )


def _read_all(reader: DataReader) -> tuple[Arrays, Labels]:
    """All samples, transformed: raw ones of different shapes fit into no array."""
    starts = range(0, len(reader), _TOGETHER)
    batches = [reader.read(np.arange(start, min(start + _TOGETHER, len(reader)))) for start in starts]
    inputs = {name: np.concatenate([batch.inputs[name] for batch in batches]) for name in batches[0].inputs}
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return inputs, np.concatenate(labels) if labels else None


def _read_only(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    view = values.view()
    view.flags.writeable = False
    return view
