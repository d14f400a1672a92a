"""The start of a uniform grid's scale and offset: the min-max, LSQ and LSQ+ initialisations.

Source: LSQ+ (Bhalgat et al., CVPRW 2020) section 3.2, (7) and (8), and the LSQ initialisation cited there.
Code: written from the paper; no code copied.
Deviations: μ of the 3σ rule is the mean of w, not of |w|. (8) is minimised in turns, not by gradients: codes for a
grid, then the grid for these codes. The start is (7) or a narrower range, whichever has the least error.

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

# Ranges that the least error is looked for in, as shares of min-max, then of the best of these.
_NARROWER: Final = tuple(0.9**k for k in range(1, 28))
_AROUND: Final = tuple(1 + k / 100 for k in range(-8, 9))
_STEPS: Final = 60
_GAIN: Final = 1e-5  # share of the error that a step has to save
_OFF: Final = 1e-3  # share of a step that values on a grid may be off by
_PARTS: Final = 8  # steps of the grid that the smallest step between two values may have


def weight_scale(rows_OR: Tensor, limits: IntegerRange, init: Init) -> Tensor:
    """Returns the scale of each row's signed grid, [O]; a row that lies on such a grid already keeps its scale.

    Args:
        rows_OR: weights; one row if they share a scale.
        limits: the grid's codes.
        init: "lsq": 2·mean|w| / sqrt(p); "min_max": the extremes lie on the first and the last code; "lsq_plus": three
            standard deviations from the mean lie on code 2^(b-1).

    >>> weight_scale(torch.tensor([[-1.0, 3.0]]), IntegerRange(3, signed=True), "min_max").tolist()
    [1.0]
    >>> weight_scale(torch.tensor([[-0.75, 0.25, 0.5]]), IntegerRange(3, signed=True), "lsq").tolist()
    [0.25]
    """
    found_O = _started(rows_OR, limits, init)
    if rows_OR.shape[1] <= 2:  # any two values lie on some grid
        return found_O
    step_O = _step(rows_OR)
    for parts in range(_PARTS, 0, -1):
        scale_O1 = step_O[:, None] / parts  # codes 0, 2 and 5 are 2 and 3 steps apart
        codes_OR = (rows_OR / scale_O1).round()
        is_near_OR = (codes_OR * scale_O1 - rows_OR).abs() <= _OFF * scale_O1
        is_on_grid_O = (is_near_OR & (codes_OR >= limits.n) & (codes_OR <= limits.p)).all(1)
        found_O = torch.where(is_on_grid_O, scale_O1[:, 0], found_O)
    return found_O


def _step(rows_OR: Tensor) -> Tensor:
    """Returns the smallest step between different values of each row, or from 0, [O]; infinite for rows of zeros."""
    with_zero = torch.cat([rows_OR, rows_OR.new_zeros(len(rows_OR), 1)], 1)
    steps = with_zero.sort(1).values.diff(dim=1)
    return steps.where(steps > _OFF * rows_OR.abs().amax(1, keepdim=True), steps.new_tensor(math.inf)).amin(1)


def _started(rows_OR: Tensor, limits: IntegerRange, init: Init) -> Tensor:
    if init == "lsq":
        return rows_OR.abs().mean(1) * (2 / math.sqrt(limits.p))
    if init == "min_max":
        return torch.maximum(-rows_OR.amin(1) / -limits.n, rows_OR.amax(1) / limits.p)
    mean_O, three_sigma_O = rows_OR.mean(1), 3 * rows_OR.std(1, correction=0)
    return torch.maximum((mean_O - three_sigma_O).abs(), (mean_O + three_sigma_O).abs()) / -limits.n


@torch.no_grad()
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
    zero = torch.zeros_like(offset)

    def error(scale: Tensor, offset: Tensor) -> Tensor:
        return (fake_quantize(x, scale, offset if has_offset else None, limits.n, limits.p) - x).square().mean()

    best, least = (scale, offset), float(error(scale, offset))
    for shares in (_NARROWER, _AROUND):
        scale, offset = best
        low = offset + limits.n * scale
        starts = [(share * scale, share * offset) for share in shares]
        if has_offset:  # some keep the lower end: activations with a tail on one side need that
            starts += [(share * scale, low - limits.n * share * scale) for share in shares]
        for now in starts:
            if (found := float(error(*now))) < least:
                best, least = now, found
    for _ in range(_STEPS):
        # For fixed codes the best grid is a linear regression of the values on them; for a fixed grid the nearest code
        # is best. In turns, neither step raises the error.
        codes = ((x - best[1]) / best[0]).round_().clamp_(limits.n, limits.p)
        mean_code, mean = (codes.mean(), x.mean()) if has_offset else (zero, zero)
        spread = (codes - mean_code).square().mean()
        scale = ((codes - mean_code) * (x - mean)).mean() / spread
        now = scale, mean - scale * mean_code
        found = float(error(*now)) if spread > 0 else least
        if not found < least * (1 - _GAIN):
            break
        best, least = now, found
    return best
