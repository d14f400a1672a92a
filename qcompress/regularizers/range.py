"""R²: penalties on the range of weights, for training a float model that is quantized or palettized afterwards.

Source: Kundu et al., "R²: range regularization", section 2: L∞ (1), margin (2), soft-min-max (3).
Code: written from the paper; no code copied.
Deviations: in (2) the excess is summed over elements. `RangeRegularizer` divides the gradient of M by the N weights of
the layer, and keeps M between 0 and just below max|W|. Otherwise M would get N times the gradient of a weight, one step
would move it beyond all weights, and the term would stop acting. `relative=True` of soft-min-max divides the exponents
of (3) by the standard deviation σ of the weight.

Soft-min-max as printed hardly acts on trained weights. Its α stops growing where the variances under the two softmaxes
add up to e^-α: at α = 6.3 for 5,000 normally distributed weights with σ = 0.03. There |α·w| is below 1, the softmaxes
average over nearly all weights, the soft range is 5 % of the range, and the pull on the largest weight is below that of
weight decay. With `relative=True` α rests at 3.7 in the same example, the soft range is 82 % of the range, and the pull
is 1,600 times as strong. Where σ is 0.3 or more, both forms are weak.

With dim above 1 a weight is split into vectors of dim weights (`granularity.vectors`), and the term is summed over the
dimensions, which share one M or α.

Shape suffixes: V = vectors, D = dim.
"""

import math
from collections.abc import Callable, Mapping
from typing import Final, Literal, final

import torch
from torch import Tensor, nn

from qcompress.artifacts.granularity import vectors
from qcompress.errors import ConfigError
from qcompress.quantizers.positive import multiplied_gradient
from qcompress.regularizers.places import weights

Kind = Literal["linf", "margin", "soft_min_max"]

_ALPHA: Final = 0.1


def linf(w: Tensor, dim: int = 1) -> Tensor:
    """Returns max|w|, (1); equal largest weights share the gradient evenly.

    Args:
        w: any shape, not empty.
        dim: number of weights in a vector.

    Returns:
        0-d.

    >>> linf(torch.tensor([1.0, -3.0, 2.0, 0.0])).item(), linf(torch.tensor([1.0, -3.0, 2.0, 0.0]), dim=2).item()
    (3.0, 5.0)
    """
    return vectors(w, dim).abs().amax(0).sum()


def margin(w: Tensor, m: Tensor, dim: int = 1) -> Tensor:
    """Returns |m| + Σ max(|w| - |m|, 0), (2).

    Args:
        w: any shape, not empty.
        m: 0-d; its gradient is sign(m)·(dim - number of |w| above |m|).
        dim: number of weights in a vector.

    Returns:
        0-d.

    >>> m = torch.tensor(1.5, requires_grad=True)
    >>> y = margin(torch.tensor([1.0, -3.0, 2.0]), m)
    >>> y.item(), torch.autograd.grad(y, m)[0].item()
    (3.5, -1.0)
    """
    size = m.abs()
    return dim * size + (vectors(w, dim).abs() - size).relu().sum()


def soft_min_max(w: Tensor, alpha: Tensor, dim: int = 1, relative: bool = False) -> Tensor:
    """Returns s_max - s_min + e^-α, (3); s_max and s_min are means of w weighted by e^αw and e^-αw.

    Args:
        w: any shape, not empty.
        alpha: 0-d.
        dim: number of weights in a vector.
        relative: whether the exponents are ±αw/σ, where σ is the standard deviation of all weights and gets no
            gradient; False: they are ±αw as printed, which hardly acts on trained weights.

    Returns:
        0-d.

    >>> round(soft_min_max(torch.tensor([-1.0, 0.0, 2.0]), torch.tensor(9.0)).item(), 3)
    3.0
    """
    w_DV = vectors(w, dim).T
    scaled_DV = alpha / _sigma(w) * w_DV if relative else alpha * w_DV
    highest = (scaled_DV.softmax(1) * w_DV).sum()
    lowest = ((-scaled_DV).softmax(1) * w_DV).sum()
    return highest - lowest + dim * (-alpha).exp()


