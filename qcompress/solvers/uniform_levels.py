"""The levels of even grids: integers times scales.

Shape suffixes: as in `base`, N = blocks of inputs that share a scale.
"""

from dataclasses import dataclass, replace
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from qcompress.artifacts import IntegerWeight, granularity
from qcompress.artifacts.integer_range import IntegerRange
from qcompress.graph.conversion import to_numpy, to_torch
from qcompress.palettes.even_grid import clipped_scale
from qcompress.solvers.base import RIDGE, Doubles, Problem

_REFITTED_AT_ONCE: Final = 1 << 22  # numbers in memory
_LEAST_KEPT: Final = 0.1  # share of the old scale that a new one keeps at least


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformLevels:
    """Levels of an even grid around 0, with a scale for each output channel or for each block of its inputs.

    Args:
        scale: float64 [O], > 0, or [O, N] with blocks.
        bits: width of a code.
        limits: the legal codes.
        columns: weights of one output channel, K.
        block_size: consecutive inputs that share a scale; None: all inputs.
    """

    scale: torch.Tensor
    bits: int
    limits: IntegerRange
    columns: int
    block_size: int | None = None

    @classmethod
    def fit(
        cls,
        rows_OK: Doubles,
        importance_OK: Doubles,
        bits: int,
        limits: IntegerRange,
        block_size: int | None = None,
    ) -> "UniformLevels":
        """Return the scale of each row or block with the least weighted squared error."""
        if block_size is None:
            scale = clipped_scale(rows_OK, limits, importance_OK)
        else:
            blocks: Any = granularity.blocks(rows_OK, block_size)
            importance: Any = granularity.blocks(importance_OK, block_size)
            flat = (-1, blocks.shape[2])
            scale = clipped_scale(blocks.reshape(flat), limits, importance.reshape(flat)).reshape(blocks.shape[:2])
        return cls(scale=to_torch(scale), bits=bits, limits=limits, columns=rows_OK.shape[1], block_size=block_size)

    @property
    def _integers(self) -> torch.Tensor:
        return torch.arange(self.limits.n, self.limits.p + 1, dtype=torch.float64)

    @property
    def values(self) -> torch.Tensor:
        """float64 [O, L], sorted in each row; integers if blocks have factors."""
        if self.block_size is None:
            return self.scale[:, None] * self._integers
        return self._integers.expand(len(self.scale), -1)

    @property
    def factor(self) -> torch.Tensor | None:
        """float64 [O, K], the scale of each weight's block; None without blocks: scales are in the values."""
        if self.block_size is None:
            return None
        return self.scale.repeat_interleave(min(self.block_size, self.columns), dim=1)[:, : self.columns]

    def refit(self, problem: Problem, codes_GRK: torch.Tensor) -> tuple[Self, torch.Tensor]:
        """Return scales fitted to the codes by least squares."""
        integers = self._integers[codes_GRK]
        if self.block_size is not None:
            block_size = min(self.block_size, self.columns)
            return replace(self, scale=self._block_scales(problem, integers, block_size)), codes_GRK
        weighed = integers @ problem.hessian
        best = ((problem.target * weighed).sum(2) / (integers * weighed).sum(2)).reshape(-1)
        return replace(self, scale=torch.where(torch.isfinite(best) & (best > 0), best, self.scale)), codes_GRK

    def _block_scales(self, problem: Problem, integers_GRK: torch.Tensor, block_size: int) -> torch.Tensor:
        """Return [O, N]: the best scales of each row's blocks together, or as close to them as all stay above 0."""
        groups, rows, columns = integers_GRK.shape
        scale_GRN = self.scale.reshape(groups, rows, -1)
        count = scale_GRN.shape[2]
        missing = count * block_size - columns
        padded = functional.pad(integers_GRK, (0, missing))
        hessian = functional.pad(problem.hessian, (0, missing, 0, missing))
        target = functional.pad(problem.target, (0, missing)) @ hessian
        found = scale_GRN.clone()
        chunk = max(1, _REFITTED_AT_ONCE // max(1, groups * count * max(count, block_size)))
        for start in range(0, rows, chunk):
            piece = slice(start, start + chunk)
            q = padded[:, piece].reshape(groups, -1, count, block_size)
            right = (target[:, piece].reshape(q.shape) * q).sum(3)
            normal = torch.empty(*q.shape[:3], count, dtype=torch.float64)
            for n in range(count):
                inputs = slice(n * block_size, (n + 1) * block_size)
                normal[:, :, n] = ((q[:, :, n] @ hessian[:, inputs]).reshape(q.shape) * q).sum(3)
            ridge = RIDGE * normal.diagonal(dim1=2, dim2=3).mean(2)
            ridge = torch.where(ridge > 0, ridge, torch.ones_like(ridge))[..., None]
            before = scale_GRN[:, piece]
            best = torch.linalg.solve(normal + torch.diag_embed(ridge.expand_as(right)), right + ridge * before)
            # The error falls all the way from the old scales to the best ones.
            least = _LEAST_KEPT * before
            way = torch.where(best < least, (before - least) / (before - best), 1.0).amin(2, keepdim=True)
            found[:, piece] = before + way * (best - before)
        return found.reshape(self.scale.shape)

    def artifact(self, codes_OK: npt.NDArray[np.uint8], shape: tuple[int, ...], axis: int) -> IntegerWeight:
        """Return the weight of the codes."""
        integers = (codes_OK.astype(np.int16) + self.limits.n).astype(np.int8)
        codes = np.array(granularity.from_rows(integers, shape, axis), order="C")
        scale = to_numpy(self.scale).astype(np.float32)
        if self.block_size is None:
            return IntegerWeight(codes=codes, scale=scale, bits=self.bits, axis=axis)
        inputs = granularity.input_axis(len(shape), axis)
        scale_shape = (*shape[:inputs], scale.shape[1], *shape[inputs + 1 :])
        return IntegerWeight(
            codes=codes,
            scale=np.array(granularity.from_rows(scale, scale_shape, axis), order="C"),
            bits=self.bits,
            axis=inputs,
            block_size=self.block_size,
        )
