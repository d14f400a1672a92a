"""The weights of one tensor, or of many, as groups of vectors that have their own centroids.

Shape suffixes: V = vectors of all groups, G = groups, K = centroids, D = numbers in a vector.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Self, final

import torch
from torch import Tensor

from qcompress.artifacts import granularity
from qcompress.errors import ConfigError


@final
@dataclass(frozen=True, slots=True)
class Groups:
    """How a tensor is split into groups of consecutive output channels, and each group into vectors.

    Args:
        shape: of the tensor.
        axis: its axis that counts output channels.
        lengths: number of vectors of each group.
        dim: D.
    """

    shape: tuple[int, ...]
    axis: int
    lengths: tuple[int, ...]
    dim: int

    @classmethod
    def of(cls, shape: Sequence[int], rows_per_lut: int | None = None, dim: int = 1, axis: int = 0) -> Self:
        """Returns the groups of a tensor; the last one may be shorter.

        Args:
            shape: of the tensor.
            rows_per_lut: output channels of a group; None: all of them.
            dim: D.
            axis: the axis that counts output channels.

        Raises:
            ConfigError: there are several groups, and vectors would reach from one into the next.

        >>> Groups.of((5, 2), rows_per_lut=2).lengths
        (4, 4, 2)
        """
        size = torch.Size(shape).numel()
        if rows_per_lut is None or not shape or rows_per_lut >= shape[axis]:
            return cls(tuple(shape), axis, (-(-size // dim),), dim)
        channels = shape[axis]
        lengths = [min(rows_per_lut, channels - c) * (size // channels) for c in range(0, channels, rows_per_lut)]
        if any(length % dim for length in lengths):
            raise ConfigError(
                f"rows_per_lut={rows_per_lut} gives groups of {lengths[0]} weights, which vectors of {dim} do not "
                "divide; set one of the two only."
            )
        return cls(tuple(shape), axis, tuple(length // dim for length in lengths), dim)

    def split(self, w: Tensor) -> Tensor:
        """Returns the vectors, [V, D], one group after the other."""
        if len(self.lengths) == 1:
            return granularity.vectors(w, self.dim)
        return granularity.rows(w, self.axis).reshape(-1, self.dim)

    def join(self, vectors_VD: Tensor) -> Tensor:
        """Returns the tensor of some vectors; the exact inverse of `split`."""
        if vectors_VD.numel() > math.prod(self.shape):
            return granularity.from_vectors(vectors_VD, self.shape)
        if len(self.lengths) == 1:
            return vectors_VD.reshape(self.shape)
        return granularity.from_rows(vectors_VD.reshape(self.shape[self.axis], -1), self.shape, self.axis)


def runs(lengths: Sequence[int]) -> list[tuple[slice, slice, int]]:
    """Returns consecutive groups of equal length: the groups, their vectors, and the length.

    >>> [(groups.start, groups.stop, length) for groups, _, length in runs([4, 4, 2])]
    [(0, 2, 4), (2, 3, 2)]
    """
    found, group, vector = [], 0, 0
    for length, equal in groupby(lengths):
        count = len(list(equal))
        found.append((slice(group, group + count), slice(vector, vector + count * length), length))
        group, vector = group + count, vector + count * length
    return found
