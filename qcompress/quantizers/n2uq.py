"""N2UQ: activations with learned thresholds and even output levels; weights normalised to use all codes evenly.

Source: Liu et al., CVPR 2022: forward (12), generalised straight-through estimator (11), gradients of the intervals
(13); section 3.2.2 for the learned scales β1, β2 and the intervals' start, 3.2.3 for weights.
Code: written from the paper; no code copied.
Deviations: x is compared with threshold / β1, which is stored, instead of β1·x with the threshold. γ is
(2^b - 1) / 2^(b-1); the printed formula lost an exponent. β1 and β2 cannot fall below a thousandth of their start.
Training starts from equal intervals at the scale of least squared error (init "lsq_plus"); the paper's start, for
inputs in [0, 2], is init "n2uq". The gradient of a weight is the paper's, 1 where |W'| < 1, else 0 (`mask=True`). The
authors' published code (github.com/liuzechun/Nonuniform-to-Uniform-Quantization) differs: it has no mask and divides
by the scale γ·mean|W|, which changes nothing under Adam and multiplies the rate under SGD; `mask=False` is that.

Shape suffixes: L = segments, 2^bits - 1 of them, E = their edges, one more. Those of weights are in `rows.py`.
"""

from collections.abc import Hashable, Sequence
from typing import Any, Final, Literal, final, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qcompress.artifacts import Artifact, ThresholdGrid
from qcompress.artifacts.packing import check_bits
from qcompress.errors import ConfigError
from qcompress.graph.conversion import to_numpy
from qcompress.quantizers.base import AbstractQuantizer, SiteKey, check_init
from qcompress.quantizers.half_integer import odd_codes, palettized
from qcompress.quantizers.positive import Positive
from qcompress.quantizers.rows import Rows
from qcompress.quantizers.ste import inside, straight_through
from qcompress.quantizers.step import UniformSpec

_BEFORE: Final = -1e-38  # just below 0: a segment contains its first edge

# Where training starts: from the paper's thresholds, or from the uniform grid of "lsq_plus" or "lsq".
ThresholdInit = Literal["n2uq", "lsq_plus", "lsq"]


