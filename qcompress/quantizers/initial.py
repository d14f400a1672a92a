"""Where a uniform grid starts: min-max, LSQ's and LSQ+'s initialisations.

Source: LSQ+ (Bhalgat et al., CVPRW 2020) section 3.2, (7) and (8), and the LSQ initialisation that it names.
Code: written from the paper; no code copied.
Deviations: μ of the 3σ rule is the mean of w, not of |w|. (8) is descended with Adam, scale and offset in parts of
their start, and keeps the best that was seen.

Shape suffixes: O = output channels, R = elements of one output channel.
"""

import math
from typing import Final, Literal

import torch
from torch import Tensor

from qcompress.grid import IntegerRange
from qcompress.ste import fake_quantize

Init = Literal["lsq", "min_max", "lsq_plus"]
INITS: Final[tuple[Init, ...]] = ("lsq", "min_max", "lsq_plus")

_STEPS: Final = 100
_RATE: Final = 0.03


def weight_scale(rows_OR: Tensor, limits: IntegerRange, init: Init) -> Tensor:
    """The scale of each row's signed grid, [O].

    Args:
        rows_OR: weights; one row where they share a scale.
        limits: the grid's codes.
        init: "lsq": 2·mean|w| / sqrt(p); "min_max": the largest weight on the last code; "lsq_plus": three standard
            deviations from the mean on 2^(b-1).

    >>> weight_scale(torch.tensor([[-1.0, 3.0]]), IntegerRange(3, signed=True), "min_max").tolist()
    [1.0]
    """
    if init == "lsq":
        return rows_OR.abs().mean(1) * (2 / math.sqrt(limits.p))
    if init == "min_max":
        return torch.maximum(-rows_OR.amin(1) / -limits.n, rows_OR.amax(1) / limits.p)
    mean, spread = rows_OR.mean(1), 3 * rows_OR.std(1, correction=0)
    return torch.maximum((mean - spread).abs(), (mean + spread).abs()) / -limits.n


def activation_scale(x: Tensor, limits: IntegerRange, init: Init, *, has_offset: bool) -> tuple[Tensor, Tensor]:
    """Scale and offset of an activation's grid, both 0-d.

    Args:
        x: values, flat.
        limits: the grid's codes.
        init: "lsq": 2·mean|x| / sqrt(p), offset as min-max has it; "min_max": the extremes on the first and the last
            code; "lsq_plus": from there downhill in ‖x_hat - x‖².
        has_offset: whether there is an offset; without one it is 0.

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
    grown, moved = torch.zeros_like(scale).requires_grad_(), torch.zeros_like(scale).requires_grad_()
    optimizer = torch.optim.Adam([grown, moved] if has_offset else [grown], lr=_RATE)
    best, least = (scale, offset), torch.inf
    with torch.enable_grad():
        for _ in range(_STEPS):
            optimizer.zero_grad()
            now = scale * grown.exp(), offset + scale * moved
            error = (fake_quantize(x, now[0], now[1] if has_offset else None, limits.n, limits.p) - x).square().mean()
            if float(error) < least:
                best, least = (now[0].detach(), now[1].detach()), float(error)
            error.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return best
