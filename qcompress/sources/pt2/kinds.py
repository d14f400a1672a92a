"""Layer kinds of an exported program's parameters, read from its graph's JSON."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

# Operator -> (name of the weight's argument, kind).
_WEIGHT_OF: Final[Mapping[str, tuple[str, str]]] = {
    "conv1d": ("weight", "conv"),
    "conv2d": ("weight", "conv"),
    "conv3d": ("weight", "conv"),
    "convolution": ("weight", "conv"),
    "_convolution": ("weight", "conv"),
    "conv_transpose1d": ("weight", "conv_transpose"),
    "conv_transpose2d": ("weight", "conv_transpose"),
    "conv_transpose3d": ("weight", "conv_transpose"),
    "linear": ("weight", "linear"),
    "addmm": ("mat2", "linear"),
    "mm": ("mat2", "linear"),
    "matmul": ("other", "linear"),
    "embedding": ("weight", "embedding"),
    "embedding_bag": ("weight", "embedding"),
    "_embedding_bag": ("weight", "embedding"),
}
_RECURRENT: Final = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
# Operators that hand a weight on, in another form.
_VIEWS: Final = frozenset(
    {"t", "transpose", "permute", "view", "reshape", "unsqueeze", "squeeze", "_to_copy", "to", "contiguous", "clone"}
    | {"detach", "alias", "slice", "select"}
)


def graph_kinds(graph_module: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Kind of each parameter and buffer that a layer uses as its weight; the first use counts.

    Args:
        graph_module: the `graph_module` of `models/model.json`; only read, anything odd in it is passed over.
        shapes: of the parameters and buffers, by qualified name.

    >>> graph = {"nodes": [{"target": "torch.ops.aten.linear.default", "inputs": [
    ...     {"name": "weight", "arg": {"as_tensor": {"name": "p_w"}}}], "outputs": []}]}
    >>> specs = [{"parameter": {"arg": {"name": "p_w"}, "parameter_name": "fc.weight"}}]
    >>> graph_kinds({"graph": graph, "signature": {"input_specs": specs}}, {"fc.weight": (2, 3)})
    {'fc.weight': 'linear'}
    """
    owner = dict(_lifted(graph_module))
    kinds: dict[str, str] = {}
    for node in graph_module["graph"]["nodes"]:
        operator = _operator(node.get("target"))
        arguments = {i.get("name"): i.get("arg") for i in node.get("inputs", [])}
        if operator in _VIEWS:
            source = _tensor_name(arguments.get("self", arguments.get("input")))
            for output in node.get("outputs", []):
                if source in owner and (name := _tensor_name(output)) is not None:
                    owner[name] = owner[source]
        elif operator in _RECURRENT:
            for name in _tensor_names(arguments.get("params")):
                if name in owner and len(shapes.get(owner[name], ())) > 1:
                    kinds.setdefault(owner[name], "recurrent")
        elif operator in _WEIGHT_OF:
            argument, kind = _WEIGHT_OF[operator]
            qualified = owner.get(_tensor_name(arguments.get(argument)) or "")
            if qualified is not None and len(shapes.get(qualified, ())) > 1:
                shape = shapes[qualified]
                kinds.setdefault(qualified, _conv_kind(arguments, shape) if kind == "conv" else kind)
    return kinds


def _conv_kind(arguments: Mapping[Any, Any], shape: tuple[int, ...]) -> str:
    if (arguments.get("transposed") or {}).get("as_bool") is True:
        return "conv_transpose"
    groups = (arguments.get("groups") or {}).get("as_int", 1)
    return "depthwise" if isinstance(groups, int) and groups > 1 and shape[1] == 1 else "conv"


def _lifted(graph_module: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name of the graph's input, qualified name) of each parameter and buffer."""
    fields = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
    for spec in graph_module["signature"]["input_specs"]:
        for which, field in fields.items():
            if isinstance(entry := spec.get(which), dict):
                yield str(entry["arg"]["name"]), str(entry[field])


def _operator(target: Any) -> str:
    parts = target.split(".") if isinstance(target, str) else []
    return parts[3] if len(parts) > 3 and parts[:3] == ["torch", "ops", "aten"] else ""


def _tensor_name(argument: Any) -> str | None:
    inner = argument.get("as_tensor") if isinstance(argument, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) else None


def _tensor_names(argument: Any) -> list[str]:
    inner = argument.get("as_tensors") if isinstance(argument, dict) else None
    return [n["name"] for n in inner if isinstance(n, dict) and isinstance(n.get("name"), str)] if inner else []
