"""Samples by index: what every kind of data gives, and the kinds that are arrays."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, final

import numpy as np
import numpy.typing as npt

from qcompress.data.arrays import Arrays, check_finite, check_layout, check_lengths
from qcompress.data.randomness import Seeds
from qcompress.errors import DataError

Indices = npt.NDArray[np.int64]
# Raw inputs by name; images of different sizes are a list.
Raw = dict[str, Any]
Labels = npt.NDArray[Any] | None


class Samples(Protocol):
    """Samples that are read when they are needed."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def take(self, indices: Indices, seeds: Seeds | None = None) -> tuple[Raw, Labels]:
        """Return copies of some samples.

        Args:
            indices: which ones, in which order.
            seeds: one per sample, for the user's code, if it draws at random; None: it draws as it likes.

        Raises:
            DataError: a sample cannot be read.
        """

    def arrays(self) -> tuple[Arrays, Labels] | None:
        """Return all samples, mapped from the file where that is possible; None if they are images of different sizes.

        Raises:
            DataError: a sample cannot be read.
        """

    def labels(self) -> Iterator[npt.NDArray[Any]]:
        """Yield labels until all samples had their turn, in any order and in pieces of any length; none without labels.

        Raises:
            DataError: a sample cannot be read.
        """

    def check(self) -> None:
        """Refuse samples with NaN or Inf, as far as that can be told without reading each sample one by one.

        Raises:
            DataError: there are such samples.
        """


@final
class StoredSamples:
    """Samples in arrays.

    Args:
        inputs: by name, samples along the first axis.
        labels: one per sample, or None.

    Raises:
        DataError: the arrays differ in length, are empty or are not numeric.

    >>> StoredSamples({"x": np.arange(4.0)}, np.array([0, 1, 0, 1])).take(np.array([3, 0]))
    ({'x': array([3., 0.])}, array([1, 0]))
    """

    def __init__(self, inputs: Arrays, labels: Labels) -> None:
        if not inputs:
            raise DataError("at least one input array is needed, but there are none.")
        self._inputs, self._labels = inputs, labels
        self._all = inputs if labels is None else {**inputs, "y": labels}
        for name, values in self._all.items():
            check_layout(name, values.dtype, values.shape)
        check_lengths({name: len(values) for name, values in self._all.items()})

    def __len__(self) -> int:
        return len(next(iter(self._inputs.values())))

    def take(self, indices: Indices, seeds: Seeds | None = None) -> tuple[Raw, Labels]:
        """Return copies of some samples; see `Samples`."""
        inputs = {name: np.ascontiguousarray(values[indices]) for name, values in self._inputs.items()}
        return inputs, None if self._labels is None else self._labels[indices]

    def arrays(self) -> tuple[Arrays, Labels]:
        """Return the arrays themselves."""
        return self._inputs, self._labels

    def labels(self) -> Iterator[npt.NDArray[Any]]:
        """Yield all labels in one piece."""
        if self._labels is not None:
            yield self._labels

    def check(self) -> None:
        """Refuse NaN and Inf in any array."""
        for name, values in self._all.items():
            check_finite(name, values)


@final
class JoinedSamples:
    """Inputs of one name in several arrays, one after the other, which are never joined in memory for `take`.

    Args:
        parts: arrays that agree in dtype and in all axes but the first.
    """

    def __init__(self, parts: Sequence[npt.NDArray[Any]]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, indices: Indices, seeds: Seeds | None = None) -> tuple[Raw, Labels]:
        """Return copies of some samples; see `Samples`."""
        first = self._parts[0]
        values = np.empty((len(indices), *first.shape[1:]), first.dtype)
        where = np.searchsorted(self._ends, indices, side="right")
        for number in np.unique(where):
            part = self._parts[number]
            values[where == number] = part[indices[where == number] - (self._ends[number] - len(part))]
        return {"x": values}, None

    def arrays(self) -> tuple[Arrays, Labels]:
        """Return all samples, joined in memory if there are several arrays."""
        return {"x": self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)}, None

    def labels(self) -> Iterator[npt.NDArray[Any]]:
        """Yield nothing: there are no labels."""
        return iter(())

    def check(self) -> None:
        """Refuse NaN and Inf in any array."""
        for part in self._parts:
            check_finite("x", part)
