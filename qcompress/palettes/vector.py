"""Vector k-means: palettes whose entries are several consecutive weights.

Source: Bachem et al., Scalable k-Means Clustering via Lightweight Coresets, 2018, algorithm 1 (points are drawn half
evenly, half by their squared distance to the mean); Arthur and Vassilvitskii, k-means++, 2007, section 2, in the greedy
form of its section 6 (of several candidates, the one that lowers the error most); Lloyd's iterations.
Code: written from the papers; no code copied.
Deviations: the draws of the coreset are stratified. For few entries, several starts are tried. All sums run in a fixed
order, so that a seed gives the same palette on any number of threads.

Shape suffixes: V = vectors, D = vector_dim, K = palette entries, S = points of the coreset, C = candidates.
"""

from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompress.artifacts import PalettizedWeight, granularity
from qcompress.artifacts.packing import check_bits
from qcompress.errors import ConfigError
from qcompress.palettes.even_grid import finite_floats, symmetric_scale
from qcompress.palettes.int8_palette import LARGEST
from qcompress.palettes.scalar import checked_importance, half_shift
from qcompress.plan.fields import LutDtype

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

DIMS: Final = (2, 4, 8)

_CORESET_PER_ENTRY: Final = 128
_LEAST_CORESET: Final = 1 << 14
_SEEDED: Final = 1 << 13  # points of the coreset that k-means++ chooses from
_MOST_STARTS: Final = 8
_STARTS: Final = 128  # starts times entries
_FIRST_STEPS: Final = 10  # of every start
_STEPS: Final = 60  # of the best start
_SETTLED: Final = 2e-4  # share of the error; a step that gains less is the last
_FULL_STEPS: Final = 2  # on all vectors
# Distances are computed for this many vectors and entries at once, so that they stay in the cache.
_PIECE: Final = 1 << 10
_BLOCK: Final = 64
_PAIRS: Final = 1 << 17
_FAR: Final = 1 / 512  # share of the vectors on either side of a dimension
_MOST_CELLS: Final = 1 << 12
_SLACK: Final = 1 + 2**-10  # for rounding
_TINY: Final = 1e-300


def palettize_vectors(
    weight: npt.NDArray[Any],
    bits: int,
    vector_dim: int,
    axis: int = 0,
    importance: npt.NDArray[Any] | None = None,
    seed: int = 0,
    lut_dtype: LutDtype = "float32",
) -> PalettizedWeight:
    """Return a weight as codes into one palette of vectors: `vector_dim` consecutive row-major elements share a code.

    Args:
        weight: float32, float16 or bfloat16, finite; not modified.
        bits: width of a code, 1 to 8; bits / vector_dim for each weight.
        vector_dim: 2, 4 or 8; if it does not divide the number of elements, the tail is filled with the last element,
            which has no importance there.
        axis: the axis that counts output channels.
        importance: weight of each element's squared error, shape of `weight`, finite, at least 0; None or all 0: equal.
        seed: of the random draws.
        lut_dtype: float32, float16 or int8. Entries are rounded to it, and codes point to the nearest rounded entries.

    Returns:
        The artifact. Each code points to the nearest entry, the first of equally near ones. The palette is sorted and
        holds no unused entries. It has a scale with int8, and with float16 if the values are out of its range.

    Raises:
        ConfigError: bits or vector_dim out of range, another dtype, NaN or Inf, or an invalid importance.

    >>> w = palettize_vectors(np.array([[1, 2, 5, 6], [5, 6, 1, 2]], np.float32), bits=1, vector_dim=2)
    >>> w.lut.tolist(), w.codes.tolist()
    ([[[1.0, 2.0], [5.0, 6.0]]], [0, 1, 1, 0])
    """
    check_bits(bits)
    if vector_dim not in DIMS:
        raise ConfigError(f"vector_dim must be 2, 4 or 8, got {vector_dim!r}.")
    values = finite_floats(weight, "palettize")
    mass = None if importance is None else checked_importance(importance, weight.shape)
    if mass is not None and not mass.any():
        mass = None
    # Relative to a power of two above the largest value: no square overflows.
    exponent = int(np.frexp(np.abs(values).max(initial=0))[1])
    points = _Vectors(
        x=_columns(np.ldexp(values, -exponent), vector_dim),
        mass=_masses(None if mass is None else mass / float(mass.max()), values.shape, vector_dim),
    )
    lut_KD, codes = np.zeros((0, vector_dim), np.float32), np.empty(len(points), np.int64)
    if len(points):  # an empty weight has an empty palette
        order = points.near_together()
        points = points.at(order)
        lut_KD = points.fit(1 << bits, np.random.default_rng(seed))
    entries_KD, scale = stored_entries(np.ldexp(lut_KD, exponent), lut_dtype)
    stored_KD = np.unique(entries_KD, axis=0) if len(entries_KD) else entries_KD
    if len(points):
        decoded_KD = np.ldexp(stored_KD.astype(np.float64) * (1.0 if scale is None else float(scale)), -exponent)
        codes[order] = points.assigned(decoded_KD)[0]
    is_used = np.bincount(codes, minlength=len(stored_KD)) > 0
    return PalettizedWeight(
        codes=(np.cumsum(is_used) - 1)[codes].astype(np.uint8),
        lut=stored_KD[is_used][None],
        bits=bits,
        axis=axis,
        scale=scale,
        weight_shape=weight.shape,
    )


