"""L2 and KL: penalties that pull weights towards their quantized values.

Source: Han et al., ICCV 2021 ("bin regularization"), Table 4.
Code: written from the paper; no code copied.
Deviations: the paper names the terms without formulas or factors; these are mean((w - w_hat)²) and
KL(softmax(w) ‖ softmax(w_hat)) over all elements of a layer, summed over layers. w_hat gets no gradient.
"""

import math
from collections.abc import Callable, Mapping
from typing import Final, Literal, final

import torch
from torch import Tensor, nn

from qcompress.errors import ConfigError
from qcompress.quantizers.base import AbstractQuantizer
from qcompress.regularizers.places import weights

Kind = Literal["l2", "kl"]


def l2(w: Tensor, w_hat: Tensor) -> Tensor:
    """Returns mean((w - w_hat)²).

    Args:
        w: any shape, not empty.
        w_hat: the quantized weight, in the shape of w; gets no gradient.

    Returns:
        0-d.

    >>> l2(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])).item()
    2.0
    """
    return (w - w_hat.detach()).square().mean()


def kl(w: Tensor, w_hat: Tensor) -> Tensor:
    """Returns KL(softmax(w) ‖ softmax(w_hat)) over all elements.

    Args:
        w: any shape, not empty.
        w_hat: the quantized weight, in the shape of w; gets no gradient.

    Returns:
        0-d.

    >>> kl(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])).item()
    0.0
    """
    log_p = w.reshape(-1).log_softmax(0)
    log_q = w_hat.detach().reshape(-1).log_softmax(0)
    return (log_p.exp() * (log_p - log_q)).sum()


@final
class DistanceRegularizer(nn.Module):
    """Applies L2 or KL to a model's quantized weights, in any training loop; it has no parameters.

    Args:
        model: a model with quantized weights; those without a quantizer are not regularized; tied weights count once.
        kind: "l2" or "kl".
        weight: factor of the term in the loss.

    Raises:
        ConfigError: an argument is invalid, or the model has no quantized weights.

    >>> from torch.nn.utils import parametrize
    >>> from qcompress.quantizers import Ternary
    >>> model = nn.Linear(2, 2)
    >>> _ = parametrize.register_parametrization(model, "weight", Ternary())
    >>> DistanceRegularizer(model, kind="kl").penalty().shape
    torch.Size([])
    """

    def __init__(self, model: nn.Module, kind: Kind = "l2", weight: float = 1.0) -> None:
        super().__init__()
        if kind not in _TERMS:
            raise ConfigError(f"DistanceRegularizer.kind must be one of {', '.join(_TERMS)}, got {kind!r}.")
        if not 0 <= weight < math.inf:
            raise ConfigError(f"DistanceRegularizer.weight must be finite and at least 0, got {weight!r}.")
        self.kind, self.weight = kind, weight
        self._quantized = [(place, q) for place in weights(model) if (q := place.quantizer()) is not None]
        if not self._quantized:
            raise ConfigError("DistanceRegularizer found no quantized weight; attach quantizers first (qc.prepare).")

    def penalty(self) -> Tensor:
        """Returns the sum over all layers times `weight`, 0-d."""
        found = [(place.weight(), quantizer) for place, quantizer in self._quantized]
        return self.weight * torch.stack([_TERMS[self.kind](w, _stored(q, w)) for w, q in found]).sum()


@torch.no_grad()
def _stored(quantizer: AbstractQuantizer, weight: Tensor) -> Tensor:
    """Returns the weight that would be stored; in training mode DKM gives a soft one, and moves its centroids."""
    training = quantizer.training
    quantizer.eval()
    try:
        w_hat: Tensor = quantizer(weight)
    finally:
        quantizer.train(training)
    return w_hat


_TERMS: Final[Mapping[str, Callable[[Tensor, Tensor], Tensor]]] = {"l2": l2, "kl": kl}
