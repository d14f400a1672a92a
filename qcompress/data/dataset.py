"""Data files: inputs for a model, with labels where there are any, in batches, through the user's transform.

Nothing in a file is executed, and no pickle is read; `module:factory` and a transform are code that the user names.
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
    """Some consecutive samples, transformed: what the model takes.

    Args:
        inputs: arrays by input name, the caller's own copies.
        labels: their labels, or None.
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
        name: what reports call it; never a path of the machine.
        transform: raw arrays to the model's inputs, batch in, batch out; it gets the array where there is one input,
            else a dict.
        transform_name: what messages and the digest call the transform.
        notes: what a user should be told, arrays that were left out for one.

    Raises:
        DataError: arrays of different length, empty ones, dtypes that are no numbers, NaN or Inf.

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
            raise DataError("at least one input array is needed, got none.")
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
        """How many there are."""
        return len(next(iter(self.inputs.values())))

    @cached_property
    def digest(self) -> str:
        """11 characters over names, dtypes, shapes and bytes of all arrays and the transform's name."""
        parts = [f"transform {self.transform_name}".encode()]
        for name, values in sorted(self.inputs.items()):
            parts += [f"input {name} {values.dtype.str}{list(values.shape)}".encode(), hash_bytes(values)]
        if self.labels is not None:
            parts += [f"labels {self.labels.dtype.str}{list(self.labels.shape)}".encode(), hash_bytes(self.labels)]
        return short_digest(*parts)

    def batches(self, size: int) -> Iterator[Batch]:
        """All samples in order, `size` at a time, the last batch as small as it comes.

        Raises:
            ConfigError: `size` is below 1.
            DataError: the transform fails, or returns what no model takes.
        """
        if size < 1:
            raise ConfigError(f"The batch size must be at least 1, got {size}.")
        return (self._batch(start, min(start + size, self.samples)) for start in range(0, self.samples, size))

    def head(self, n: int) -> "Dataset":
        """The first `n` samples, or all where there are fewer.

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
        """The first two samples, transformed; a single sample stands there twice. What tracing needs.

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
    """What a Python caller has at hand, as a Dataset.

    Args:
        data: a Dataset, arrays by name (`y`: labels), or batches: arrays, pairs (x, y), dicts of arrays.

    Raises:
        DataError: it is nothing of these.

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
    """A data file, or what the user's factory returns.

    Args:
        spec: `FILE.npz`: `y` are labels, every other array an input of that name (text is left out, and noted);
            `FILE.npz:test_x,test_y`: these keys as x and labels, one key as x alone; `FILE.npz:ids=a,mask=b,y=c`:
            inputs by name; `FILE.npy`: x; a folder of `.npy` files: batches of x, joined in the order of their names;
            `module:factory` or `path/file.py:factory`: called without arguments, it returns a torch Dataset or a
            sequence of (x, y) pairs or of x.
        transform: a function, or `module:fn`, from raw batches to the model's inputs.
        what: the flag that `spec` came from, for messages.

    Raises:
        ConfigError: the transform cannot be found.
        DataError: the data cannot be read, or does not fit itself.
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
        raise DataError(f"it failed with {one_line(e)}. It was given {got}.") from e
    if isinstance(result, tuple | list | str) or result is None or (isinstance(result, Mapping) and not result):
        raise DataError(
            f"it must return an array, a tensor, or a dict of such by input name, got {type(result).__name__}."
        )
    named = result if isinstance(result, Mapping) else {"x": result}
    arrays = {str(name): as_array(value) for name, value in named.items()}
    for name, values in arrays.items():
        check_layout(name, values.dtype, values.shape)
        if len(values) != samples:
            raise DataError(f"it must return as many samples as it gets, {samples}, got {name} of {len(values)}.")
        check_finite(name, values)
    return arrays


def _read_only(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    view = values.view()
    view.flags.writeable = False
    return view