def _masses(mass: npt.NDArray[Any] | None, shape: tuple[int, ...], vector_dim: int) -> Floats | None:
    """Return the masses [D, V], 0 for the elements that fill the tail; None: all equal."""
    missing = -int(np.prod(shape)) % vector_dim
    if mass is None and not missing:
        return None
    mass_DV = _columns(np.ones(shape) if mass is None else mass, vector_dim)
    mass_DV[vector_dim - missing :, -1:] = 0
    return mass_DV


def stored_entries(lut: Floats, lut_dtype: LutDtype) -> tuple[npt.NDArray[Any], Floats | None]:
    """Return palette entries in the type that they are stored in, and the scale that multiplies them; None: 1.

    Args:
        lut: float32, any shape, finite.
        lut_dtype: float32, float16 or int8.

    >>> entries, scale = stored_entries(np.array([[-1.0, 0.5]], np.float32), "int8")
    >>> entries.tolist(), round(float(scale), 5)
    ([[-127, 64]], 0.00787)
    """
    scale, steps = None, lut
    if lut_dtype == "int8":
        scale = symmetric_scale(lut, LARGEST, None)
        steps = np.rint(lut / scale)
    elif lut_dtype == "float16" and (shift := half_shift(lut)):
        scale, steps = np.array(2.0**shift, np.float32), np.ldexp(lut, -shift)
    return steps.astype(lut_dtype), scale


def _columns(values: npt.NDArray[Any], vector_dim: int) -> Floats:
    return np.array(granularity.vectors(values, vector_dim).T, np.float32, order="C")


