"""The user's transform, from raw arrays to the model's inputs, and the batches that it makes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt

from qcompress.data.arrays import Arrays, as_array, check_finite, check_layout
from qcompress.data.samples import find_function
from qcompress.data.stored import Raw
from qcompress.errors import DataError
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


def find_transform(transform: str | Transform | None) -> tuple[Transform | None, str]:
    """Return a transform, given as a function or as `module:fn`, and its name in messages and digests.

    Raises:
        ConfigError: it cannot be found, or cannot be called.
    """
    if transform is None:
        return None, ""
    if isinstance(transform, str):
        name, function = find_function(transform, "--transform")
        return function, name
    return transform, qualified_name(transform)


def qualified_name(function: Callable[..., Any]) -> str:
    """Return the name of a function with its module.

    >>> qualified_name(find_transform)
    'qcompress.data.transform:find_transform'
    """
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def transformed(transform: Transform | None, raw: Raw) -> Arrays:
    """Return the model's inputs of a batch.

    Args:
        transform: it is called with the array if there is one input, else with a dict; None: raw arrays are the inputs.
        raw: arrays by name, or lists of arrays, one per sample, where samples differ in shape.

    Raises:
        DataError: it fails, or does not return a batch of inputs.
    """
    if transform is None:
        return raw
    first = next(iter(raw.values()))
    given, got = (first, _kind(first)) if len(raw) == 1 else (raw, f"a dict of {', '.join(raw)}")
    samples = len(first)
    try:
        result = transform(given)
    except DataError:
        raise
    except (Exception, SystemExit) as e:
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


def _kind(values: npt.NDArray[Any] | list[npt.NDArray[Any]]) -> str:
    if isinstance(values, np.ndarray):
        return f"{values.dtype} {list(values.shape)}"
    return f"a list of {len(values)} arrays of different shapes, the first one {_kind(values[0])}"
