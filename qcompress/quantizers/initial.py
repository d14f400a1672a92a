"""The start of a uniform grid's scale and offset: the min-max, LSQ and LSQ+ initialisations.

Source: LSQ+ (Bhalgat et al., CVPRW 2020) section 3.2, (7) and (8), and the LSQ initialisation cited there.
Code: written from the paper; no code copied.
Deviations: μ of the 3σ rule is the mean of w, not of |w|. (8) is minimised with Adam over scale and offset relative to
their start. The start is (7) or a narrower range, whichever has the least error; the best values seen are kept.

Shape suffixes: O = output channels, R = elements of one output channel.
"""

import math
from typing import Final, Literal

import torch
from torch import Tensor

from qcompress.artifacts.integer_range import IntegerRange
from qcompress.quantizers.ste import fake_quantize

Init = Literal["lsq", "min_max", "lsq_plus"]
INITS: Final[tuple[Init, ...]] = ("lsq", "min_max", "lsq_plus")

_NARROWER: Final = 0.7
_RANGES: Final = 9
_STEPS: Final = 60
_RATE: Final = 0.03


def weight_scale(rows_OR: Tensor, limits: IntegerRange, init: Init) -> Tensor:
    """Returns the scale of each row's signed grid, [O].

    Args:
        rows_OR: weights; one row if they share a scale.
        limits: the grid's codes.
        init: "lsq": 2·mean|w| / sqrt(p); "min_max": the extremes lie on the first and the last code; "lsq_plus": three
            standard deviations from the mean lie on code 2^(b-1).

    >>> weight_scale(torch.tensor([[-1.0, 3.0]]), IntegerRange(3, signed=True), "min_max").tolist()
    [1.0]
    """
    if init == "lsq":
        return rows_OR.abs().mean(1) * (2 / math.sqrt(limits.p))
    if init == "min_max":
        return torch.maximum(-rows_OR.amin(1) / -limits.n, rows_OR.amax(1) / limits.p)
    mean_O, three_sigma_O = rows_OR.mean(1), 3 * rows_OR.std(1, correction=0)
    return torch.maximum((mean_O - three_sigma_O).abs(), (mean_O + three_sigma_O).abs()) / -limits.n


def activation_scale(x: Tensor, limits: IntegerRange, init: Init, *, has_offset: bool) -> tuple[Tensor, Tensor]:
    """Returns scale and offset of an activation's grid, both 0-d.

    Args:
        x: values, flat.
        limits: the grid's codes.
        init: "lsq": scale 2·mean|x| / sqrt(p), offset as in min-max; "min_max": the extremes lie on the first and the
            last code; "lsq_plus": minimises ‖x_hat - x‖², starting from min-max or a narrower range.
        has_offset: whether there is an offset; otherwise it is 0.

    >>> scale, offset = activation_scale(torch.tensor([-1.0, 5.0]), IntegerRange(2, False), "min_max", has_offset=True)
    >>> float(scale), float(offset)
    (2.0, -1.0)
    """
    low, high, zero = x.min(), x.max(), torch.zeros_like(x.min())
    if has_offset:
        scale = (high - low) / (limits.p - limits.n)
    else:
        below = -low / -limits.n if limits.n else zero
        scale = torch.maximum(below, high / limits.p).clamp_min(0)
    if init == "lsq":
        scale = x.abs().mean() * (2 / math.sqrt(limits.p))
    offset = low - limits.n * scale if has_offset else zero
    return _least_error(x, scale, offset, limits, has_offset) if init == "lsq_plus" and scale > 0 else (scale, offset)


def _least_error(
    x: Tensor, scale: Tensor, offset: Tensor, limits: IntegerRange, has_offset: bool
) -> tuple[Tensor, Tensor]:
    def error(scale: Tensor, offset: Tensor) -> Tensor:
        return (fake_quantize(x, scale, offset if has_offset else None, limits.n, limits.p) - x).square().mean()

    # Some of the narrower ranges keep the lower end: activations with a tail on one side need that.
    low = offset + limits.n * scale
    parts = [_NARROWER**k * scale for k in range(_RANGES)]
    starts = [(s, s / scale * offset) for s in parts]
    starts += [(s, low - limits.n * s) for s in parts if has_offset]
    with torch.no_grad():
        errors = [float(error(*start)) for start in starts]
    least = min(errors)
    best = scale, offset = starts[errors.index(least)]
    grown, moved = torch.zeros_like(scale).requires_grad_(), torch.zeros_like(scale).requires_grad_()
    optimizer = torch.optim.Adam([grown, moved] if has_offset else [grown], lr=_RATE)
    for _ in range(_STEPS):
        with torch.enable_grad():
            now = scale * grown.exp(), offset + scale * moved
            loss = error(*now)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        if float(loss.detach()) < least:
            best, least = (now[0].detach(), now[1].detach()), float(loss.detach())
        optimizer.step()
    return best
