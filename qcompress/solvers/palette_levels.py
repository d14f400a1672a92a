"""The levels of palettes: tables of floats, and tables of integers for int8 kernels.

Shape suffixes: as in `base`, T = tables (LUT groups).
"""

from dataclasses import dataclass, replace
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from qcompress.artifacts import PalettizedWeight, granularity
from qcompress.graph.conversion import to_numpy, to_torch
from qcompress.palettes.scalar import fit_lut
from qcompress.solvers.base import RIDGE, Doubles, Problem

_MOST_REFITTED: Final = 16  # levels of a table; larger tables are dense enough


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
        ridge_T = RIDGE * normal.diagonal(dim1=1, dim2=2).mean(1)
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
            codes=np.array(granularity.from_rows(codes_OK, shape, axis), order="C"),
            lut=stacked.astype(np.float16) if self.halves else stacked,
            bits=self.bits,
            axis=axis,
            rows_per_lut=self.rows_per_lut,
            scale=None if self.scale is None else to_numpy(self.scale).astype(np.float32),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8PaletteLevels:
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
    ) -> "Int8PaletteLevels":
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
        weight = self.floats.artifact(codes_OK, shape, axis)
        return replace(weight, lut=weight.lut.astype(np.int8))