def n2uq_activation(x: Tensor, start: Tensor, intervals: Tensor, input_scale: Tensor, output_scale: Tensor) -> Tensor:
    """Fake-quantizes to even levels by learned thresholds, (12).

    Args:
        x: float32 or float64, any shape; not modified.
        start: s, 0-d: the beginning of the first segment.
        intervals: a, [2^b - 1], > 0: the segments' lengths.
        input_scale: β1, 0-d, > 0.
        output_scale: β2, 0-d, > 0.

    Returns:
        β2 · 2 / (2^b - 1) times the number of thresholds that β1·x reaches, in the shape of x. Thresholds are the
        middles of the segments; a value equal to a threshold reaches it. Gradients are those of the function that rises
        linearly by 1 along each segment: (11) for x, (13) for start and intervals.

    >>> intervals = torch.tensor([0.5, 0.5, 1.0])
    >>> one = torch.tensor(1.0)
    >>> n2uq_activation(torch.tensor([0.2, 0.25, 1.0, 1.5]), torch.tensor(0.0), intervals, one, 1.5 * one).tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    out: Tensor = _N2uq.apply(x, start, intervals, input_scale, output_scale)  # type: ignore[no-untyped-call]
    return out


def n2uq_weight(w: Tensor, bits: int, mask: bool = True) -> Tensor:
    """Fake-quantizes a weight, normalised so that all codes are used evenly.

    Args:
        w: float32 or float64; its first axis counts output channels; not modified.
        bits: width of a code, 1 to 8.
        mask: which gradient w gets: the paper's (True) or that of the authors' code (False).

    Returns:
        Odd integers in [-(2^bits - 1), 2^bits - 1] times γ·mean|w| / (2^bits - 1) of the output channel, in the shape
        of w. The gradient with a mask is 1 where |w| < γ·mean|w|, else 0; without a mask it is 1 / (γ·mean|w|), or 1 in
        a channel of zeros.

    >>> n2uq_weight(torch.tensor([[-1.0, -0.25, 0.25, 0.5]]), 2).tolist()
    [[-0.75, -0.25, 0.25, 0.25]]
    """
    return _normalised(w, _mean_size(w), bits, mask)


def thresholds(start: Tensor, intervals: Tensor, input_scale: Tensor) -> Tensor:
    """Returns T_i / β1, [L]: the thresholds for x itself.

    >>> thresholds(torch.tensor(0.0), torch.tensor([0.5, 0.5, 1.0]), torch.tensor(2.0)).tolist()
    [0.125, 0.375, 0.75]
    """
    return (_edges(start, intervals)[:-1] + intervals / 2) / input_scale


def _edges(start: Tensor, intervals: Tensor) -> Tensor:
    return torch.cat([start.reshape(1), start + intervals.cumsum(0)])


class _N2uq(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor, intervals: Tensor, beta1: Tensor, beta2: Tensor) -> Tensor:
        out = _code(x, start, intervals, beta1).mul_(_level(beta2, intervals))
        ctx.save_for_backward(x, start, intervals, beta1, beta2, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, start, intervals, beta1, beta2, out = ctx.saved_tensors
        z = x * beta1
        rise, rises, ways = torch.zeros_like(z), [], []
        for first, length in zip(_edges(start, intervals)[:-1].unbind(), intervals.unbind(), strict=True):
            part = (z - first).div_(length)  # 0 at the start of the segment, 1 at its end
            here = inside(g, part, _BEFORE, 1)
            rise.addcdiv_(here, length)
            rises.append(here.sum())
            ways.append(part.mul_(here).sum())
        level, rises_L = _level(beta2, intervals), torch.stack(rises) / intervals
        later_L = rises_L.flip(0).cumsum(0).flip(0) - rises_L
        g_beta1 = (rise * x).sum() * level
        g_beta2 = (g * out).sum() / beta2
        g_intervals = -(torch.stack(ways) / intervals + later_L) * level
        return rise.mul_(level * beta1), -rises_L.sum() * level, g_intervals, g_beta1, g_beta2


def _code(x: Tensor, start: Tensor, intervals: Tensor, beta1: Tensor) -> Tensor:
    """Counts the thresholds that are reached; for so few of them comparisons are faster than a search."""
    code = torch.zeros_like(x, dtype=torch.uint8)
    for threshold in thresholds(start, intervals, beta1):
        code.add_((x >= threshold).view(torch.uint8))
    return code.to(x.dtype)


def _level(beta2: Tensor, intervals: Tensor) -> Tensor:
    return beta2 * (2 / len(intervals))


def _normalised(w: Tensor, mean: Tensor, bits: int, mask: bool) -> Tensor:
    """Returns a fake-quantized weight.

    Args:
        w: any shape.
        mean: mean|w| of the output channel, broadcastable against w.
        bits: width of a code.
        mask: as in `n2uq_weight`.
    """
    unit, step = _unit_and_step(w.detach() if mask else w, mean, bits)
    with torch.no_grad():
        value = odd_codes(unit, bits) * step
    return straight_through(w, value, unit.abs() < 1) if mask else straight_through(unit, value)


def _mean_size(w: Tensor) -> Tensor:
    """Returns mean|w| of each output channel, in a shape that broadcasts against w."""
    size = w.detach().abs()
    return size.contiguous().reshape(len(w), -1).mean(1).reshape(-1, *[1] * (w.ndim - 1)) if w.ndim else size


def _unit_and_step(w: Tensor, mean: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Returns W', and the step of each output channel, which gets no gradient."""
    scale = mean * (((1 << bits) - 1) / (1 << (bits - 1)))
    return w / torch.where(scale > 0, scale, 1.0), scale / ((1 << bits) - 1)


