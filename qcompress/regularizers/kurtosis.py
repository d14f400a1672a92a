"""KURE: a penalty that pulls weights towards the kurtosis of a uniform distribution.

Source: Chmiel et al., NeurIPS 2020 ("robust quantization"), as in the comparison of Han et al., ICCV 2021, Table 4:
(kurtosis - 1.8)², averaged over layers.
Code: written from the equation; no code copied.
Deviations: none.
"""

import math
from typing import final

import torch
from torch import Tensor, nn

from qcompress.errors import ConfigError
from qcompress.regularizers.places import weights


def kurtosis(w: Tensor, target: float = 1.8) -> Tensor:
    """Returns (fourth standardised moment - target)².

    Args:
        w: any shape, not empty; the moment of a constant counts as 0.
        target: 1.8 for a uniform distribution, 3 for a normal one.

    Returns:
        0-d.

    >>> kurtosis(torch.tensor([-1.0, 1.0]), target=1.0).item()
    0.0
    """
    centered = w - w.mean()
    squared = centered.square()
    variance = squared.mean().clamp_min(torch.finfo(w.dtype).tiny)
    return ((squared / variance).square().mean() - target).square()


@final
class KurtosisRegularizer(nn.Module):
    """Applies KURE to a model's weights, in any training loop; it has no parameters.

    Args:
        model: a model; tied weights count once.
        target: as in `kurtosis`.
        weight: factor of the term in the loss.

    Raises:
        ConfigError: weight is invalid, or the model has no weights.

    >>> KurtosisRegularizer(nn.Linear(2, 2)).penalty().shape
    torch.Size([])
    """

    def __init__(self, model: nn.Module, target: float = 1.8, weight: float = 1.0) -> None:
        super().__init__()
        if not 0 <= weight < math.inf:
            raise ConfigError(f"KurtosisRegularizer.weight must be finite and at least 0, got {weight!r}.")
        self.target, self.weight = target, weight
        self._places = weights(model)

    def penalty(self) -> Tensor:
        """Returns the mean over all layers times `weight`, 0-d."""
        return self.weight * torch.stack([kurtosis(p.weight(), self.target) for p in self._places]).mean()
