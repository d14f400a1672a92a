"""KURE: weights pulled towards the kurtosis of an even distribution.

Source: Chmiel et al., NeurIPS 2020 ("robust quantization"), as compared with by Han et al., ICCV 2021, Table 4:
(kurtosis - 1.8)², mean over layers.
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
    """(fourth standardised moment - target)².

    Args:
        w: any shape, not empty; the moment of a constant counts as 0.
        target: 1.8 is that of an even distribution, 3 that of a normal one.

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
    """KURE over a model's weights, in any training loop; it has no parameters.

    Args:
        model: a model; tied weights count once.
        target: as in `kurtosis`.
        weight: of the term in the loss.

    Raises:
        ConfigError: weight is none, or the model has no weights.

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
        """The mean term of all layers, 0-d."""
        return self.weight * torch.stack([kurtosis(p.weight(), self.target) for p in self._places]).mean()
