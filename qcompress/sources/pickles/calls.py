"""The calls of a pickle whose result is built: containers, and tensors as references to their data.

`CALLS` is the whole list. Any other call becomes a stand-in.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Protocol

from qcompress.errors import SourceError, UnsafeFileError
from qcompress.graph.conversion import TORCH_DTYPES
from qcompress.sources.pickles.standins import Name, StandIn, StorageRef, TensorRef, shown
from qcompress.sources.strided import MAX_AXES, Strided

Args = tuple[Any, ...]
_PLAIN: Final = frozenset({str, int, float, bool, bytes, type(None), Name, StandIn})
_ENCODE: Final = "_codecs.encode"  # how Python wrote bytes before protocol 3
_LARGEST: Final = 1 << 63  # sizes are 64-bit integers; larger ones could not even be printed


class Reader(Protocol):
    """The machine that reads a pickle, as the calls below see it."""

    label: str

    def spend(self, steps: int) -> None:
        """Count elements that are copied; raises SourceError when they are too many."""

    def call(self, function: Any, args: Any) -> Any:
        """Return the result of another call."""


def safe_key(key: Any) -> Any:
    """Return the key if it is safe to hash, else a description of it: Python hashes nested tuples without a limit.

    >>> safe_key("w"), safe_key(("w", 3)), safe_key((("w",),))[:9]
    ('w', ('w', 3), '<tuple at')
    """
    if type(key) in _PLAIN or (type(key) is tuple and all(type(k) in _PLAIN for k in key)):
        return key
    return f"<{type(key).__name__} at {id(key)}>"


def _pairs(reader: Reader, args: Args) -> Iterable[tuple[Any, Any]]:
    given = args[0] if args and isinstance(args[0], list) else []
    reader.spend(len(given))
    return ((safe_key(p[0]), p[1]) for p in given if isinstance(p, list | tuple) and len(p) == 2)


def _dict(reader: Reader, args: Args) -> dict[Any, Any]:
    return dict(_pairs(reader, args))


def _ordered_dict(reader: Reader, args: Args) -> OrderedDict[Any, Any]:
    return OrderedDict(_pairs(reader, args))


def _set(reader: Reader, args: Args) -> set[Any]:
    given = args[0] if args and isinstance(args[0], list | tuple) else ()
    reader.spend(len(given))
    return set(map(safe_key, given))


def _tensor(reader: Reader, args: Args) -> TensorRef:
    """Return the tensor of `_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks, metadata)`."""
    storage, offset, shape, stride, *rest = args
    if len(rest) > 2 and rest[2]:
        raise SourceError(f"{reader.label}: a conjugate view of a tensor is not readable; save it resolved.")
    return _reference(reader, storage, offset, shape, stride)


def _tensor_v3(reader: Reader, args: Args) -> TensorRef:
    """Return the tensor of a call with the dtype as seventh argument, for dtypes without a class of storages."""
    storage, offset, shape, stride = args[:4]
    dtype = args[6]
    return _reference(reader, storage, offset, shape, stride, dtype.name if isinstance(dtype, Name) else str(dtype))


def _reference(
    reader: Reader, storage: Any, offset: Any, shape: Any, stride: Any, dtype: str | None = None
) -> TensorRef:
    shape, stride = (s.args[0] if isinstance(s, StandIn) and s.args else s for s in (shape, stride))
    if not isinstance(storage, StorageRef) or not all(isinstance(s, list | tuple) for s in (shape, stride)):
        raise SourceError(f"{reader.label} is damaged: a tensor in it has no storage or no shape.")
    if max(len(shape), len(stride)) > MAX_AXES:
        raise SourceError(f"{reader.label} is damaged: a tensor in it has over {MAX_AXES} axes.")
    if not all(type(n) is int and -_LARGEST <= n < _LARGEST for n in (offset, *shape, *stride)):
        raise SourceError(f"{reader.label} is damaged: a size of a tensor in it is not a 64-bit integer.")
    name = dtype or storage.dtype
    if name not in TORCH_DTYPES:
        raise SourceError(f"{reader.label}: a tensor of dtype {name[:40]} is not readable.")
    return TensorRef(Strided(storage.key, TORCH_DTYPES[name], offset, tuple(shape), tuple(stride)))


def _parameter(reader: Reader, args: Args) -> Any:
    inner = args[0]
    return TensorRef(inner.view, parameter=True) if isinstance(inner, TensorRef) else inner


def _subclass(reader: Reader, args: Args) -> Any:
    """Return the tensor with attributes of `_rebuild_from_type_v2(function, class, arguments, state)`."""
    return reader.call(args[0], args[2])


def _bytearray(reader: Reader, args: Args) -> StandIn:
    if args and not (isinstance(args[0], bytes) or (isinstance(args[0], StandIn) and str(args[0].made_by) == _ENCODE)):
        raise UnsafeFileError(
            f"{reader.label} is refused: its pickle asks for a bytearray made of {shown(args[0])}, which is not what "
            "torch.save writes and could be of any size. None of its code was run."
        )
    return StandIn(Name("builtins", "bytearray"), args)


def _unreadable(reader: Reader, args: Args) -> Any:
    raise SourceError(
        f"{reader.label}: it holds a sparse, quantized, nested or otherwise special tensor, which is not readable. "
        "Save a float model."
    )


CALLS: Final[Mapping[str, Callable[[Reader, Args], Any]]] = {
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
