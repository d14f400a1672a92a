"""Checks of the strings and numbers in an exported program's JSON: one function for each form of the schema.

`torch.export.load` turns the JSON into Python source and runs it: names of values become names of variables, targets
become attributes of the module `torch`, tree specifications may import any module, sizes are evaluated by sympy, guards
are executed. So each of these strings must have the form that torch writes.
"""

import json
import keyword
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from qcompress.sources.pt2.symbols import is_symbolic_expression

# Operators of these namespaces compute on tensors. Further ones may read files or talk to other processes.
NAMESPACES: Final = frozenset({"aten", "prims", "quantized_decomposed", "torchvision"})
# ... but for these.
FORBIDDEN: Final = frozenset({"from_file", "save", "load", "_print", "warn"})
# The only operators with two underscores: what Python calls for `mask & other`, `mask &= other` and so on.
BITWISE: Final = frozenset(
    f"__{place}{name}__" for place in ("", "i") for name in ("and", "or", "xor", "lshift", "rshift")
)
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
# Qualified names are at worst written between quotes: no quote, no backslash, no line break.
_QUALIFIED: Final = re.compile(r"[\w.\-/:+@ ]*\Z")
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


class UnsafeTextError(Exception):
    """A string could run code; the message says which."""


def is_safe_target(target: object) -> bool:
    """Return whether a node's target is an operator that computes on tensors and does nothing else.

    >>> is_safe_target("torch.ops.aten.conv2d.default"), is_safe_target("torch.os.system")
    (True, False)
    >>> is_safe_target("torch.ops.aten.from_file.default"), is_safe_target("torch.ops.load_library")
    (False, False)
    >>> is_safe_target("torch.ops.aten.__and__.Tensor"), is_safe_target("torch.ops.aten.__class__.Tensor")
    (True, False)
    """
    if not isinstance(target, str):
        return False
    if target in FUNCTIONS:
        return True
    if higher := _HIGHER.match(target):
        return higher[1] in HIGHER_ORDER
    found = _OPERATOR.match(target)
    if found is None or found[1] not in NAMESPACES or found[2] in FORBIDDEN:
        return False
    return "__" not in (found[3] if found[2] in BITWISE else target)


def _integer(value: Any) -> int:
    if type(value) is not int or not -(1 << 63) <= value < 1 << 64:
        raise TypeError
    return value


def _enum(value: Any) -> int:
    if not 0 <= _integer(value) < 256:
        raise ValueError
    return int(value)


def _float(value: Any) -> float | str:
    if value in ("Infinity", "-Infinity", "NaN"):  # as JSON has no numbers for them
        return str(value)
    if type(value) not in (int, float):
        raise TypeError
    return float(value)


def _boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise TypeError
    return value


def _text(value: Any) -> str:
    """Return a string that torch only compares or quotes, and does not evaluate."""
    if not isinstance(value, str):
        raise TypeError
    return value


def _quotable_text(value: Any) -> str:
    """Return a string that torch writes between quotes into the source of guards."""
    if not _text(value).isprintable() or any(c in value for c in "'\"\\"):
        raise UnsafeTextError(f"the constant {value[:80]!r}")
    return str(value)


def _name(value: Any) -> str:
    """Return the name of a value, which becomes a Python variable; unused inputs have empty names."""
    if not isinstance(value, str) or (value and not value.isidentifier()) or keyword.iskeyword(value):
        raise UnsafeTextError(f"the name {str(value)[:80]!r}")
    return value


def _argument_name(value: Any) -> str:
    """Return the name of an operator's argument, such as `from` of `uniform`."""
    if not isinstance(value, str) or (value and not value.isidentifier()):
        raise UnsafeTextError(f"the name {str(value)[:80]!r}")
    return value


def _qualified_name(value: Any) -> str:
    """Return a name that, at worst, is written between quotes."""
    if not isinstance(value, str) or not _QUALIFIED.match(value):
        raise UnsafeTextError(f"the name {str(value)[:80]!r}")
    return value


def _expression(value: Any) -> str:
    """Return a size, which torch passes to sympy."""
    if not isinstance(value, str) or not is_symbolic_expression(value):
        raise UnsafeTextError(f"the size {str(value)[:80]!r}")
    return value


def _operator(value: Any) -> str:
    if not isinstance(value, str) or not is_safe_target(value):
        raise UnsafeTextError(f"a call of {str(value)[:80]!r}")
    return value


def _custom_object(value: Any) -> None:
    raise UnsafeTextError(f"the custom object {str(value)[:80]!r}")


def _no_custom_objects(value: Any) -> dict[str, Any]:
    if value:
        raise UnsafeTextError("custom objects")
    return {}


def _origins(value: Any) -> dict[str, str]:
    """Return the metadata on a node's origin; torch evaluates other metadata."""
    return {key: text for key in _KEPT_METADATA if isinstance(text := value.get(key), str)}


def _verifiers(value: Any) -> list[str]:
    return [v for v in value if v in ("ATEN", "TRAINING")] or ["TRAINING"]


def _tree(text: Any) -> str:
    """Return a pytree specification of nested tuples, lists and dicts; torch imports the modules of any other type.

    A type that names its parts, as transformers' outputs do, becomes a dict.
    """
    version, root = json.loads(text)
    if version != 1:
        raise ValueError
    nodes = [root]
    while nodes:
        node = nodes.pop()
        context = json.loads(node["context"]) if isinstance(node["context"], str) else node["context"]
        if node["type"] not in _TREE_TYPES:
            if not _are_names(context, len(node["children_spec"])):
                raise UnsafeTextError(f"inputs or outputs of the type {str(node['type'])[:80]!r}")
            node["type"] = "builtins.dict"
        if isinstance(context, dict) or any(not is_key(k) for k in context or ()):
            raise UnsafeTextError(f"inputs or outputs with the keys {str(context)[:80]!r}")
        nodes += node["children_spec"]
    return json.dumps([version, root])


def _are_names(context: Any, count: int) -> bool:
    """Return whether the context of a type holds a name for each of its parts."""
    return isinstance(context, list) and len(context) == len({n for n in context if isinstance(n, str)}) == count > 0


def is_key(key: object) -> bool:
    """Return whether a key of a dict of inputs or outputs is one that torch may write into source."""
    if isinstance(key, str):
        return _QUALIFIED.match(key) is not None
    return key is None or isinstance(key, int)


# The forms: each function returns the value that torch may get, or raises.
FORMS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "int": _integer,
    "enum": _enum,
    "float": _float,
    "bool": _boolean,
    "text": _text,
    "quotable_text": _quotable_text,
    "name": _name,
    "argument_name": _argument_name,
    "qualified_name": _qualified_name,
    "expression": _expression,
    "operator": _operator,
    "tree": _tree,
    "origins": _origins,
    "verifiers": _verifiers,
    "custom_object": _custom_object,
    "no_custom_objects": _no_custom_objects,
    "left_out": lambda value: {},
    "guards": lambda value: [],  # torch would execute them
}
# Descriptions of forms for messages; the other forms write their own messages.
DESCRIPTIONS: Final = {
    "int": "an integer of 64 bits",
    "enum": "a small integer",
    "float": "a number",
    "bool": "true or false",
    "text": "a string",
    "quotable_text": "a string",
    "tree": "a tree of version 1",
    "origins": "an object",
    "verifiers": "a list",
}
