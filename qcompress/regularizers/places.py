"""Where a model keeps its weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, final

from torch import Tensor, nn
from torch.nn.utils import parametrize

from qcompress.errors import ConfigError
from qcompress.quantizers.base import AbstractQuantizer

_LAYERS: Final = (
    nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, nn.RNNBase,
    nn.RNNCellBase,
)  # fmt: skip


@final
@dataclass(frozen=True, slots=True)
class Place:
    """One weight of a model.

    Args:
        name: qualified, as in `named_parameters` of the plain model.
        module: the layer.
        attribute: what the layer calls it.
    """

    name: str
    module: nn.Module
    attribute: str

    def weight(self) -> Tensor:
        """The float weight, behind a parametrization too."""
        if not parametrize.is_parametrized(self.module, self.attribute):
            found: Tensor = getattr(self.module, self.attribute)
            return found
        original: Tensor = self._parametrizations().original
        return original

    def quantizer(self) -> AbstractQuantizer | None:
        """What the weight is fake-quantized by."""
        if not parametrize.is_parametrized(self.module, self.attribute):
            return None
        found = [part for part in self._parametrizations() if isinstance(part, AbstractQuantizer)]
        return found[-1] if found else None

    def _parametrizations(self) -> parametrize.ParametrizationList:
        lists: nn.ModuleDict = self.module.parametrizations  # type: ignore[assignment]
        found: parametrize.ParametrizationList = lists[self.attribute]  # type: ignore[assignment]
        return found


def weights(model: nn.Module) -> list[Place]:
    """The weights of convolutions, matrix products, embeddings, attention and recurrent layers; tied ones once.

    Raises:
        ConfigError: there are none.

    >>> [place.name for place in weights(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)))]
    ['0.weight', '2.weight']
    """
    seen: dict[int, Place] = {}
    for place in _all(model):
        seen.setdefault(id(place.weight()), place)
    if not seen:
        raise ConfigError(f"{type(model).__name__} has no weights of convolutions, matrix products or embeddings.")
    return list(seen.values())


def _all(model: nn.Module) -> Iterator[Place]:
    for name, module in model.named_modules():
        if isinstance(module, _LAYERS):
            direct = [n for n, p in module.named_parameters(recurse=False) if p.ndim > 1 and "weight" in n]
            behind = list(module.parametrizations) if parametrize.is_parametrized(module) else []  # type: ignore[arg-type]
            for attribute in [*direct, *(n for n in behind if "weight" in n)]:
                yield Place(f"{name}.{attribute}" if name else attribute, module, attribute)
