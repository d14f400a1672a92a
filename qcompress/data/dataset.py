"""Data for a model: inputs and, optionally, labels, in batches, through the user's transform.

Nothing in a data file is executed, and no pickle is read; a `module:factory` or a transform is the user's own code.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import numpy as np
import numpy.typing as npt

from qcompress.artifacts.digest import short_digest
from qcompress.data.arrays import Arrays, as_array, check_finite, check_layout, check_lengths, hash_bytes
from qcompress.data.samples import find_function, join_batches
from qcompress.data.spec import read_spec
from qcompress.errors import ConfigError, DataError
from qcompress.user_code import one_line

# Raw array, or arrays by input name where there are several -> the model's input, or inputs by name.
Transform = Callable[[Any], Any]


@final
@dataclass(frozen=True, slots=True)
class Batch:
    """Some consecutive samples, transformed into the model's inputs.

    Args:
        inputs: arrays by input name; the caller may change them.
        labels: labels of the samples, or None.
    """

    inputs: Arrays
    labels: npt.NDArray[Any] | None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


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
        if not self.inputs:
            raise DataError("at least one input array is needed, but there are none.")
        arrays = dict(self.inputs) if self.labels is None else {**self.inputs, "y": self.labels}
        for name, values in arrays.items():
            check_layout(name, values.dtype, values.shape)
        check_lengths({name: len(values) for name, values in arrays.items()})
        for name, values in arrays.items():
            check_finite(name, values)
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
        if self.transform is None:
            return Batch(raw, labels)
        try:
            return Batch(_transformed(self.transform, raw, stop - start), labels)
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
    """Read a data file, or call the user's factory.

    Args:
        spec: one of

            - `FILE.npz`: `y` holds labels, every other array is the input of that name (text is skipped, with a note);
            - `FILE.npz:test_x,test_y`: x and labels by their keys; `FILE.npz:test_x`: x alone;
            - `FILE.npz:ids=a,mask=b,y=c`: inputs by name;
            - `FILE.npy`: x; a folder of `.npy` files: batches of x, joined in the order of their names;
            - `module:factory` or `path/file.py:factory`: is called without arguments and returns a torch Dataset or a
              sequence of (x, y) pairs or of x.
        transform: a function, or `module:fn`, that turns raw batches into the model's inputs.
        what: the option that `spec` was given to, for messages.

    Raises:
        ConfigError: the transform cannot be found.
        DataError: the data cannot be read, or its arrays do not fit together.
    """
    function, transform_name = _find_transform(transform)
    try:
        name, (inputs, labels, notes) = read_spec(spec, what)
        return Dataset(
            inputs=inputs, labels=labels, name=name, transform=function, transform_name=transform_name, notes=notes
        )
    except DataError as e:
        raise DataError(f"{what} {spec}: {e}") from e.__cause__


def _find_transform(transform: str | Transform | None) -> tuple[Transform | None, str]:
    if transform is None:
        return None, ""
    if isinstance(transform, str):
        name, function = find_function(transform, "--transform")
        return function, name
    qualified = getattr(transform, "__qualname__", type(transform).__qualname__)
    return transform, f"{getattr(transform, '__module__', type(transform).__module__)}:{qualified}"


def _transformed(transform: Transform, raw: Arrays, samples: int) -> Arrays:
    given = next(iter(raw.values())) if len(raw) == 1 else raw
    kinds = {name: f"{values.dtype} {list(values.shape)}" for name, values in raw.items()}
    try:
        result = transform(given)
    except (Exception, SystemExit) as e:
        got = next(iter(kinds.values())) if len(raw) == 1 else f"a dict of {', '.join(kinds)}"
        raise DataError(f"it failed with {one_line(e)}. It was called with {got}.") from e
    if isinstance(result, tuple | list | str) or result is None or (isinstance(result, Mapping) and not result):
        raise DataError(
            f"it must return an array, a tensor, or a dict of them by input name, got {type(result).__name__}."
        )
    named = result if isinstance(result, Mapping) else {"x": result}
    arrays = {str(name): as_array(value) for name, value in named.items()}
    for name, values in arrays.items():
        check_layout(name, values.dtype, values.shape)
        if len(values) != samples:
            raise DataError(f"it must return all {samples} samples, got {len(values)} in {name}.")
        check_finite(name, values)
    return arrays


def _read_only(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    view = values.view()
    view.flags.writeable = False
    return view
