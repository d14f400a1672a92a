"""Even grids: weights rounded to the nearest multiple of a step, without data or training."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompress.artifacts import IntegerWeight, granularity
from qcompress.artifacts.base import FLOAT_DTYPES, Floats, broadcast_scale
from qcompress.artifacts.integer_range import IntegerRange
from qcompress.artifacts.packing import check_bits
from qcompress.errors import ConfigError

F64 = npt.NDArray[np.float64]

_SHRINKS: Final = np.geomspace(1.0, 0.05, 25)  # candidate steps over the step that reaches the largest magnitude
_FITS: Final = 3  # times that a step is fitted to its codes
_CHUNK: Final = 1 << 15  # values at once, so that they fit into the cache
_TINY: Final = np.finfo(np.float64).tiny
REDUCED_BITS: Final = 7  # of codes with reduce_range: the sum of two int8 products then fits 16 bits


def round_to_nearest(
    values: npt.NDArray[Any],
    bits: int,
    axis: int = 0,
    *,
    reduce_range: bool = False,
    per_channel: bool = True,
    clip: bool = False,
    block_size: int | None = None,
) -> IntegerWeight:
    """Return a weight on a symmetric grid of signed codes, whose largest code stands for the largest magnitude.

    Args:
        values: float32, float16 or bfloat16, any shape, finite; not modified.
        bits: width of a code, 2 to 8.
        axis: the axis that counts output channels.
        reduce_range: whether 8-bit codes stay in [-64, 63]: CPUs without VNNI saturate sums of products of larger ones.
        per_channel: whether each output channel has a scale, or the tensor has one.
        clip: whether scales may be smaller, so that a few large values are clipped and the squared error is least.
        block_size: consecutive inputs of an output channel that share a scale; None: all inputs.

    Returns:
        The artifact, without zero points; with blocks, its axis is the one that counts inputs. Its scale is max|w| / p,
        p the largest code, or less with `clip`; 1.0 if that is not a normal float32 above 0 (channels of zeros).

    Raises:
        ConfigError: bits outside 2..8, another dtype, NaN or Inf, or blocks of a weight without an input axis.

    >>> w = round_to_nearest(np.array([[-0.5, 0.25, 1.5], [0.0, 0.0, 0.0]], np.float32), bits=3)
    >>> w.codes.tolist(), w.scale.tolist()
    ([[-1, 0, 3], [0, 0, 0]], [0.5, 1.0])
    """
    check_bits(bits)
    if bits == 1:
        raise ConfigError(
            "bits must be in [2, 8] for an even grid (signed codes of 1 bit are only -1 and 0), got 1; "
            'use scheme = "palette", which writes 1 bit as two values.'
        )
    wide = finite_floats(values, "round")
    limits = IntegerRange(min(bits, REDUCED_BITS) if reduce_range else bits, signed=True)
    if block_size is not None:
        return _in_blocks(wide, bits, limits, axis, block_size, clip=clip)
    scale = symmetric_scale(wide, limits.p, axis if per_channel else None)
    if clip:
        rows_OK: Any = granularity.rows(wide, axis) if scale.ndim else wide.reshape(1, -1)
        scale = _normal_clipped(rows_OK, limits).reshape(scale.shape)
    codes = np.clip(np.rint(in_steps(wide, scale, axis)), limits.n, limits.p)
    return IntegerWeight(
        codes=np.array(codes, np.int8, order="C"), scale=scale, bits=bits, axis=axis if scale.ndim else None
    )


def _in_blocks(
    values: Floats, bits: int, limits: IntegerRange, axis: int, block_size: int, *, clip: bool
) -> IntegerWeight:
    """Return a weight with one scale for each block of inputs."""
    if values.ndim < 2:
        raise ConfigError(
            f"block_size needs a weight with inputs and outputs, got {block_size} for shape {list(values.shape)}; "
            "remove it."
        )
    inputs = granularity.input_axis(values.ndim, axis)
    moved = np.moveaxis(values, inputs, -1)
    rows_OK = moved.reshape(int(np.prod(moved.shape[:-1])), moved.shape[-1])
    blocks_ONB: Any = granularity.blocks(rows_OK, block_size)
    flat: Any = blocks_ONB.reshape(-1, blocks_ONB.shape[2])
    scale = _normal_clipped(flat, limits) if clip else symmetric_scale(flat, limits.p, 0)
    codes = np.clip(np.rint(in_steps(flat, scale, 0)), limits.n, limits.p)
    codes = codes.reshape(len(rows_OK), flat.size // max(1, len(rows_OK)))[:, : rows_OK.shape[1]].reshape(moved.shape)
    return IntegerWeight(
        codes=np.array(np.moveaxis(codes, -1, inputs), np.int8, order="C"),
        scale=np.array(np.moveaxis(scale.reshape(*moved.shape[:-1], blocks_ONB.shape[1]), -1, inputs), order="C"),
        bits=bits,
        axis=inputs,
        block_size=block_size,
    )


def _normal_clipped(rows_OK: Floats, limits: IntegerRange) -> Floats:
    """Return `clipped_scale` as normal float32 numbers."""
    return np.maximum(clipped_scale(rows_OK, limits), np.finfo(np.float32).tiny).astype(np.float32)


def clipped_scale(rows_OK: Floats | F64, limits: IntegerRange, importance_OK: F64 | None = None) -> F64:
    """Return the step of each row with the least squared error, of candidates that are fitted to their codes.

    Args:
        rows_OK: values.
        limits: the legal codes.
        importance_OK: weight of each value's squared error; None: equal.

    Returns:
        float64 [O]; 1.0 for rows of zeros.

    >>> row = np.append(np.linspace(-1, 1, 1000), 4)[None]
    >>> clipped_scale(row, IntegerRange(3, signed=True)).round(2).tolist()  # 4 / 3 = 1.33 would reach the outlier
    [0.3]
    """
    found_O = np.empty(len(rows_OK))
    at_once = max(1, _CHUNK // max(1, rows_OK.shape[1]))
    for start in range(0, len(rows_OK), at_once):
        part = slice(start, start + at_once)
        mass_OK = None if importance_OK is None else importance_OK[part]
        found_O[part] = _clipped_scale(rows_OK[part].astype(np.float64), limits, mass_OK)
    return found_O


def _clipped_scale(rows_OK: F64, limits: IntegerRange, importance_OK: F64 | None) -> F64:
    size_O = np.abs(rows_OK).max(axis=1, initial=0) / max(limits.p, 1)
    size_O = np.where(size_O >= np.finfo(np.float32).tiny, size_O, 1.0)
    best_O, least_O = size_O, np.full(len(rows_OK), np.inf)
    weighed_OK = rows_OK if importance_OK is None else importance_OK * rows_OK
    codes_OK = np.empty_like(rows_OK)
    for shrink in _SHRINKS:
        scale_O = size_O * shrink
        for _ in range(_FITS):
            np.divide(rows_OK, scale_O[:, None], out=codes_OK)
            np.clip(np.rint(codes_OK, out=codes_OK), limits.n, limits.p, out=codes_OK)
            # The squared error minus that of all codes 0: enough to compare.
            product_O = np.einsum("ok,ok->o", codes_OK, weighed_OK)
            masses = (codes_OK, codes_OK) if importance_OK is None else (codes_OK * importance_OK, codes_OK)
            square_O = np.einsum("ok,ok->o", *masses)
            error_O = scale_O * (scale_O * square_O - 2 * product_O)
            best_O, least_O = np.where(error_O < least_O, scale_O, best_O), np.minimum(error_O, least_O)
            fitted_O = product_O / np.maximum(square_O, _TINY)
            scale_O = np.where(fitted_O > 0, fitted_O, scale_O)
    return best_O


def symmetric_scale(values: Floats, largest: int, axis: int | None) -> Floats:
    """Return the step of which `largest` reach the largest magnitude.

    Args:
        values: float32, finite.
        largest: the largest code, at least 1.
        axis: the axis whose indices have a step each; None: one step for all.

    Returns:
        float32 [O], or 0-d without an axis or for a 0-d weight; 1.0 if the step is not a normal float32 above 0.

    >>> symmetric_scale(np.array([[-3, 1], [0, 0]], np.float32), 3, axis=0).tolist()
    [1.0, 1.0]
    """
    if axis is None or values.ndim == 0:
        magnitude = np.abs(values).max(initial=0)
    else:
        magnitude = np.abs(granularity.rows(values, axis)).max(axis=1, initial=0)
    scale = np.asarray(magnitude / np.float32(largest), np.float32)
    return np.where(scale >= np.finfo(np.float32).tiny, scale, np.float32(1))


def in_steps(values: Floats, scale: Floats, axis: int) -> npt.NDArray[np.float64]:
    """Return values / scale in float64, exact enough to round to integers and to halves.

    Args:
        values: float32.
        scale: float32, 0-d or [O] along `axis`.
        axis: the axis that counts output channels.
    """
    return np.asarray(values / broadcast_scale(scale, values.shape, axis).astype(np.float64))


def finite_floats(values: npt.NDArray[Any], verb: str) -> Floats:
    """Return the values as float32.

    Args:
        values: float32, float16 or bfloat16.
        verb: what is done to the weights, for error messages.

    Raises:
        ConfigError: another dtype, or NaN or Inf.
    """
    if values.dtype not in FLOAT_DTYPES:
        raise ConfigError(f"Weights to {verb} must be float32, float16 or bfloat16, got {values.dtype}.")
    wide = values.astype(np.float32, copy=False)
    if not np.isfinite([wide.min(initial=0), wide.max(initial=0)]).all():  # with a NaN inside, both are NaN
        wrong = np.count_nonzero(~np.isfinite(wide))
        raise ConfigError(f"Weights to {verb} must be finite, got {wrong} NaN or Inf among {values.size}.")
    return wide
