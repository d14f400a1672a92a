"""Finds operators that draw random numbers: a model whose outputs are random cannot be compared with anything."""

from typing import Any, Final

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from qcompress.errors import SourceError
from qcompress.graph.nodes import arguments, line_of

_SWITCHES: Final = ("train", "training")
_SHARES: Final = ("p", "dropout", "dropout_p")  # of values that are drawn anew


def check_repeatable(graph: Graph) -> None:
    """Refuse a graph whose outputs are random, in eval mode too.

    Args:
        graph: without nodes that nothing takes, but for those that draw.

    Raises:
        SourceError: names the first operator that draws random numbers, and the user's line.
    """
    drawing = next((node for node in graph.nodes if node.users and _draws(node)), None)
    if drawing is None:
        return
    line = line_of(drawing)
    raise SourceError(
        f"The model's outputs are random, in eval mode too: {str(drawing.target).removeprefix('aten.')} draws random "
        f"numbers{'' if line is None else f' at {line}'}. Switch that off in eval mode (training=self.training), or "
        "make the numbers an input of the model."
    )


def _draws(node: Node) -> bool:
    target = node.target
    if not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    given: dict[str, Any] = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    given |= arguments(node)
    is_off = any(given.get(name) is False for name in _SWITCHES) or any(given.get(name) == 0 for name in _SHARES)
    return not is_off
