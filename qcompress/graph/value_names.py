"""Names of the inputs and outputs of a program, and of their dynamic axes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from qcompress.graph.program import sizes, value_of


def input_names(exported: ExportedProgram, names: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """Return the names of the inputs: forward's argument names, or a dict's own keys if they are unique."""
    plain = names or tuple(str(n) for n in exported.graph_signature.user_inputs)
    spec = exported.call_spec.in_spec
    if spec is None or spec.num_leaves != len(plain):
        return plain
    paths = _paths(pytree.tree_unflatten(list(range(len(plain))), spec))
    keys = [key_name(path[2:]) for path in paths]  # path: (args | kwargs) -> argument -> keys
    counts = Counter([k for k in keys if k] + [n for k, n in zip(keys, plain, strict=True) if not k])
    return tuple(k if k and counts[k] == 1 else n for k, n in zip(keys, plain, strict=True))


def output_names(exported: ExportedProgram) -> tuple[str, ...]:
    """Return the names of the outputs: the keys of a dict, else `output`, `output_1`, ..."""
    count = len(exported.graph_signature.user_outputs)
    spec = exported.call_spec.out_spec
    names: list[str] = []
    for path in _paths(pytree.tree_unflatten(list(range(count)), spec)):
        base = key_name(path) or "output"
        taken = sum(n == base or n.startswith(f"{base}_") for n in names)
        names.append(base if base not in names else f"{base}_{taken}")
    return tuple(names)


def axis_names(
    nodes: Mapping[str, Node], given: Mapping[tuple[str, int], str], *, one_batch: bool
) -> dict[tuple[str, int], str]:
    """Return the name of each dynamic axis of the inputs: the user's, or `batch`, or `sequence` for lengths of tokens.

    Axes of equal size share a name.

    Args:
        nodes: the inputs by name.
        given: the user's names.
        one_batch: whether every dynamic first axis is the batch; if not, those of another symbol get their own names.
    """
    symbols = {
        (name, axis): str(value_of(node).shape[axis])
        for name, node in nodes.items()
        for axis, size in enumerate(sizes(node))
        if size is None
    }
    names = {symbols[key]: label for key, label in reversed(list(given.items())) if key in symbols}
    batch = next((symbol for (_, axis), symbol in symbols.items() if axis == 0), "")
    names.setdefault(batch, "batch")
    for name, node in nodes.items():
        symbol = symbols.get((name, 1))
        if is_tokens(value_of(node)) and symbol is not None and symbol not in names:
            names[symbol] = "sequence" if "sequence" not in names.values() else f"{name}_sequence"
    for (name, axis), symbol in symbols.items():
        names.setdefault(symbol, "batch" if axis == 0 and one_batch else f"{name}_{axis}")
    return {key: given.get(key, names[symbol]) for key, symbol in symbols.items()}


def is_tokens(value: object) -> bool:
    """Return whether an input is token sequences: integers [batch, length].

    >>> is_tokens(torch.zeros(2, 5, dtype=torch.int64)), is_tokens(torch.zeros(2, 5))
    (True, False)
    """
    return isinstance(value, torch.Tensor) and value.ndim == 2 and value.dtype in (torch.int64, torch.int32)


def _paths(tree: Any) -> list[Sequence[Any]]:
    """Return the path to each leaf; an empty one if a library's container does not tell its keys."""
    tree = dict(tree) if isinstance(tree, Mapping) else tree  # such as a ModelOutput of transformers
    try:
        return [path for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    except ValueError:
        return [() for _ in pytree.tree_leaves(tree)]


def key_name(path: Sequence[Any]) -> str:
    """Return the string keys of a pytree path, joined."""
    keys = [getattr(k, "key", getattr(k, "name", None)) for k in path]
    return "_".join(k for k in keys if isinstance(k, str))
