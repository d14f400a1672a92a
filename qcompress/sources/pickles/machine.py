"""A pickle read without running it: every class and function becomes an inert stand-in, nothing is imported.

Tensors become `TensorRef`s, described by numbers that are checked before any of their data is read. The machine is
Python's own pure unpickler with each opcode that could call something replaced.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, cast

from qcompress.errors import SourceError
from qcompress.sources.pickles.standins import STORAGES, Name, StandIn, StorageRef, TensorRef
from qcompress.sources.strided import TORCH_DTYPES, Strided


@dataclass(slots=True)
class Unpickled:
    """What a pickle holds.

    Args:
        value: its object, made of plain containers, stand-ins and tensor references.
        names: every class and function that it names, in order.
        storages: every storage that it refers to, by key.
    """

    value: Any
    names: list[Name]
    storages: dict[str, StorageRef]


class Readable(Protocol):
    """What a pickle is read from: an open file, a buffer, a mapped file."""

    def read(self, n: int, /) -> bytes:
        """The next n bytes."""

    def readline(self) -> bytes:
        """The bytes up to a line's end."""


def unpickle(stream: Readable, label: str) -> Unpickled:
    """Read one pickle, running nothing of it.

    Args:
        stream: stands at the pickle's start, and after it at its end.
        label: the file, for messages.

    Raises:
        SourceError: it is no whole pickle, or one that no torch file needs.

    >>> import io
    >>> result = unpickle(io.BytesIO(b"cos\\nsystem\\n(S'echo'\\ntR."), "model.pt")
    >>> result.names, result.value.args
    ([Name(module='os', name='system')], ('echo',))
    """
    machine = _Machine(stream, label)
    try:
        value = machine.load()
    except SourceError:
        raise
    except RecursionError:
        raise SourceError(f"{label} is refused: its pickle is nested too deeply.") from None
    except Exception as e:  # whatever a damaged stream makes Python's unpickler stumble over
        raise SourceError(f"{label} is damaged: its pickle cannot be read ({type(e).__name__}: {e}).") from None
    return Unpickled(value, list(machine.names), machine.storages)


class _Machine(pickle._Unpickler):
    """Python's unpickler, its calls taken out."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    if TYPE_CHECKING:  # what the unpickler sets up while it runs
        stack: list[Any]
        readline: Callable[[], bytes]
        pop_mark: Callable[[], list[Any]]
        append: Callable[[Any], None]

    def __init__(self, stream: Readable, label: str) -> None:
        super().__init__(stream)
        self.label = label
        self.names: dict[Name, None] = {}
        self.storages: dict[str, StorageRef] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for the name; nothing is imported."""
        found = Name(str(module), str(name))
        return self.names.setdefault(found) or found

    def persistent_load(self, pid: Any) -> Any:
        """A storage that lies beside the pickle, or the name of a class whose source text a legacy file carries."""
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], Name):
            return pid[1]
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            raise SourceError(f"{self.label} is damaged: it refers to something beside it that is no tensor.")
        kind, key, count = pid[1], pid[2], pid[4]
        if len(pid) > 5 and pid[5] is not None:
            raise SourceError(f"{self.label}: views of storages as torch 0.3 wrote them are not read. Save it again.")
        dtype = STORAGES.get(kind.name) if isinstance(kind, Name) else None
        if dtype is None or type(key) is not str or type(count) is not int:
            raise SourceError(f"{self.label}: a storage in it is of a kind that cannot be read.")
        return self.storages.setdefault(key, StorageRef(key, dtype, count))

    def call(self, function: Any, args: Any) -> Any:
        """What REDUCE and its like make: a container, a tensor reference, or a stand-in."""
        if not isinstance(function, Name) or not isinstance(args, tuple):
            raise SourceError(f"{self.label} is damaged: its pickle calls an object of type {type(function).__name__}.")
        known = _CALLS.get((function.module, function.name))
        return StandIn(function, args) if known is None else known(self, args)

    # NOTE: names as in pickle._Unpickler: stack, metastack, pop_mark, append. The opcodes below are all of those that
    # call, set attributes on, or hash something.

    def _reduce(self) -> None:
        stack = self.stack
        args = stack.pop()
        stack[-1] = self.call(stack[-1], args)

    def _newobj_ex(self) -> None:
        stack = self.stack
        kwargs, args = stack.pop(), stack.pop()
        stack[-1] = self.call(stack[-1], (*args, kwargs) if isinstance(args, tuple) else args)

    def _inst(self) -> None:
        module = self.readline()[:-1].decode("ascii")
        name = self.readline()[:-1].decode("ascii")
        args = self.pop_mark()
        self.append(self.call(self.find_class(module, name), tuple(args)))

    def _obj(self) -> None:
        function, *args = self.pop_mark()
        self.append(self.call(function, tuple(args)))

    def _build(self) -> None:
        stack = self.stack
        state = stack.pop()
        if isinstance(stack[-1], StandIn):
            stack[-1].state = state

    def _setitem(self) -> None:
        stack = self.stack
        value, key = stack.pop(), stack.pop()
        self._set(stack[-1], [key, value])

    def _setitems(self) -> None:
        pairs = self.pop_mark()
        self._set(self.stack[-1], pairs)

    def _dict(self) -> None:
        made: dict[Any, Any] = {}
        self._set(made, self.pop_mark())
        self.append(made)

    def _set(self, target: Any, pairs: list[Any]) -> None:
        table = target.items if isinstance(target, StandIn) else target
        if isinstance(table, dict):
            for key, value in zip(pairs[::2], pairs[1::2], strict=True):
                table[_key(key)] = value

    def _append(self) -> None:
        value = self.stack.pop()
        self._extend(self.stack[-1], [value])

    def _appends(self) -> None:
        values = self.pop_mark()
        self._extend(self.stack[-1], values)

    def _extend(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, list):
            target.extend(values)

    def _additems(self) -> None:
        values = self.pop_mark()
        target = self.stack[-1]
        if isinstance(target, set):
            target.update(_key(v) for v in values)

    def _frozenset(self) -> None:
        self.append(frozenset(_key(v) for v in self.pop_mark()))

    def _refuse(self) -> None:
        raise SourceError(f"{self.label} is refused: its pickle uses an extension that no torch file needs.")