@final
class N2uqActivation(AbstractQuantizer):
    """Quantizes an activation with N2UQ; the lowest code is 0.

    Args:
        bits: width of a code, 2 to 4.
        init: "lsq_plus" or "lsq": equal intervals at the scale that LSQ+ (least squared error) or LSQ starts from;
            "n2uq": the paper's start, for inputs in [0, 2].

    Raises:
        ConfigError: an argument is invalid.

    >>> quantizer = N2uqActivation(bits=2)
    >>> quantizer(torch.tensor([-1.0, 0.4, 1.0, 9.0])).tolist()
    [0.0, 0.6666666865348816, 1.3333333730697632, 2.0]
    """

    def __init__(self, *, bits: int, init: ThresholdInit = "lsq_plus") -> None:
        super().__init__()
        if bits not in range(2, 5):
            raise ConfigError(f"N2uqActivation.bits must be in [2, 4], got {bits!r}.")
        check_init("N2uqActivation", init, get_args(ThresholdInit))
        self.bits = bits
        self.uniform = None
        if init != "n2uq":
            self.uniform = UniformSpec(who="N2uqActivation", bits=bits, role="activation", init=init)
        self.start = nn.Parameter(torch.zeros(()))
        self.intervals = Positive(((1 << bits) - 1,))
        self.input_scale, self.output_scale = Positive(()), Positive(())
        self._set(torch.ones(()))

    def _set(self, top: Tensor) -> None:
        count = (1 << self.bits) - 1
        with torch.no_grad():
            self.start.zero_()
        self.intervals.set(torch.full((count,), 2 / count))
        self.input_scale.set(1 / top)
        self.output_scale.set(top)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the fake-quantized tensor."""
        return n2uq_activation(x, self.start, self.intervals(), self.input_scale(), self.output_scale())

    def initialise(self, values: Tensor | Sequence[Tensor]) -> None:
        """Sets thresholds and scales; with init "n2uq" they do not depend on the values."""
        top = torch.ones(())
        if self.uniform is not None:
            scale, _ = self.uniform.start(values)
            top = torch.where(scale > 0, scale * self.uniform.limits.p / 2, 1.0)
        self._set(top)

    def activation_scale(self) -> Tensor:
        """Returns the distance of neighbouring levels."""
        return _level(self.output_scale(), self.intervals()).detach().float()

    def activation_grid(self, site: SiteKey) -> ThresholdGrid:
        """Returns the thresholds and the distance between levels."""
        intervals = self.intervals().detach()
        on_x = thresholds(self.start.detach(), intervals, self.input_scale().detach())
        return ThresholdGrid(
            site=site,
            thresholds=to_numpy(on_x.float()),
            scale=np.asarray(float(_level(self.output_scale().detach(), intervals)), np.float32),
            bits=self.bits,
        )


@final
class N2uqWeight(AbstractQuantizer):
    """Quantizes a weight with N2UQ, each output channel normalised by itself; it has no parameters.

    Args:
        bits: width of a code, 1 to 8.
        axis: the weight's axis that counts output channels.
        mask: as in `n2uq_weight`.

    Raises:
        ConfigError: bits is out of range.

    >>> N2uqWeight(bits=1)(torch.tensor([[-1.0, 3.0]])).tolist()
    [[-2.0, 2.0]]
    """

    def __init__(self, *, bits: int, axis: int = 0, mask: bool = True) -> None:
        super().__init__()
        check_bits(bits)
        self.bits, self.axis, self.mask = bits, axis, mask

    def forward(self, x: Tensor) -> Tensor:
        """Returns the fake-quantized weight."""
        return n2uq_weight(x.movedim(self.axis, 0), self.bits, self.mask).movedim(0, self.axis)

    def shared(self) -> Hashable:
        """Returns the width and whether the gradient has a mask."""
        return self.bits, self.mask

    @property
    def row_axis(self) -> int:
        """The axis that counts output channels."""
        return self.axis

    @classmethod
    def quantize_rows(cls, quantizers: Sequence["N2uqWeight"], x_N: Tensor, rows: Rows) -> Tensor:
        """Returns the quantized elements of several weights, [N]."""
        mean_S = rows.reduced(x_N.detach().abs(), torch.mean)
        return _normalised(x_N, rows.each(mean_S), quantizers[0].bits, quantizers[0].mask)

    def initialise(self, values: Tensor | Sequence[Tensor]) -> None:
        """Does nothing: there are no parameters to set."""

    def weight_artifact(self, weight: Tensor) -> Artifact:
        """Returns a palette of odd integers, and a scale for each output channel."""
        with torch.no_grad():
            rows = weight.float().movedim(self.axis, 0)
            unit, step = _unit_and_step(rows, _mean_size(rows), self.bits)
            odd = odd_codes(unit, self.bits)
        return palettized(odd.movedim(0, self.axis), step.reshape(-1), self.bits, self.axis % weight.ndim)

    def weight_scale(self, weight: Tensor) -> Tensor:
        """Returns the step of each output channel."""
        rows = weight.detach().float().movedim(self.axis, 0)
        return _unit_and_step(rows, _mean_size(rows), self.bits)[1].reshape(-1)
