"""The graph of a `.pt2` file as calls, read from its JSON: kinds of weights without torch and without running it."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from qcompress.graph.weights import Call, Tensor, Value, kinds_of_calls

_LIFTED = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
_PREFIX = "torch.ops.aten."


def graph_kinds(graph_module: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the kind of each tensor that the graph uses, by qualified name; the first use counts.

    Args:
        graph_module: the `graph_module` of `models/model.json`; only read. Anything odd in it is skipped.
        tensors: parameters, buffers and constants by qualified name; tied ones are the same under each of their names.

    >>> graph = {"nodes": [{"target": "torch.ops.aten.linear.default", "inputs": [
    ...     {"name": "input", "arg": {"as_tensor": {"name": "x"}}},
    ...     {"name": "weight", "arg": {"as_tensor": {"name": "p_w"}}}], "outputs": [{"as_tensor": {"name": "y"}}]}]}
    >>> specs = [{"parameter": {"arg": {"name": "p_w"}, "parameter_name": "fc.weight"}}]
    >>> tensors = {"fc.weight": Tensor("fc.weight", (2, 3))}
    >>> graph_kinds({"graph": graph, "signature": {"input_specs": specs}}, tensors)
    {'fc.weight': 'linear'}
    """
    state = {
        value: replace(tensors[name], is_parameter=sort == "parameter")
        for sort, value, name in _lifted(graph_module)
        if name in tensors
    }
    return kinds_of_calls(_calls(graph_module["graph"]), state)


def _calls(graph: Mapping[str, Any]) -> Iterator[Call]:
    metadata = graph.get("tensor_values")
    ranks = {name: _rank(value) for name, value in metadata.items()} if isinstance(metadata, dict) else {}
    for node in graph["nodes"]:
        target = node.get("target")
        operator = target.removeprefix(_PREFIX) if isinstance(target, str) and target.startswith(_PREFIX) else ""
        arguments = {str(i.get("name")): _argument(i.get("arg"), ranks) for i in node.get("inputs", [])}
        outputs = [name for output in node.get("outputs", []) for name in _names(output)]
        if outputs:  # a check of a value returns none, and makes no use of it
            yield Call(operator, arguments, tuple(outputs))


def _lifted(graph_module: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the sort, the name in the graph and the qualified name of each parameter, buffer and constant."""
    for spec in graph_module["signature"]["input_specs"]:
        for which, field in _LIFTED.items():
            if isinstance(entry := spec.get(which), dict):
                yield which, str(entry["arg"]["name"]), str(entry[field])


def _argument(argument: Any, ranks: Mapping[str, int | None]) -> Any:
    """Return a tensor as a Value, several as a list of them, and a constant as it is."""
    if not isinstance(argument, dict):
        return None
    values = [Value(name, ranks.get(name)) for name in _names(argument)]
    if "as_tensor" in argument:
        return values[0] if values else None
    return values or argument.get("as_int", argument.get("as_bool"))


def _names(argument: Any) -> list[str]:
    """Return the names of the tensors of an argument or an output."""
    if not isinstance(argument, dict):
        return []
    tensors = [argument.get("as_tensor"), *(argument.get("as_tensors") or ())]
    return [t["name"] for t in tensors if isinstance(t, dict) and isinstance(t.get("name"), str)]


def _rank(value: Any) -> int | None:
    sizes = value.get("sizes") if isinstance(value, dict) else None
    return len(sizes) if isinstance(sizes, list) else None