for _opcode, _method in {
    pickle.REDUCE: _Machine._reduce,
    pickle.NEWOBJ: _Machine._reduce,
    pickle.NEWOBJ_EX: _Machine._newobj_ex,
    pickle.INST: _Machine._inst,
    pickle.OBJ: _Machine._obj,
    pickle.BUILD: _Machine._build,
    pickle.SETITEM: _Machine._setitem,
    pickle.SETITEMS: _Machine._setitems,
    pickle.DICT: _Machine._dict,
    pickle.APPEND: _Machine._append,
    pickle.APPENDS: _Machine._appends,
    pickle.ADDITEMS: _Machine._additems,
    pickle.FROZENSET: _Machine._frozenset,
    pickle.BYTEARRAY8: _Machine._refuse,  # it allocates what the file claims, before it reads
    pickle.EXT1: _Machine._refuse,
    pickle.EXT2: _Machine._refuse,
    pickle.EXT4: _Machine._refuse,
    pickle.NEXT_BUFFER: _Machine._refuse,
    pickle.READONLY_BUFFER: _Machine._refuse,
}.items():
    _Machine.dispatch[_opcode[0]] = _method


def _key(key: Any) -> Any:
    """A key that is safe to hash: Python hashes deeply nested tuples with no guard on its stack."""
    if isinstance(key, str | int | float | bytes | Name | StandIn | None):
        return key
    if isinstance(key, tuple) and all(isinstance(k, str | int | float | bytes | Name | StandIn | None) for k in key):
        return key
    return f"<{type(key).__name__} at {id(key)}>"


def _ordered_dict(machine: _Machine, args: tuple[Any, ...]) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    if args and isinstance(args[0], list):
        for pair in args[0]:
            if isinstance(pair, list | tuple) and len(pair) == 2:
                made[_key(pair[0])] = pair[1]
    return made


def _set_of(machine: _Machine, args: tuple[Any, ...]) -> set[Any]:
    return {_key(v) for v in args[0]} if args and isinstance(args[0], list | tuple) else set()


def _tensor(machine: _Machine, args: tuple[Any, ...]) -> TensorRef:
    storage, offset, shape, stride = args[:4]
    return _ref(machine, storage, offset, shape, stride, None)


def _tensor_v3(machine: _Machine, args: tuple[Any, ...]) -> TensorRef:
    storage, offset, shape, stride = args[:4]
    dtype = args[6]
    return _ref(machine, storage, offset, shape, stride, dtype.name if isinstance(dtype, Name) else str(dtype))


def _ref(machine: _Machine, storage: Any, offset: Any, shape: Any, stride: Any, dtype: str | None) -> TensorRef:
    shape, stride = (tuple(s.args[0]) if isinstance(s, StandIn) and s.args else s for s in (shape, stride))
    sizes = (offset, *shape, *stride)
    if not isinstance(storage, StorageRef) or not all(type(n) is int for n in sizes):
        raise SourceError(f"{machine.label} is damaged: a tensor in it has no storage or no shape.")
    name = dtype or storage.dtype
    if name not in TORCH_DTYPES:
        raise SourceError(f"{machine.label}: a tensor of dtype {name} is not readable.")
    return TensorRef(Strided(storage.key, TORCH_DTYPES[name], offset, tuple(shape), tuple(stride)))


def _parameter(machine: _Machine, args: tuple[Any, ...]) -> Any:
    inner = args[0]
    return TensorRef(inner.view, parameter=True) if isinstance(inner, TensorRef) else inner


def _subclass(machine: _Machine, args: tuple[Any, ...]) -> Any:
    # _rebuild_from_type_v2(function, class, arguments, state)
    return machine.call(args[0], args[2])


def _unreadable(machine: _Machine, args: tuple[Any, ...]) -> Any:
    raise SourceError(
        f"{machine.label}: it holds a sparse, quantized, nested or otherwise special tensor, which is not readable. "
        "Save a float model."
    )


_Call = Callable[[_Machine, tuple[Any, ...]], Any]
_CALLS: Final = cast(
    dict[tuple[str, str], _Call],
    {
        ("collections", "OrderedDict"): _ordered_dict,
        ("builtins", "dict"): _ordered_dict,
        ("builtins", "set"): _set_of,
        ("__builtin__", "set"): _set_of,
        ("torch._utils", "_rebuild_tensor"): _tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
        ("torch._tensor", "_rebuild_from_type_v2"): _subclass,
        ("torch._utils", "_rebuild_sparse_tensor"): _unreadable,
        ("torch._utils", "_rebuild_qtensor"): _unreadable,
        ("torch._utils", "_rebuild_nested_tensor"): _unreadable,
        ("torch._utils", "_rebuild_meta_tensor_no_storage"): _unreadable,
        ("torch._utils", "_rebuild_wrapper_subclass"): _unreadable,
        ("torch._utils", "_rebuild_device_tensor_from_numpy"): _unreadable,
    },
)
