"""The levels of each kind of codes: palettes of floats, int8 palettes, even grids.

Shape suffixes: as in `base`, T = tables (LUT groups), N = blocks of inputs that share a scale.
"""

from dataclasses import dataclass, replace
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from qcompress.artifacts import IntegerWeight, PalettizedWeight, granularity
from qcompress.artifacts.integer_range import IntegerRange
from qcompress.graph.conversion import to_numpy, to_torch
from qcompress.palettes.even_grid import clipped_scale
from qcompress.palettes.scalar import fit_lut
from qcompress.solvers.base import Problem

Doubles = npt.NDArray[np.float64]

_RIDGE: Final = 1e-4  # share of the mean diagonal, towards the old levels
_MOST_REFITTED: Final = 16  # levels of a table; larger tables are dense enough
_REFITTED_AT_ONCE: Final = 1 << 22  # numbers in memory
_LEAST_KEPT: Final = 0.1  # share of the old scale that a new one keeps at least


@dataclass(frozen=True, slots=True, kw_only=True)
class PaletteLevels:
    """Levels of a palette: tables of floats, times a scale for each output channel.

    Args:
        lut: float64 [T, L], sorted; a table with fewer entries repeats its last.
        scale: float64 [O], > 0; None: 1 each.
        rows_per_lut: output channels that share a table; None: all.
        bits: width of a code.
        channels: output channels, O.
        halves: whether entries are rounded to float16.
    """

    lut: torch.Tensor
    scale: torch.Tensor | None
    rows_per_lut: int | None
    bits: int
    channels: int
    halves: bool = False

    @classmethod
    def fit(
        cls,
        rows_OK: Doubles,
        importance_OK: Doubles,
        bits: int,
        rows_per_lut: int | None,
        *,
        scaled: bool,
        halves: bool = False,
    ) -> "PaletteLevels":
        """Return tables found by weighted k-means on the values.

        Args:
            rows_OK: values.
            importance_OK: weight of each value's squared error, at least 0.
            bits: width of a code.
            rows_per_lut: as in the class.
            scaled: whether each output channel has a scale; the first one is its largest magnitude.
            halves: as in the class; needs scales, so that entries are close to 1.
        """
        scale_O = np.abs(rows_OK).max(axis=1, initial=0)
        scale_O = np.where((scale_O > 0) & scaled, scale_O, 1.0)
        values, importance = rows_OK / scale_O[:, None], importance_OK * scale_O[:, None] ** 2
        group_O = granularity.group_of_row(len(rows_OK), rows_per_lut)
        lut = np.zeros((granularity.lut_groups(len(rows_OK), rows_per_lut), 1 << bits))
        for table in range(len(lut)):
            members = group_O == table
            entries = fit_lut(values[members].astype(np.float32), bits, importance[members].astype(np.float32))
            lut[table] = np.pad(entries, (0, lut.shape[1] - len(entries)), mode="edge")
        return cls(
            lut=to_torch(lut), scale=to_torch(scale_O) if scaled else None,
            rows_per_lut=rows_per_lut, bits=bits, channels=len(rows_OK), halves=halves,
        )._rounded()  # fmt: skip

    def _rounded(self) -> Self:
        return replace(self, lut=self.lut.half().double()) if self.halves else self

    @property
    def _table_of(self) -> torch.Tensor:
        return to_torch(granularity.group_of_row(self.channels, self.rows_per_lut).astype(np.int64))

    @property
    def values(self) -> torch.Tensor:
        """float64 [O, L], sorted in each row."""
        values = self.lut[self._table_of]
        return values if self.scale is None else values * self.scale[:, None]

    @property
    def factor(self) -> None:
        """None: scales are in the values."""

    def refit(self, problem: Problem, codes_GRK: torch.Tensor) -> tuple[Self, torch.Tensor]:
        """Return tables fitted to the codes by least squares, then scales."""
        groups, rows, columns = codes_GRK.shape
        entries = self.lut.shape[1]
        if entries > _MOST_REFITTED:
            return self._with_scales(problem, codes_GRK), codes_GRK
        scale_GR = (torch.ones(self.channels) if self.scale is None else self.scale).double().reshape(groups, rows)
        normal = torch.zeros(len(self.lut), entries, entries, dtype=torch.float64)
        right = torch.zeros(len(self.lut), entries, dtype=torch.float64)
        table_of = self._table_of.reshape(groups, rows)
        chunk = max(1, (1 << 24) // (columns * entries * groups))
        for start in range(0, rows, chunk):
            piece = slice(start, start + chunk)
            one_hot = functional.one_hot(codes_GRK[:, piece], entries).double() * scale_GR[:, piece, None, None]
            weighed = torch.matmul(problem.hessian[:, None], one_hot)  # [G, R, K, L]
            tables = table_of[:, piece].reshape(-1)
            normal.index_add_(0, tables, (one_hot.mT @ weighed).reshape(-1, entries, entries))
            right.index_add_(0, tables, (problem.target[:, piece, None] @ weighed)[:, :, 0].reshape(-1, entries))
        ridge_T = _RIDGE * normal.diagonal(dim1=1, dim2=2).mean(1)
        ridge_T = torch.where(ridge_T > 0, ridge_T, torch.ones_like(ridge_T))
        normal = normal + ridge_T[:, None, None] * torch.eye(entries, dtype=torch.float64)
        lut = torch.linalg.solve(normal, right + ridge_T[:, None] * self.lut)
        order = torch.argsort(lut, dim=1, stable=True)
        lut, place = torch.gather(lut, 1, order), torch.argsort(order, dim=1)
        codes = torch.gather(place[table_of], 2, codes_GRK)
        return replace(self, lut=lut)._rounded()._with_scales(problem, codes), codes

    def _with_scales(self, problem: Problem, codes_GRK: torch.Tensor) -> Self:
        if self.scale is None:
            return self
        values = torch.gather(self.lut[self._table_of].reshape(*codes_GRK.shape[:2], -1), 2, codes_GRK)
        weighed = values @ problem.hessian
        best = ((problem.target * weighed).sum(2) / (values * weighed).sum(2)).reshape(-1)
        return replace(self, scale=torch.where(torch.isfinite(best) & (best > 0), best, self.scale))

    def artifact(self, codes_OK: npt.NDArray[np.uint8], shape: tuple[int, ...], axis: int) -> PalettizedWeight:
        """Return the weight of the codes; unused entries are dropped."""
        group_O = granularity.group_of_row(self.channels, self.rows_per_lut)
        codes_OK, luts = codes_OK.copy(), []
        for table, lut in enumerate(to_numpy(self.lut).astype(np.float32)):
            members = group_O == table
            is_used = np.bincount(codes_OK[members].ravel(), minlength=len(lut)) > 0
            codes_OK[members] = (np.cumsum(is_used) - 1).astype(np.uint8)[codes_OK[members]]
            luts.append(lut[is_used])
        entries = max(len(lut) for lut in luts)
        stacked: Any = np.stack([np.pad(lut, (0, entries - len(lut)), mode="edge") for lut in luts])
        return PalettizedWeight(
            codes=_shaped(codes_OK, shape, axis),
            lut=stacked.astype(np.float16) if self.halves else stacked,
            bits=self.bits,
            axis=axis,
            rows_per_lut=self.rows_per_lut,
            scale=None if self.scale is None else to_numpy(self.scale).astype(np.float32),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerPaletteLevels:
    """Levels of an int8 palette: tables of integers, times a scale for each output channel; for int8 kernels.

    Args:
        floats: the tables, in steps: entries in [-largest, largest].
        largest: the largest magnitude of an entry.
    """

    floats: PaletteLevels
    largest: int

    @classmethod
    def fit(
        cls, rows_OK: Doubles, importance_OK: Doubles, bits: int, rows_per_lut: int | None, *, largest: int
    ) -> "IntegerPaletteLevels":
        """Return tables found by weighted k-means and rounded; see `PaletteLevels.fit`."""
        floats = PaletteLevels.fit(rows_OK, importance_OK, bits, rows_per_lut, scaled=True)
        assert floats.scale is not None
        return cls(
            floats=replace(floats, lut=floats.lut * largest, scale=floats.scale / largest), largest=largest
        )._rounded()

    def _rounded(self) -> Self:
        """Return the levels with integer entries, which are first scaled to use the whole range."""
        assert self.floats.scale is not None
        lut = self.floats.lut
        size = lut.abs().amax()
        grown = self.largest / size if size > 0 else torch.ones(())
        rounded = torch.round(lut * grown).clamp(-self.largest, self.largest)
        return replace(self, floats=replace(self.floats, lut=rounded, scale=self.floats.scale / grown))

    @property
    def values(self) -> torch.Tensor:
        """float64 [O, L], sorted in each row."""
        return self.floats.values

    @property
    def factor(self) -> None:
        """None: scales are in the values."""

    def refit(self, problem: Problem, codes_GRK: torch.Tensor) -> tuple[Self, torch.Tensor]:
        """Return tables fitted by least squares and rounded, then scales for the rounded tables."""
        floats, codes = self.floats.refit(problem, codes_GRK)
        rounded = replace(self, floats=floats)._rounded()
        return replace(rounded, floats=rounded.floats._with_scales(problem, codes)), codes

    def artifact(self, codes_OK: npt.NDArray[np.uint8], shape: tuple[int, ...], axis: int) -> PalettizedWeight:
        """Return the weight of the codes."""
        small = self.floats.artifact(codes_OK, shape, axis)
        return replace(small, lut=small.lut.astype(np.int8))


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
            ridge = _RIDGE * normal.diagonal(dim1=2, dim2=3).mean(2)
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
        codes, scale = _shaped(integers, shape, axis), to_numpy(self.scale).astype(np.float32)
        if self.block_size is None:
            return IntegerWeight(codes=codes, scale=scale, bits=self.bits, axis=axis)
        inputs = granularity.input_axis(len(shape), axis)
        scale_shape = (*shape[:inputs], scale.shape[1], *shape[inputs + 1 :])
        return IntegerWeight(
            codes=codes,
            scale=_shaped(scale, scale_shape, axis),
            bits=self.bits,
            axis=inputs,
            block_size=self.block_size,
        )


def _shaped(rows_OK: npt.NDArray[Any], shape: tuple[int, ...], axis: int) -> npt.NDArray[Any]:
    return np.array(granularity.from_rows(rows_OK, shape, axis), order="C")
