"""Stacks the samples that the user's own code returns into arrays."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompress.data.arrays import Arrays, as_array
from qcompress.errors import ConfigError, DataError, SourceError
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


def stack_samples(samples: object) -> tuple[Arrays, npt.NDArray[Any] | None]:
    """Stack the samples of a torch Dataset or of any sequence into inputs by name, and labels if there are any.

    Args:
        samples: each is a pair (x, y), or x alone, where x is an array, a tensor or a dict of them. In a dict, `y` is
            the label.

    Raises:
        DataError: it is not a sequence, or is empty, or its samples differ in names, shape or dtype.

    >>> stack_samples([(np.zeros(3), 1), (np.ones(3), 0)])[1].tolist()
    [1, 0]
    """
    if isinstance(samples, np.ndarray):
        return {"x": samples}, None
    columns: dict[str, list[npt.NDArray[Any]]] = {}
    count = 0
    for count, sample in enumerate(_each(samples), 1):
        named = _named(sample, count - 1)
        if count > 1 and set(named) != set(columns):
            raise DataError(
                f"all samples must have the same arrays: sample 0 has {_listed(columns)}, "
                f"sample {count - 1} has {_listed(named)}."
            )
        for name, value in named.items():
            first = columns.setdefault(name, [value])[0]
            if count > 1:
                _check_alike(name, first, value, count - 1)
                columns[name].append(value)
    if not count:
        raise DataError("at least one sample is needed, but the sequence is empty.")
    stacked = {name: np.stack(values) for name, values in columns.items()}
    labels = stacked.pop("y", None)
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


def _each(samples: object) -> Iterator[object]:
    """The samples in order. The length of a map-style Dataset decides where they end, because indexing may not."""
    if hasattr(samples, "dataset") and hasattr(samples, "batch_size"):
        raise DataError(
            f"a Dataset or a sequence of samples is needed, got {type(samples).__name__}, which returns batches: "
            "return its dataset instead."
        )
    if isinstance(samples, str | bytes | Mapping) or not (hasattr(samples, "__getitem__") or _iterable(samples)):
        raise DataError(
            "the factory must return a torch Dataset or a sequence of samples, each (x, y) or x alone, "
            f"got {type(samples).__name__}."
        )
    try:
        if hasattr(samples, "__len__") and hasattr(samples, "__getitem__"):
            for index in range(len(samples)):
                yield samples[index]
        else:
            yield from samples  # type: ignore[misc]
    except (Exception, SystemExit) as e:
        raise DataError(f"reading its samples failed with {one_line(e)}.") from e


def _iterable(samples: object) -> bool:
    return isinstance(samples, Iterable)


def _named(sample: object, index: int) -> Arrays:
    try:
        if isinstance(sample, Mapping):
            return {str(name): as_array(value) for name, value in sample.items()}
        if isinstance(sample, tuple) and len(sample) == 2:
            x, y = sample
            inputs = _named(x, index)
            if "y" in inputs:
                raise DataError("the label 'y' is both in the pair and in its dict: keep one of them.")
            return inputs | {"y": as_array(y)}
        if isinstance(sample, tuple) and len(sample) != 1:
            raise DataError(
                f"a sample must be a pair (x, y), x alone, or a dict of named arrays, got a tuple of {len(sample)}: "
                "use a dict for several inputs."
            )
        return {"x": as_array(sample[0] if isinstance(sample, tuple) else sample)}
    except DataError as e:
        raise DataError(f"sample {index}: {e}") from None


def _check_alike(name: str, first: npt.NDArray[Any], value: npt.NDArray[Any], index: int) -> None:
    if (value.shape, value.dtype) != (first.shape, first.dtype):
        raise DataError(
            f"all samples must have the same shape and dtype: {name} is {first.dtype} "
            f"{list(first.shape)} in sample 0, {value.dtype} {list(value.shape)} in sample {index}."
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "no arrays"
