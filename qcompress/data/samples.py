"""The samples that the user's own code returns: read one by one, or stacked into arrays."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt

from qcompress.data.arrays import Arrays, as_array, check_finite, check_layout
from qcompress.data.randomness import Seeds, kept_states, seed_globals
from qcompress.data.stored import Indices, Labels, Raw, Samples, StoredSamples
from qcompress.errors import ConfigError, DataError, SourceError
from qcompress.graph.options import unnamed
from qcompress.user_code import find_object, one_line


def find_function(spec: str, flag: str) -> tuple[str, Callable[..., Any]]:
    """A display name without folders, and the function named by `module:name` or `path/file.py:name`.

    Raises:
        ConfigError: it cannot be found, or cannot be called.

    >>> find_function("math:sqrt", "--metric")[0]
    'math:sqrt'
    """
    try:
        found = find_object(spec, flag)
    except SourceError as e:
        raise ConfigError(str(e)) from e
    if not callable(found):
        raise ConfigError(f"{flag} {spec} must be callable, got {type(found).__name__}.")
    return short_name(spec), found


def short_name(spec: str) -> str:
    """The name of a function without folders: `module:name` or `file.py:name`.

    >>> short_name("pkg.data:test"), short_name("/home/me/data.py:test")
    ('pkg.data:test', 'data.py:test')
    """
    place, colon, name = spec.rpartition(":")
    return f"{Path(place.replace(chr(92), '/')).name}{colon}{name}"


def samples_of(returned: object) -> Samples:
    """Return what a factory returned as samples: a sequence is read when it is needed, an iterator at once.

    Args:
        returned: a torch Dataset, or a sequence or an iterator of samples, or an array. Each sample is a pair (x, y),
            or x alone, where x is an array, a tensor, a tuple of them by position, or a dict of them by name. In a
            dict, `y` is the label.

    Raises:
        DataError: it is none of these, or is empty; an iterator's samples differ in names, shape or dtype.
    """
    if isinstance(returned, np.ndarray):
        return StoredSamples({"x": returned}, None)
    if hasattr(returned, "dataset") and hasattr(returned, "batch_size"):
        raise DataError(
            f"a Dataset or a sequence of samples is needed, got {type(returned).__name__}, which returns batches: "
            "return its dataset instead."
        )
    if isinstance(returned, str | bytes | Mapping) or not (hasattr(returned, "__getitem__") or _iterable(returned)):
        raise DataError(
            "the factory must return a torch Dataset or a sequence of samples, each (x, y) or x alone, "
            f"got {type(returned).__name__}."
        )
    if hasattr(returned, "__len__") and hasattr(returned, "__getitem__"):
        return UserSamples(returned)
    return StoredSamples(*_stacked(_numbered(returned)))


@final
class UserSamples:
    """A map-style torch Dataset, or any other sequence of samples, which are read when they are needed.

    Args:
        sequence: has a length and takes an index; see `samples_of` for what it returns.

    Raises:
        DataError: it is empty, or has no usable length.

    >>> UserSamples([(np.zeros(3), 1), (np.ones(3), 0)]).take(np.array([1]))
    ({'x': array([[1., 1., 1.]])}, array([0]))
    """

    def __init__(self, sequence: Any) -> None:
        self._sequence = sequence
        try:
            self._length = len(sequence)
        except (Exception, SystemExit) as e:
            raise DataError(f"asking for its length failed with {one_line(e)}.") from e
        if not self._length:
            raise DataError("at least one sample is needed, but the sequence is empty.")

    def __len__(self) -> int:
        return self._length

    def take(self, indices: Indices, seeds: Seeds | None = None) -> tuple[Raw, Labels]:
        """Return some samples; each is read after the global generators got its seed, which are then put back."""
        if seeds is None:
            return self._checked((int(i), self._read(int(i))) for i in indices)
        with kept_states():
            return self._checked(self._seeded(indices, seeds))

    def arrays(self) -> tuple[Arrays, Labels]:
        """Return all samples, stacked in memory."""
        return self._checked((i, self._read(i)) for i in range(len(self)))

    def labels(self) -> Iterator[npt.NDArray[Any]]:
        """Yield the labels one by one, in an order in which samples of a class do not follow each other."""
        with kept_states():
            for i in np.random.default_rng(0).permutation(len(self)):
                _, label = self.take(np.array([i]))
                if label is None:
                    return
                yield label

    def check(self) -> None:
        """Refuse nothing: samples are checked when they are read."""

    def _read(self, index: int) -> object:
        try:
            return self._sequence[index]
        except (Exception, SystemExit) as e:
            raise DataError(f"reading its samples failed with {one_line(e)}.") from e

    def _seeded(self, indices: Indices, seeds: Seeds) -> Iterator[tuple[int, object]]:
        for index, seed in zip(indices, seeds, strict=True):
            seed_globals(int(seed))
            yield int(index), self._read(int(index))

    def _checked(self, numbered: Iterable[tuple[int, object]]) -> tuple[Arrays, Labels]:
        inputs, labels = _stacked(numbered)
        for name, values in (inputs if labels is None else {**inputs, "y": labels}).items():
            check_layout(name, values.dtype, values.shape)
            check_finite(name, values)
        return inputs, labels


def _numbered(samples: Any) -> Iterator[tuple[int, object]]:
    try:
        yield from enumerate(samples)
    except (Exception, SystemExit) as e:
        raise DataError(f"reading its samples failed with {one_line(e)}.") from e


def _stacked(numbered: Iterable[tuple[int, object]]) -> tuple[Arrays, Labels]:
    """Stack numbered samples into inputs by name, and labels if there are any."""
    columns: dict[str, list[npt.NDArray[Any]]] = {}
    first = None
    for index, sample in numbered:
        named = _named(sample, index)
        if first is None:
            first, columns = index, {name: [] for name in named}
        if set(named) != set(columns):
            raise DataError(
                f"all samples must have the same arrays: sample {first} has {_listed(columns)}, "
                f"sample {index} has {_listed(named)}."
            )
        for name, value in named.items():
            columns[name].append(value)
            _check_alike(name, (first, columns[name][0]), (index, value))
    if first is None:
        raise DataError("at least one sample is needed, but the sequence is empty.")
    stacked = {name: np.stack(values) for name, values in columns.items()}
    labels = stacked.pop("y", None)
    if not stacked:
        raise DataError("at least one input array is needed, but there are none.")
    return stacked, labels


def join_batches(batches: Iterable[object]) -> Arrays:
    """Join batches along their first axis into arrays by name; labels are `y`.

    Args:
        batches: each is an array or a tensor, a pair (x, y) as a DataLoader returns it, or a dict of named arrays.

    Raises:
        DataError: there are no batches, or they differ in names or in the shape of a sample.

    >>> join_batches([(np.zeros((2, 3)), [0, 1]), (np.ones((1, 3)), [1])])["y"].tolist()
    [0, 1, 1]
    """
    parts = [_named(tuple(b) if isinstance(b, list) else b, i) for i, b in enumerate(batches)]
    if not parts:
        raise DataError("at least one batch is needed, but there are none.")
    for index, part in enumerate(parts):
        if set(part) != set(parts[0]):
            raise DataError(
                f"all batches must have the same arrays: batch 0 has {_listed(parts[0])}, batch {index} has "
                f"{_listed(part)}."
            )
    try:
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    except ValueError as e:
        raise DataError(f"the batches cannot be joined: {e}.") from None


def _iterable(samples: object) -> bool:
    return isinstance(samples, Iterable)


def _named(sample: object, index: int) -> Arrays:
    try:
        if isinstance(sample, tuple) and len(sample) == 2:
            x, y = sample
            inputs = _inputs(x)
            if "y" in inputs:
                raise DataError("the label 'y' is both in the pair and in its dict: keep one of them.")
            return inputs | {"y": as_array(y)}
        if isinstance(sample, tuple) and len(sample) != 1:
            raise DataError(
                f"a sample must be a pair (x, y), x alone, or a dict of named arrays, got a tuple of {len(sample)}: "
                "use a dict, or ((a, b), y), for several inputs."
            )
        return _inputs(sample)
    except DataError as e:
        raise DataError(f"sample {index}: {e}") from None


def _inputs(x: object) -> Arrays:
    """Arrays by name; those of a tuple are called x0, x1, … and belong to the model's inputs in their order."""
    if isinstance(x, Mapping):
        return {str(name): as_array(value) for name, value in x.items()}
    values = x if isinstance(x, tuple) else (x,)
    return {name: as_array(value) for name, value in zip(unnamed(len(values)), values, strict=True)}


def _check_alike(name: str, first: tuple[int, npt.NDArray[Any]], other: tuple[int, npt.NDArray[Any]]) -> None:
    (i, a), (j, b) = first, other
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        raise DataError(
            f"all samples must have the same shape and dtype: {name} is {a.dtype} {list(a.shape)} in sample {i}, "
            f"{b.dtype} {list(b.shape)} in sample {j}."
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "no arrays"