@dataclass(frozen=True, slots=True)
class _Vectors:
    """Vectors as columns.

    Args:
        x: [D, V], magnitudes of at most 1.
        mass: [D, V], weight of each element; None: 1.
        share: [V], number of vectors that each one stands for; None: 1.
    """

    x: Floats
    mass: Floats | None = None
    share: F64 | None = None

    def __len__(self) -> int:
        return int(self.x.shape[1])

    def at(self, where_S: I64) -> "_Vectors":
        """Return the vectors at the given indices."""
        return _Vectors(
            np.take(self.x, where_S, axis=1),
            None if self.mass is None else np.take(self.mass, where_S, axis=1),
            None if self.share is None else self.share[where_S],
        )

    def near_together(self) -> I64:
        """Return an order in which near vectors mostly follow each other, so that pieces have small bounding boxes.

        Each dimension is cut into cells of equally many vectors; the few far vectors have separate cells.
        """
        if len(self) <= _PIECE:
            return np.arange(len(self))
        cells = int(min(len(self) / _PIECE, _MOST_CELLS) ** (1 / len(self.x)))
        parts = np.concatenate([[_FAR], np.arange(1, cells) / cells, [1 - _FAR]])
        cell_V = np.zeros(len(self), np.uint16)
        for x_V in self.x:
            cuts = np.quantile(x_V[:: -(-len(self) // _SEEDED)], parts)
            cell_V = cell_V * np.uint16(cells + 2) + np.searchsorted(cuts, x_V).astype(np.uint16)
        return np.argsort(cell_V, kind="stable")

    def fit(self, entries: int, random: np.random.Generator) -> Floats:
        """Return at most `entries` vectors [K, D] with a small total squared distance to the points."""
        sample = self.coreset(max(_LEAST_CORESET, _CORESET_PER_ENTRY * entries), random)
        seeded = sample.at(np.arange(0, len(sample), -(-len(sample) // _SEEDED)))
        starts = [seeded.seeds(entries, random)]
        if len(starts[0]) < entries:  # few points are distinct, or they were not drawn
            sample = seeded = self.distinct()
            starts = [sample.seeds(entries, random)]
        while len(starts) < min(_MOST_STARTS, _STARTS // entries):
            starts.append(seeded.seeds(entries, random))
        _, lut_KD = min((sample.lloyd(start_KD, _FIRST_STEPS) for start_KD in starts), key=itemgetter(0))
        _, lut_KD = sample.lloyd(lut_KD, _STEPS)
        return lut_KD if len(sample) == len(self) else self.lloyd(lut_KD, _FULL_STEPS)[1]

    def coreset(self, count: int, random: np.random.Generator) -> "_Vectors":
        """Return `count` points with shares, whose error for any palette is close to that of all points."""
        if len(self) <= count:
            return self
        mean_D = self.means(np.zeros(len(self), np.int64), np.zeros((1, len(self.x)), np.float32))
        far_V = self.squared(mean_D)[0].astype(np.float64)
        even_V = np.ones(len(self)) if self.mass is None else self.mass.sum(axis=0, dtype=np.float64)
        likely_V = even_V / (2 * even_V.sum()) + far_V / max(2 * far_V.sum(), _TINY)
        sums_V = np.cumsum(likely_V)
        drawn = _drawn(sums_V, (np.arange(count) + random.random(count)) / count)
        return replace(self.at(drawn), share=sums_V[-1] / (count * likely_V[drawn]))

    def distinct(self) -> "_Vectors":
        """Return the distinct vectors; masses of equal ones are added."""
        x_VD, codes = np.unique(self.x.T, axis=0, return_inverse=True)
        masses = [np.bincount(codes.ravel(), self._mass(d)) for d in range(len(self.x))]
        return _Vectors(np.array(x_VD.T, order="C"), np.array(masses, np.float32))

    def seeds(self, entries: int, random: np.random.Generator) -> Floats:
        """Return `entries` start vectors by greedy k-means++, or fewer if fewer vectors are distinct."""
        share_V = np.ones(len(self)) if self.share is None else self.share
        chosen = [int(_drawn(np.cumsum(share_V), random.random(1))[0])]
        squared_V = self.squared(self.x[:, chosen].T)[0]
        candidates = 2 + int(np.log(entries))
        while len(chosen) < entries:
            sums_V = np.cumsum(share_V * squared_V)
            if sums_V[-1] <= 0:
                break
            drawn = _drawn(sums_V, random.random(candidates))
            squared_CV = np.minimum(self.squared(self.x[:, drawn].T), squared_V)
            best = int(np.argmin((squared_CV * share_V).sum(axis=1)))
            chosen.append(int(drawn[best]))
            squared_V = squared_CV[best]
        return np.array(self.x[:, chosen].T, order="C")

    def lloyd(self, lut_KD: Floats, steps: int) -> tuple[float, Floats]:
        """Return the error before the last step, and the palette after it."""
        last = np.inf
        for _ in range(steps):
            codes_V, squared_V = self.assigned(lut_KD)
            error_V = squared_V if self.share is None else squared_V * self.share
            lut_KD = self.means(codes_V, lut_KD)
            empty = np.flatnonzero(np.bincount(codes_V, minlength=len(lut_KD)) == 0)
            if len(empty):  # each moves to one of the vectors with the largest errors
                worst = np.argsort(-error_V, kind="stable")[: len(empty)]
                lut_KD[empty[: len(worst)]] = self.x[:, worst].T
            error = float(error_V.sum(dtype=np.float64))
            if last - error <= _SETTLED * error:
                break
            last = error
        return error, lut_KD

    def means(self, codes_V: I64, lut_KD: Floats) -> Floats:
        """Return the mean of each code's vectors; elements without mass keep their values."""
        made_KD = lut_KD.copy()
        for d, x_V in enumerate(self.x):
            mass_V = self._mass(d)
            mass_K = np.bincount(codes_V, mass_V, len(lut_KD))
            sum_K = np.bincount(codes_V, x_V if mass_V is None else x_V * mass_V, len(lut_KD))
            np.divide(sum_K, mass_K, out=made_KD[:, d], where=mass_K > 0, casting="same_kind")
        return made_KD

    def _mass(self, d: int) -> F64 | None:
        """Return the mass of one dimension times the share of each vector; None: 1."""
        if self.mass is None:
            return self.share
        mass_V = self.mass[d].astype(np.float64)
        return np.asarray(mass_V if self.share is None else mass_V * self.share)

    def assigned(self, lut_KD: Floats | F64) -> tuple[I64, Floats | F64]:
        """Return the code of the nearest entry for each vector, and its squared distance in the palette's precision.

        The code replaces the lowest bits of the distance, so that one minimum finds both. Vectors are compared piece by
        piece with the entries that may be the nearest to one of a piece.
        """
        integer: Any = np.int32 if lut_KD.dtype == np.float32 else np.int64
        code_bits = integer((1 << max(1, (len(lut_KD) - 1).bit_length())) - 1)
        best_V = np.full(len(self), np.iinfo(integer).max, integer)
        size = min(max(_PIECE, _PAIRS // len(lut_KD)), 8 * _PIECE)
        starts_P = np.arange(0, len(self), size)
        may_KP = self._may_be_nearest(lut_KD, starts_P)
        for start, may_K in zip(starts_P, may_KP.T, strict=True):
            codes = np.flatnonzero(may_K).astype(integer)
            piece = slice(start, start + size)
            for first in range(0, len(codes), _BLOCK):
                block = codes[first : first + _BLOCK]
                both = self.squared(lut_KD[block], piece).view(integer)
                both &= ~code_bits
                both |= block[:, None]
                np.minimum(best_V[piece], both.min(axis=0), out=best_V[piece])
        return (best_V & code_bits).astype(np.int64), (best_V & ~code_bits).view(lut_KD.dtype)

    def _may_be_nearest(self, lut_KD: Floats | F64, starts_P: I64) -> npt.NDArray[np.bool_]:
        """Return [K, P]: whether an entry may be the nearest to a vector in a piece's bounding box."""
        least_KP = np.zeros((len(lut_KD), len(starts_P)), lut_KD.dtype)
        most_KP = np.zeros_like(least_KP)
        for d in range(len(self.x)):
            entry_K = lut_KD[:, d, None]
            below_KP = np.minimum.reduceat(self.x[d], starts_P) - entry_K
            above_KP = entry_K - np.maximum.reduceat(self.x[d], starts_P)
            nearest_KP = np.maximum(np.maximum(below_KP, above_KP), 0) ** 2
            farthest_KP = np.minimum(below_KP, above_KP) ** 2
            if self.mass is not None:
                nearest_KP *= np.minimum.reduceat(self.mass[d], starts_P)
                farthest_KP *= np.maximum.reduceat(self.mass[d], starts_P)
            least_KP += nearest_KP
            most_KP += farthest_KP
        return np.asarray(least_KP <= _SLACK * most_KP.min(axis=0))

    def squared(self, lut_KD: Floats | F64, piece: slice = slice(None)) -> Floats | F64:
        """Return squared distances [K, V], elements weighted by their mass."""
        total: Any = None
        for d, x_V in enumerate(self.x[:, piece]):
            apart = lut_KD[:, d, None] - x_V
            apart *= apart
            if self.mass is not None:
                apart *= self.mass[d, piece]
            total = apart if total is None else np.add(total, apart, out=total)
        return np.asarray(total)


def _drawn(sums_V: F64, parts: F64) -> I64:
    """Return the indices at which the running sums reach the given shares (below 1) of the last sum."""
    last = np.searchsorted(sums_V, sums_V[-1])
    return np.asarray(np.minimum(np.searchsorted(sums_V, parts * sums_V[-1], side="right"), last))
