"""The graph of an exported program, checked before torch sees it.

`torch.export.load` turns this JSON into Python source and runs it: names of values become names of variables, targets
become attributes of the module `torch`, tree specifications may import any module, sizes are evaluated by sympy, guards
are executed. So each of these strings must have the form that torch writes, and what is not needed is left out.
"""

import json
import keyword
import re
from collections.abc import Mapping
from typing import Any, Final

from qcompress.errors import SourceError, UnsafeFileError
from qcompress.sources.pt2.symbols import is_symbolic_expression

# Operators of these namespaces compute on tensors. Further ones may read files or talk to other processes.
NAMESPACES: Final = frozenset({"aten", "prims", "quantized_decomposed", "torchvision"})
# ... but for these.
FORBIDDEN: Final = frozenset({"from_file", "save", "load", "_print", "warn"})
HIGHER_ORDER: Final = frozenset(
    {
        "associative_scan",
        "cond",
        "invoke_subgraph",
        "map_impl",
        "scan",
        "while_loop",
        "wrap_with_autocast",
        "wrap_with_set_grad_enabled",
    }
)
_SYMBOLIC: Final = {
    "_operator": "eq ne le ge lt gt neg pos mul add sub floordiv mod pow truediv and_ or_ lshift rshift getitem",
    "torch": "sym_not sym_int sym_float sym_ite sym_max sym_min sym_sqrt _sym_sqrt _sym_log2",
    "math": "trunc ceil floor sqrt",
}
FUNCTIONS: Final = frozenset(f"{module}.{name}" for module, names in _SYMBOLIC.items() for name in names.split())
_OPERATOR: Final = re.compile(r"torch\.ops\.([A-Za-z]\w*)\.([A-Za-z_]\w*)\.([A-Za-z]\w*)\Z", re.ASCII)
_HIGHER: Final = re.compile(r"torch\.ops\.higher_order\.([a-z_]\w*)\Z", re.ASCII)
# Qualified names end up in quotes at worst: no quote, no backslash, no line break.
_QUALIFIED: Final = re.compile(r"[\w.\-/:+@ ]*\Z")
_VALUE_NAMES: Final = frozenset({"name", "as_name"})
_QUALIFIED_NAMES: Final = frozenset({"parameter_name", "buffer_name", "tensor_constant_name", "user_input_name", "fqn"})
_NAMED_TABLES: Final = frozenset({"tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"})
_KEPT_METADATA: Final = ("stack_trace", "nn_module_stack", "torch_fn")
_TREE_TYPES: Final = frozenset(
    {
        None,
        "builtins.tuple",
        "builtins.list",
        "builtins.dict",
        "collections.OrderedDict",
        "torch.fx.immutable_collections.immutable_list",
        "torch.fx.immutable_collections.immutable_dict",
    }
)
MAX_DEPTH: Final = 100


def checked_program(program: Any, label: str) -> dict[str, Any]:
    """A copy of `models/model.json` in which every string that torch evaluates has been checked.

    Guards, annotations and unknown metadata are left out: torch would execute the guards, and none is needed to run
    the program on inputs of the shapes that it was exported for.

    Args:
        program: the parsed JSON.
        label: the file, for messages.

    Raises:
        UnsafeFileError: something in it would be evaluated that is not what torch writes.
        SourceError: it is no exported program.
    """
    try:
        graph_module = dict(program["graph_module"])
        graph_module["metadata"] = {}
        graph_module["treespec_namedtuple_fields"] = {}
        ranges = program["range_constraints"]
        checked = {
            "opset_version": dict(program["opset_version"]),
            "range_constraints": {_symbol(k, label): v for k, v in ranges.items()},
            "schema_version": program["schema_version"],
            "verifiers": [v for v in program.get("verifiers", []) if v in ("ATEN", "TRAINING")] or ["TRAINING"],
            "torch_version": str(program.get("torch_version", "")),
            "guards_code": [],
        }
        _check_calls(graph_module["module_call_graph"], label)
        return {"graph_module": _checked(graph_module, label, 0), **checked}
    except (KeyError, TypeError, AttributeError) as e:
        raise SourceError(
            f"{label} is damaged: its graph is not what torch writes ({type(e).__name__}: {e})."
        ) from None


