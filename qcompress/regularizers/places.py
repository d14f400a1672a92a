"""Finds the weights of a model and the quantizers attached to them."""

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
    """The module and attribute that hold a tensor of a model.

    Args:
        name: the tensor's qualified name, as in `named_parameters` of the plain model.
        module: the module that holds it.
        attribute: its name there.
    """

    name: str
    module: nn.Module
    attribute: str

    def weight(self) -> Tensor:
        """Returns the float tensor, without any parametrization."""
        if not parametrize.is_parametrized(self.module, self.attribute):
            return self.used()
        original: Tensor = self._parametrizations().original
        return original

    def used(self) -> Tensor:
        """Returns the tensor that the module computes with: the quantized one, if there is a quantizer."""
        found: Tensor = getattr(self.module, self.attribute)
        return found

    def quantizer(self) -> AbstractQuantizer | None:
        """Returns the quantizer of the tensor; None: it has no quantizer."""
        if not parametrize.is_parametrized(self.module, self.attribute):
            return None
        found = [part for part in self._parametrizations() if isinstance(part, AbstractQuantizer)]
        return found[-1] if found else None

    def _parametrizations(self) -> parametrize.ParametrizationList:
        lists: nn.ModuleDict = self.module.parametrizations  # type: ignore[assignment]
        found: parametrize.ParametrizationList = lists[self.attribute]  # type: ignore[assignment]
        return found


def weights(model: nn.Module) -> list[Place]:
    """Returns the weights of convolutions, linear layers, embeddings, attention and recurrent layers; tied ones once.

    Raises:
        ConfigError: the model has no such weights.

    >>> [place.name for place in weights(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)))]
    ['0.weight', '2.weight']
    """
    seen: dict[int, Place] = {}
    for place in _all(model):
        seen.setdefault(id(place.weight()), place)
    if not seen:
        raise ConfigError(f"{type(model).__name__} has no weights of convolutions, matrix products or embeddings.")
    return list(seen.values())


def place_of(model: nn.Module, name: str) -> Place | None:
    """Returns the place in a model that holds a tensor; None: the model has no tensor of that name."""
    path, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return Place(name, module, attribute) if isinstance(getattr(module, attribute, None), Tensor) else None


def _all(model: nn.Module) -> Iterator[Place]:
    for name, module in model.named_modules():
        if isinstance(module, _LAYERS):
            direct = [n for n, p in module.named_parameters(recurse=False) if p.ndim > 1 and "weight" in n]
            behind = list(module.parametrizations) if parametrize.is_parametrized(module) else []  # type: ignore[arg-type]
            for attribute in [*direct, *(n for n in behind if "weight" in n)]:
                yield Place(f"{name}.{attribute}" if name else attribute, module, attribute)