def _sigma(w: Tensor) -> Tensor:
    sigma = w.detach().std(correction=0)
    return torch.where(sigma > 0, sigma, 1.0)


@final
class RangeRegularizer(nn.Module):
    """Applies R² to a model's weights, in any training loop: add `penalty()` to the loss, and train `parameters()`.

    Args:
        model: a float model; tied weights count once.
        kind: "linf", "margin" or "soft_min_max".
        dim: number of weights in a vector.
        weight: factor of the term in the loss.
        relative: as in `soft_min_max`, for that kind only; True is recommended there.

    Raises:
        ConfigError: an argument is invalid, two of them conflict, or the model has no weights.

    >>> model = nn.Linear(2, 2)
    >>> regularizer = RangeRegularizer(model, kind="margin")
    >>> optimizer = torch.optim.SGD([*model.parameters(), *regularizer.parameters()], lr=0.1)
    >>> regularizer.penalty().backward()
    >>> optimizer.step()
    """

    def __init__(
        self, model: nn.Module, kind: Kind = "margin", dim: int = 1, weight: float = 0.01, relative: bool = False
    ) -> None:
        super().__init__()
        if kind not in _TERMS:
            raise ConfigError(f"RangeRegularizer.kind must be one of {', '.join(_TERMS)}, got {kind!r}.")
        if dim < 1:
            raise ConfigError(f"RangeRegularizer.dim must be at least 1, got {dim!r}.")
        if not 0 <= weight < math.inf:
            raise ConfigError(f"RangeRegularizer.weight must be finite and at least 0, got {weight!r}.")
        if relative and kind != "soft_min_max":
            raise ConfigError(f"RangeRegularizer.relative applies to kind soft_min_max only, got {kind!r}; remove it.")
        self.kind, self.dim, self.weight, self.relative = kind, dim, weight, relative
        self._places = weights(model)
        start, term = _TERMS[kind]
        self._term = _relative_soft_min_max if relative else term
        made = [start(place.weight().detach()) for place in self._places] if start is not None else []
        self.learned = nn.ParameterList([nn.Parameter(value) for value in made])

    def penalty(self) -> Tensor:
        """Returns the sum over all layers times `weight`, 0-d."""
        learned: list[Tensor | None] = [*self.learned] or [None] * len(self._places)
        terms = [self._term(p.weight(), value, self.dim) for p, value in zip(self._places, learned, strict=True)]
        return self.weight * torch.stack(terms).sum()


def _linf(w: Tensor, _: Tensor | None, dim: int) -> Tensor:
    return linf(w, dim)


def _margin(w: Tensor, m: Tensor | None, dim: int) -> Tensor:
    assert m is not None
    with torch.no_grad():
        largest = w.abs().amax()
        m.copy_(m.clamp_min(0).minimum(largest.nextafter(torch.zeros_like(largest))))
    return margin(w, multiplied_gradient(m, 1 / w.numel()), dim)


def _soft_min_max(w: Tensor, alpha: Tensor | None, dim: int) -> Tensor:
    assert alpha is not None
    return soft_min_max(w, alpha, dim)


def _relative_soft_min_max(w: Tensor, alpha: Tensor | None, dim: int) -> Tensor:
    assert alpha is not None
    return soft_min_max(w, alpha, dim, relative=True)


def _two_sigma(w: Tensor) -> Tensor:
    return 2 * w.std(correction=0)


def _first_alpha(w: Tensor) -> Tensor:
    return w.new_full((), _ALPHA)


# By kind: the start of what is learned, from the weight (None: nothing is learned), and the term.
_Start = Callable[[Tensor], Tensor]
_Term = Callable[[Tensor, Tensor | None, int], Tensor]
_TERMS: Final[Mapping[str, tuple[_Start | None, _Term]]] = {
    "linf": (None, _linf),
    "margin": (_two_sigma, _margin),
    "soft_min_max": (_first_alpha, _soft_min_max),
}
