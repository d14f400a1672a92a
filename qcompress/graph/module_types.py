"""Kinds of weights by the type of their layer, for a pickled module, which must not be run and so has no graph.

A layer is known by its public fields, so that stand-ins for classes and classes derived from torch's are read alike.
"""

from collections.abc import Container, Mapping
from typing import Any, Final

from qcompress.graph.weights import Call, Tensor, Value, kinds_of_calls
from qcompress.kinds import kind_without_layer

_CONV: Final = ("in_channels", "out_channels", "groups", "kernel_size", "transposed")
_LINEAR: Final = ("in_features", "out_features")
_EMBEDDING: Final = ("num_embeddings", "embedding_dim")
_ATTENTION: Final = ("embed_dim", "num_heads")
_PROJECTIONS: Final = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_RECURRENT: Final = ("input_size", "hidden_size")


def layer_kind(fields: Mapping[str, Any], parameter: str, shape: tuple[int, ...]) -> str:
    """Return the kind of a layer's parameter.

    Args:
        fields: the layer's attributes.
        parameter: the parameter's own name in it.
        shape: the parameter's shape.

    >>> conv = dict(in_channels=8, out_channels=8, groups=8, kernel_size=(3, 3), transposed=False)
    >>> layer_kind(conv, "weight", (8, 1, 3, 3)), layer_kind(conv, "bias", (8,))
    ('depthwise', 'other')
    """
    computed = computed_by_hook(parameter, fields.get("_parameters") or ())
    call = parameter_call(fields, computed or parameter, Value(parameter, len(shape)))
    calls = [] if call is None else [call]
    return kinds_of_calls(calls, {parameter: Tensor(parameter, shape)}).get(parameter, kind_without_layer(shape))


def computed_by_hook(parameter: str, names: Container[str]) -> str | None:
    """Return the weight that torch.nn.utils' weight_norm, spectral_norm or prune computes from a parameter.

    Args:
        parameter: the parameter's own name in its layer.
        names: of all parameters of the layer.

    >>> computed_by_hook("weight_v", ["weight_g", "weight_v"]), computed_by_hook("weight_v", ["weight_v"])
    ('weight', None)
    """
    name, _, suffix = parameter.rpartition("_")
    return name if suffix == "orig" or (suffix == "v" and f"{name}_g" in names) else None


def parameter_call(fields: Mapping[str, Any], parameter: str, value: Value) -> Call | None:
    """Return the call by which a layer uses one of its parameters as a weight; None if it does not.

    Args:
        fields: the layer's attributes.
        parameter: the parameter's own name in it.
        value: the parameter as an argument of the call.
    """

    def has(names: tuple[str, ...]) -> bool:
        return all(name in fields for name in names)

    if parameter.startswith("weight_") and has(_RECURRENT):
        return Call("lstm.input", {"params": [value]}, ())
    if parameter in _PROJECTIONS and has(_ATTENTION):
        return Call("linear.default", {"weight": value}, ())
    if parameter != "weight":
        return None
    if has(_CONV):
        given = {"weight": value, "groups": fields["groups"], "transposed": fields["transposed"]}
        return Call("convolution.default", given, ())
    if has(_EMBEDDING):
        return Call("embedding.default", {"weight": value}, ())
    # nn.Bilinear has in1_features: its weight is not that of a linear layer.
    return Call("linear.default", {"weight": value}, ()) if has(_LINEAR) and value.rank == 2 else None
