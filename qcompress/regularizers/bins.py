"""BR: a penalty that gathers the weights of each bin at its grid point.

Source: Han et al., ICCV 2021 ("bin regularization"), section 3.2, (5) and (6); λ = 0.5. Table 6 for the stages, which
are in `finetune.LoopConfig`.
Code: written from the paper; no code copied.
Deviations: computed as Σ (v - v_hat)² / (weights in the bin), which equals (mean(v) - v_hat)² + var(v) of each bin with
the population variance; the paper's "0 for one element" suggests the unbiased variance. Channels with their own scales
have their own bins; the sum over these is divided by the number of scales, so that λ means the same for one scale and
for many. The choice of the bin carries no gradient.
"""

import math
from typing import final

import torch
from torch import Tensor, nn

from qcompress.artifacts.integer_range import IntegerRange
from qcompress.errors import ConfigError
from qcompress.quantizers import ste
from qcompress.quantizers.base import uniform_range
from qcompress.quantizers.initial import weight_scale
from qcompress.quantizers.positive import Positive
from qcompress.regularizers.places import weights


def bin_regularization(w: Tensor, scale: Tensor, bits: int, detach_targets: bool = True) -> Tensor:
    """Returns (mean - grid point)² + population variance of each bin, summed over bins, (5).

    Args:
        w: any shape.
        scale: > 0, 0-d or broadcastable against w; a bin holds the weights with the same signed LSQ code. With several
            scales the result is the mean over them.
        bits: width of a code, 1 to 8.
        detach_targets: True: weights move to the grid points, the scale gets no gradient; False: both move.

    Returns:
        0-d; exactly 0 if every weight lies on its grid point.

    >>> bin_regularization(torch.tensor([0.5, 1.0, -2.0]), torch.tensor(1.0), 2).item()
    0.25
    """
    return _terms(w, scale, bits, detach_targets)[0].sum() / scale.numel()


@torch.no_grad()
def bin_losses(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Returns the part of each bin in `bin_regularization`, from the lowest code on, [2^bits].

    Args:
        w: as in `bin_regularization`.
        scale: as there.
        bits: as there.

    >>> bin_losses(torch.tensor([0.5, 1.0, -2.0]), torch.tensor(1.0), 2).tolist()
    [0.0, 0.0, 0.25, 0.0]
    """
    terms, codes = _terms(w, scale, bits, detach_targets=True)
    of_bin = (codes.long() + (1 << (bits - 1))).clamp_(0, (1 << bits) - 1).reshape(-1)
    return terms.new_zeros(1 << bits).scatter_add_(0, of_bin, terms.reshape(-1)) / scale.numel()


def _terms(w: Tensor, scale: Tensor, bits: int, detach_targets: bool) -> tuple[Tensor, Tensor]:
    """Returns the part of each weight, and its code."""
    limits = IntegerRange(bits, signed=True)
    with torch.no_grad():
        codes = ste.codes(w, scale, limits.n, limits.p)
        group = torch.arange(scale.numel(), device=w.device).reshape(scale.shape)
        bins = scale.numel() << bits
        bin_of = ((codes.long() - limits.n) + (group << bits)).reshape(-1).clamp_(0, bins - 1)  # NaN has some bin, too
        counts = bin_of.new_zeros(bins)  # not torch.bincount, which waits for the device
        count = counts.scatter_add_(0, bin_of, torch.ones_like(bin_of))[bin_of].reshape(w.shape)
    target = codes * (scale.detach() if detach_targets else scale)
    return (w - target).square() / count, codes


@final
class BinRegularizer(nn.Module):
    """Applies BR to a model's weights, in any training loop.

    Weights with a quantizer whose scale is learned are pulled to its grid, weights without a quantizer to a grid of
    `bits` whose scale starts as in LSQ.

    Args:
        model: a model, quantized or not; tied weights count once.
        bits: width of the grids of weights without a quantizer; None: those weights are not regularized.
        weight: λ, the factor of the term in the loss.
        detach_targets: as in `bin_regularization`.

    Raises:
        ConfigError: an argument is invalid, or the model has no weight to regularize.

    >>> model = nn.Linear(2, 2)
    >>> BinRegularizer(model, bits=2).penalty().shape
    torch.Size([])
    """

    def __init__(
        self, model: nn.Module, bits: int | None = None, weight: float = 0.5, detach_targets: bool = True
    ) -> None:
        super().__init__()
        if not 0 <= weight < math.inf:
            raise ConfigError(f"BinRegularizer.weight must be finite and at least 0, got {weight!r}.")
        self.bits, self.weight, self.detach_targets = bits, weight, detach_targets
        places = weights(model)
        self._quantized = [(p, q) for p in places if (q := p.quantizer()) and q.step_size(p.weight()) is not None]
        self._plain = [p for p in places if p.quantizer() is None] if bits is not None else []
        if not self._quantized and not self._plain:
            raise ConfigError("BinRegularizer found no weight with a learned scale; give bits for weights without one.")
        self.scales = nn.ModuleList([self._start(place.weight().detach()) for place in self._plain])

    def _start(self, weight: Tensor) -> Positive:
        assert self.bits is not None
        limits = uniform_range("BinRegularizer", self.bits, signed=True)
        scale = Positive(()).to(weight)
        scale.set(weight_scale(weight.reshape(1, -1), limits, "lsq").reshape(()))
        return scale

    def penalty(self) -> Tensor:
        """Returns the sum over all layers times `weight`, 0-d."""
        terms = [bin_regularization(w, s, bits, self.detach_targets) for _, w, s, bits in self._grids()]
        return self.weight * torch.stack(terms).sum()

    def numbers(self) -> list[tuple[str, str, float]]:
        """Returns the loss of each bin, without λ, for the history: (weight, bin by its code, loss)."""
        found = []
        for name, w, scale, bits in self._grids():
            losses = bin_losses(w, scale, bits).tolist()
            found += [(name, f"bin[{code}]", loss) for code, loss in enumerate(losses, -(1 << (bits - 1)))]
        return found

    def _grids(self) -> list[tuple[str, Tensor, Tensor, int]]:
        """Returns the name of each weight, the weight, and its grid: scale and bits."""
        learned = [(p, q.step_size(p.weight()), q.bits) for p, q in self._quantized]
        plain = [(p, s(), self.bits or 0) for p, s in zip(self._plain, self.scales, strict=True)]
        return [(p.name, p.weight(), s, bits) for p, s, bits in (*learned, *plain) if s is not None]
