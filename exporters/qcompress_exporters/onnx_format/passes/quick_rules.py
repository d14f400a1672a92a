"""onnxscript's rewrite rules, tried only at the operators that they are about: large graphs take less time."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
from onnxscript import rewriter


@contextlib.contextmanager
def quick_rules() -> Iterator[None]:
    """Let no rule be compared with nodes that it cannot match; what the rules do stays the same.

    onnxscript compares each of its rules with every node. Where another version keeps them elsewhere, nothing changes.
    """
    with contextlib.ExitStack() as restored:
        for rule in getattr(rewriter, "_DEFAULT_REWRITE_RULES", ()):
            matches = _matcher(rule)
            if matches is not None:
                rule.try_rewrite = _tried_at(matches, rule.try_rewrite)
                restored.callback(delattr, rule, "try_rewrite")
        yield


def _matcher(rule: Any) -> Callable[[str], bool] | None:
    """Return what tells whether a node of some operator can be the last one of what a rule rewrites; None: any can."""
    outputs = list(getattr(getattr(rule, "_target_pattern", None), "output_nodes", ()))
    return getattr(getattr(outputs[0], "op", None), "matches", None) if len(outputs) == 1 else None


def _tried_at(matches: Callable[[str], bool], try_rewrite: Callable[..., Any]) -> Callable[..., Any]:
    def tried(model: ir.Model, graph: Any, node: ir.Node, **options: Any) -> Any:
        return try_rewrite(model, graph, node, **options) if matches(node.op_type) else None

    return tried
