"""Compress a weight by itself, without data: each value goes to the nearest of the levels that its plan allows."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qcompress.artifacts import Artifact, FloatWeight, PalettizedWeight
from qcompress.palettes.even_grid import round_to_nearest
from qcompress.palettes.int8_palette import palettize_int8
from qcompress.palettes.scalar import palettize
from qcompress.palettes.vector import palettize_vectors
from qcompress.plan.fields import LutDtype
from qcompress.plan.resolve import TensorPlan
from qcompress.posthoc.schemes import CodeKind, better, codes_for, keeping_zeros

_AS_GOOD: Final = 10 ** (0.5 / 10)  # factor of squared error that a single scale per tensor may cost: 0.5 dB
_UNCLIPPED: Final = 8  # bits from which clipping gains nothing
_HALF_BITS: Final = 16
_WIDEST: Final = 8  # bits at which a table is largest, and an even grid is as good
_NODES: Final = 128  # bytes that decoding a small weight takes in a file at least
_NOT_A_WEIGHT: Final = "not a weight"
_PARAMETRIZED: Final = ".parametrizations."


@dataclass(frozen=True, slots=True)
class How:
    """What the compression of a weight depends on, in addition to its plan.

    Args:
        axis: the axis that counts output channels.
        integer: whether its layer computes in integers.
        one_scale: whether the kernel is faster with one scale per tensor than with one per output channel.
        reduce_range: whether 8-bit codes keep to 7 bits.
    """

    axis: int
    integer: bool
    one_scale: bool
    reduce_range: bool


def compress_weight(values: npt.NDArray[Any], tensor: TensorPlan | None, how: How) -> Artifact:
    """Return one tensor compressed by its plan, or left in float if that takes fewer bytes.

    Args:
        values: the tensor.
        tensor: its plan; None: it is no tensor of the plan's.
        how: the rest.
    """
    if tensor is None or tensor.settings is None:
        return left_in_float(values, tensor)
    made = [
        keeping_zeros(_MAKERS[codes](values, tensor, how), values, tensor.bits)
        for codes in codes_for(tensor, integer=how.integer)
    ]
    found = made[0] if len(made) == 1 else better((a, _error(a, values)) for a in made)
    takes_even = tensor.bits > 1 if how.integer else tensor.bits == _WIDEST
    if found.nbytes >= values.nbytes and takes_even:  # too small for a table
        even = _uniform(values, tensor, how)
        if how.integer or even.nbytes + _NODES < values.nbytes:
            found = even
    if found.nbytes >= values.nbytes:
        reason = f"too small: {found.nbytes} bytes at {tensor.bits} bits, {values.nbytes} in float"
        return FloatWeight(values=values, reason=reason)
    return _narrowed(found) if isinstance(found, PalettizedWeight) else found


def left_in_float(values: npt.NDArray[Any], tensor: TensorPlan | None) -> FloatWeight:
    """Return one tensor left in float, in the type that its plan sets.

    Args:
        values: the tensor.
        tensor: its plan; None: it is no tensor of the plan's.

    >>> plan = TensorPlan(name="w", kind="linear", settings=None, reason="by plan (--ends)", float16=True)
    >>> left_in_float(np.ones(64, np.float32), plan).bits, left_in_float(np.ones(3, np.float32), plan).reason
    (16, 'by plan (--ends), as float32: float16 would save nothing or lose too much')
    """
    reason = None if tensor is None else tensor.reason
    if tensor is not None and _PARAMETRIZED in tensor.name:
        reason = "part of a parametrization; torch.nn.utils.parametrize.remove_parametrizations makes it a weight"
    found = FloatWeight(values=values, reason=reason or _NOT_A_WEIGHT)
    if tensor is None or not tensor.float16:
        return found
    found = found.halved()
    why = "" if found.bits <= _HALF_BITS else ": float16 would save nothing or lose too much"
    return replace(found, reason=f"{found.reason}, as {found.values.dtype}{why}")


def _palette(values: npt.NDArray[Any], tensor: TensorPlan, how: How) -> Artifact:
    def made(lut_dtype: LutDtype) -> PalettizedWeight:
        return palettize(values, tensor.bits, tensor.rows_per_lut, how.axis, lut_dtype=lut_dtype)

    return _with_entries_of(tensor, values, made)


def _with_entries_of(
    tensor: TensorPlan, values: npt.NDArray[Any], made: Callable[[LutDtype], PalettizedWeight]
) -> PalettizedWeight:
    """Return a palette with entries of the plan's type; of float32, where float16 cannot tell most values apart.

    One value of 1e8 among others of 1 is such a case.
    """
    found = made(tensor.lut_dtype or "float32")
    if tensor.lut_dtype != "float16" or found.scale is None:  # they are in the range of float16
        return found
    floats = made("float32")
    return found if _error(found, values) <= _AS_GOOD * _error(floats, values) else floats


def wider_entries(plans: Iterable[TensorPlan], artifacts: Mapping[str, Artifact]) -> list[str]:
    """Return a note that names the weights whose palettes have float32 entries although the plan has float16 ones."""
    asked = [plan.name for plan in plans if plan.settings is not None and plan.lut_dtype == "float16"]
    found = [(name, artifacts[name]) for name in asked if name in artifacts]
    wider = [n for n, a in found if isinstance(a, PalettizedWeight) and a.lut.dtype == np.float32]
    if not wider:
        return []
    return [f"Palettes have float32 entries, because float16 cannot tell most values apart: {', '.join(wider)}."]


def _palette_int8(values: npt.NDArray[Any], tensor: TensorPlan, how: How) -> Artifact:
    def made(*, per_channel: bool) -> PalettizedWeight:
        return palettize_int8(
            values, tensor.bits, tensor.rows_per_lut, how.axis,
            reduce_range=how.reduce_range, per_channel=per_channel,
        )  # fmt: skip

    by_channel = made(per_channel=True)
    if how.integer and not how.one_scale:
        return by_channel
    whole = made(per_channel=False)
    if not how.integer:
        return better((a, _error(a, values)) for a in (whole, by_channel))
    return whole if _error(whole, values) <= _AS_GOOD * _error(by_channel, values) else by_channel


def _vectors(values: npt.NDArray[Any], tensor: TensorPlan, how: How) -> Artifact:
    def made(lut_dtype: LutDtype) -> PalettizedWeight:
        return palettize_vectors(values, tensor.bits, tensor.vector_dim, how.axis, lut_dtype=lut_dtype)

    return _with_entries_of(tensor, values, made)


def _uniform(values: npt.NDArray[Any], tensor: TensorPlan, how: How) -> Artifact:
    return round_to_nearest(
        values, tensor.bits, how.axis, reduce_range=how.reduce_range, clip=tensor.bits < _UNCLIPPED,
        block_size=tensor.block_size,
    )  # fmt: skip


def _error(artifact: Artifact, values: npt.NDArray[Any]) -> float:
    return float(np.square(artifact.dequantize().astype(np.float64) - values).sum())


_MAKERS: Final[Mapping[CodeKind, Callable[[npt.NDArray[Any], TensorPlan, How], Artifact]]] = {
    "palette": _palette,
    "int8 palette": _palette_int8,
    "vectors": _vectors,
    "uniform": _uniform,
}


def _narrowed(weight: PalettizedWeight) -> PalettizedWeight:
    """Return the same weight at the fewest bits that hold its codes: it may have few distinct values."""
    entries = weight.lut.shape[1]
    bits = max(1, (entries - 1).bit_length())
    if bits == weight.bits:
        return weight
    return replace(weight, bits=bits)