def is_safe_target(target: object) -> bool:
    """Whether a node's target is an operator that computes on tensors and does nothing else.

    >>> is_safe_target("torch.ops.aten.conv2d.default"), is_safe_target("torch.os.system")
    (True, False)
    >>> is_safe_target("torch.ops.aten.from_file.default"), is_safe_target("torch.ops.load_library")
    (False, False)
    """
    if not isinstance(target, str):
        return False
    if target in FUNCTIONS:
        return True
    if higher := _HIGHER.match(target):
        return higher[1] in HIGHER_ORDER
    found = _OPERATOR.match(target)
    return found is not None and found[1] in NAMESPACES and found[2] not in FORBIDDEN and "__" not in target


def _checked(value: Any, label: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise SourceError(f"{label} is refused: its graph is nested over {MAX_DEPTH} deep.")
    if isinstance(value, list):
        return [_checked(v, label, depth + 1) for v in value]
    if not isinstance(value, dict):
        return value
    return {key: _checked_field(key, inner, label, depth) for key, inner in value.items()}


def _checked_field(key: str, value: Any, label: str, depth: int) -> Any:
    if key == "metadata" and isinstance(value, Mapping):
        return {k: value[k] for k in _KEPT_METADATA if isinstance(value.get(k), str)}
    if key in ("as_custom_obj", "custom_obj"):
        raise _unsafe(label, f"the custom object {str(value)[:80]!r}")
    if key == "custom_obj_values":
        if value:
            raise _unsafe(label, "custom objects")
        return {}
    if key in ("target", "as_operator") and not is_safe_target(value):
        raise _unsafe(label, f"a call of {str(value)[:80]!r}")
    if key == "expr_str" and not (isinstance(value, str) and is_symbolic_expression(value)):
        raise _unsafe(label, f"the size {str(value)[:80]!r}")
    if key in _VALUE_NAMES and value is not None and not isinstance(value, dict):
        _require_name(value, label)
    if key in _QUALIFIED_NAMES and not (isinstance(value, str) and _QUALIFIED.match(value)):
        raise _unsafe(label, f"the name {str(value)[:80]!r}")
    if key in _NAMED_TABLES:
        for name in value:
            _require_name(name, label)
    return _checked(value, label, depth + 1)


def _require_name(name: Any, label: str) -> None:
    """Names of values become Python variables; those of inputs may be empty."""
    if not isinstance(name, str) or (name and not name.isidentifier()) or (keyword.iskeyword(name)):
        raise _unsafe(label, f"the name {str(name)[:80]!r}")


def _symbol(name: Any, label: str) -> str:
    if not isinstance(name, str) or not is_symbolic_expression(name):
        raise _unsafe(label, f"the size {str(name)[:80]!r}")
    return name


def _check_calls(entries: Any, label: str) -> None:
    for entry in entries:
        signature = entry.get("signature")
        if signature is None:
            continue
        for which in ("in_spec", "out_spec"):
            _check_tree(signature[which], label)
        for name in signature.get("forward_arg_names") or ():
            _require_name(name, label)


def _check_tree(text: Any, label: str) -> None:
    """A pytree specification: nested tuples, lists and dicts, no enums (torch imports theirs)."""
    try:
        version, pending = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise SourceError(f"{label} is damaged: the tree of its inputs cannot be read.") from None
    if version != 1:
        raise SourceError(f"{label}: the tree of its inputs is of version {version!r}, readable is 1.")
    nodes = [pending]
    while nodes:
        node = nodes.pop()
        if node["type"] not in _TREE_TYPES:
            raise _unsafe(label, f"inputs or outputs of the type {str(node['type'])[:80]!r}")
        context = json.loads(node["context"]) if isinstance(node["context"], str) else node["context"]
        if isinstance(context, dict) or any(not _is_key(k) for k in context or ()):
            raise _unsafe(label, f"inputs or outputs with the keys {str(context)[:80]!r}")
        nodes += node["children_spec"]


def _is_key(key: object) -> bool:
    if isinstance(key, str):
        return _QUALIFIED.match(key) is not None
    return key is None or isinstance(key, int)


def _unsafe(label: str, what: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"{label} is refused: its graph holds {what}, which is not what torch.export.save writes for a float model and "
        "could run code when the program is loaded. Nothing of it was run."
    )
