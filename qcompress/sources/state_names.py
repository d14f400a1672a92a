"""What the names of a state dict tell about its tensors, where nothing else names their layers.

torch gives recurrent weights, and the parts from which weight_norm, spectral_norm, prune and parametrizations compute a
weight, names of their own. Export computes such a weight once, so that the file holds it in place of all its parts.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Final

from qcompress.kinds import UNKNOWN, kind_without_layer
from qcompress.sources.base import SourceTensor

Shapes = Mapping[str, tuple[int, ...]]

_PARAMETRIZED: Final = re.compile(r"(?P<layer>.*\.)?parametrizations\.(?P<parameter>[^.]+)\.(?P<part>.+)")
_MOST_ORIGINALS: Final = 16  # parameters that one parametrization may compute a weight from
_RECURRENT: Final = re.compile(r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?")


def shapes_by_name(tensors: Iterable[SourceTensor]) -> Shapes:
    """Return the shapes of tensors by their names, those of tied tensors by all of them."""
    return {name: tensor.array.shape for tensor in tensors for name in (tensor.name, *tensor.aliases)}


def kind_by_name(name: str, shapes: Shapes) -> str:
    """Return the kind of a tensor of a state dict as far as its name tells it, else unknown.

    Args:
        name: its name.
        shapes: the shapes of all tensors of the state dict, by name.

    >>> shapes = {"rnn.weight_hh_l0": (32, 8), "fc.weight_orig": (4, 8), "fc.weight_mask": (4, 8)}
    >>> [kind_by_name(name, shapes) for name in shapes]
    ['recurrent', 'unknown', 'other']
    """
    if weight_computed_from(name, shapes) is not None:
        return "other"
    return "recurrent" if len(shapes[name]) > 1 and _RECURRENT.fullmatch(_parameter(name, shapes)) else UNKNOWN


def is_weight_by_name(name: str, shapes: Shapes) -> bool:
    """Return whether a float tensor of a state dict is taken for a weight.

    What counts along several axes is one; so is the `weight` of a layer with a single input or output channel. A norm
    has the same shape for its scale and its shift.

    >>> shapes = {"head.weight": (1, 64), "head.bias": (1,), "scale": (1, 64)}
    >>> [is_weight_by_name(name, shapes) for name in shapes]
    [True, False, False]
    """
    shape = shapes[name]
    if weight_computed_from(name, shapes) is not None or len(shape) < 2:
        return False
    if kind_without_layer(shape) != "other" or _RECURRENT.fullmatch(parameter := _parameter(name, shapes)):
        return True
    return parameter == "weight" and shapes.get(name.removesuffix("weight") + "bias") != shape


def weight_computed_from(name: str, shapes: Shapes) -> str | None:
    """Return the weight that this tensor is only a part of; None if it is a tensor of its own.

    The weight goes by the largest tensor that it is computed from, as in an export.

    >>> shapes = {"0.parametrizations.weight.original0": (8, 1), "0.parametrizations.weight.original1": (8, 4)}
    >>> [weight_computed_from(name, shapes) for name in shapes]
    ['0.parametrizations.weight.original1', None]
    """
    if match := _PARAMETRIZED.fullmatch(name):
        head = name.removesuffix(match["part"])
        originals = [f"{head}original", *(f"{head}original{i}" for i in range(_MOST_ORIGINALS))]
        largest = max((n for n in originals if n in shapes), key=lambda n: math.prod(shapes[n]), default=name)
        return None if largest == name else largest
    stem, _, suffix = name.rpartition("_")
    shape, original, direction = shapes[name], shapes.get(f"{stem}_orig"), shapes.get(f"{stem}_v", ())
    if original is not None and ((suffix == "mask" and shape == original) or (suffix in "uv" and len(shape) == 1)):
        return f"{stem}_orig"
    # weight_norm's lengths count along one axis of the directions; parameters of the user's own may have these names.
    is_length = suffix == "g" and len(direction) > 1 and len(shape) in (0, len(direction))
    return f"{stem}_v" if is_length and kind_without_layer(shape) == "other" else None


def _parameter(name: str, shapes: Shapes) -> str:
    """Return the name in its layer of the weight that is computed from a tensor; its own name if none is."""
    if match := _PARAMETRIZED.fullmatch(name):
        return match["parameter"]
    last = name.rpartition(".")[2]
    stem, _, suffix = last.rpartition("_")
    prefix = name.removesuffix(suffix)
    if suffix == "orig" or (suffix == "v" and f"{prefix}g" in shapes):
        return stem
    return last
