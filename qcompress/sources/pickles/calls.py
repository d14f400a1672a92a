"""The calls of a pickle whose result is built: containers, and tensors as references to their data.

`CALLS` is the whole list. Any other call becomes a stand-in.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from qcompress.errors import SourceError, UnsafeFileError
from qcompress.graph.conversion import TORCH_DTYPES
from qcompress.sources.pickles.standins import Name, StandIn, StorageRef, TensorRef
from qcompress.sources.strided import MAX_AXES, Strided

if TYPE_CHECKING:
    from qcompress.sources.pickles.machine import Machine

Args = tuple[Any, ...]
_ENCODE: Final = "_codecs.encode"  # how Python wrote bytes before protocol 3
_LARGEST: Final = 1 << 63  # sizes are 64-bit integers; larger ones could not even be printed


def safe_key(key: Any) -> Any:
    """The key itself if it is safe to hash, else its description: Python hashes nested tuples without a limit.

    >>> safe_key("w"), safe_key(("w", 3)), safe_key((("w",),))[:9]
    ('w', ('w', 3), '<tuple at')
    """
    if _is_plain(key) or (isinstance(key, tuple) and all(map(_is_plain, key))):
        return key
    return f"<{type(key).__name__} at {id(key)}>"


def _is_plain(key: Any) -> bool:
    return isinstance(key, str | int | float | bytes | Name | StandIn | None)


def _pairs(machine: "Machine", args: Args) -> Iterable[tuple[Any, Any]]:
    given = args[0] if args and isinstance(args[0], list) else []
    machine.spend(len(given))
    return ((safe_key(p[0]), p[1]) for p in given if isinstance(p, list | tuple) and len(p) == 2)


def _dict(machine: "Machine", args: Args) -> dict[Any, Any]:
    return dict(_pairs(machine, args))


def _ordered_dict(machine: "Machine", args: Args) -> OrderedDict[Any, Any]:
    return OrderedDict(_pairs(machine, args))


def _set(machine: "Machine", args: Args) -> set[Any]:
    given = args[0] if args and isinstance(args[0], list | tuple) else ()
    machine.spend(len(given))
    return set(map(safe_key, given))


def _tensor(machine: "Machine", args: Args) -> TensorRef:
    """`_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks, metadata)`."""
    storage, offset, shape, stride, *rest = args
    if len(rest) > 2 and rest[2]:
        raise SourceError(f"{machine.label}: a conjugate view of a tensor is not readable; save it resolved.")
    return _reference(machine, storage, offset, shape, stride)


def _tensor_v3(machine: "Machine", args: Args) -> TensorRef:
    """The same with the dtype in seventh place, for dtypes that have no class of storages."""
    storage, offset, shape, stride = args[:4]
    dtype = args[6]
    return _reference(machine, storage, offset, shape, stride, dtype.name if isinstance(dtype, Name) else str(dtype))


def _reference(
    machine: "Machine", storage: Any, offset: Any, shape: Any, stride: Any, dtype: str | None = None
) -> TensorRef:
    shape, stride = (s.args[0] if isinstance(s, StandIn) and s.args else s for s in (shape, stride))
    if not isinstance(storage, StorageRef) or not all(isinstance(s, list | tuple) for s in (shape, stride)):
        raise SourceError(f"{machine.label} is damaged: a tensor in it has no storage or no shape.")
    if max(len(shape), len(stride)) > MAX_AXES:
        raise SourceError(f"{machine.label} is damaged: a tensor in it has over {MAX_AXES} axes.")
    if not all(type(n) is int and -_LARGEST <= n < _LARGEST for n in (offset, *shape, *stride)):
        raise SourceError(f"{machine.label} is damaged: a size of a tensor in it is no 64-bit integer.")
    name = dtype or storage.dtype
    if name not in TORCH_DTYPES:
        raise SourceError(f"{machine.label}: a tensor of dtype {name[:40]} is not readable.")
    return TensorRef(Strided(storage.key, TORCH_DTYPES[name], offset, tuple(shape), tuple(stride)))


def _parameter(machine: "Machine", args: Args) -> Any:
    inner = args[0]
    return TensorRef(inner.view, parameter=True) if isinstance(inner, TensorRef) else inner


def _subclass(machine: "Machine", args: Args) -> Any:
    """`_rebuild_from_type_v2(function, class, arguments, state)`: a tensor with attributes."""
    return machine.call(args[0], args[2])


def _bytearray(machine: "Machine", args: Args) -> StandIn:
    if args and not (isinstance(args[0], bytes) or (isinstance(args[0], StandIn) and str(args[0].made_by) == _ENCODE)):
        raise UnsafeFileError(
            f"{machine.label} is refused: its pickle asks for a bytearray of {str(args[0])[:40]} bytes that are not in "
            "the file. Nothing of it was run."
        )
    return StandIn(Name("builtins", "bytearray"), args)


def _unreadable(machine: "Machine", args: Args) -> Any:
    raise SourceError(
        f"{machine.label}: it holds a sparse, quantized, nested or otherwise special tensor, which is not readable. "
        "Save a float model."
    )


CALLS: Final[Mapping[str, Callable[["Machine", Args], Any]]] = {
    "collections.OrderedDict": _ordered_dict,
    "builtins.dict": _dict,
    "builtins.set": _set,
    "builtins.bytearray": _bytearray,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch._utils._rebuild_sparse_tensor": _unreadable,
    "torch._utils._rebuild_qtensor": _unreadable,
    "torch._utils._rebuild_nested_tensor": _unreadable,
    "torch._utils._rebuild_meta_tensor_no_storage": _unreadable,
    "torch._utils._rebuild_wrapper_subclass": _unreadable,
    "torch._utils._rebuild_device_tensor_from_numpy": _unreadable,
}
