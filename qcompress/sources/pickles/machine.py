"""A machine that reads a pickle without running it: it imports nothing and calls nothing that the pickle names.

Classes and functions become `Name`s, results of their calls become stand-ins, and tensors become `TensorRef`s, which
describe their data by numbers that are checked before any of it is read.

Two tables decide what a pickle may contain: `OPCODES`, the opcodes that torch files consist of, and `calls.CALLS`, the
calls whose result is built. Everything else is refused, or stays a stand-in.
"""

import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, final

from qcompress.errors import SourceError
from qcompress.sources.pickles.calls import CALLS, safe_key
from qcompress.sources.pickles.standins import STORAGES, Name, StandIn, StorageRef, TensorRef, shown
from qcompress.zip_archive import MAX_PARSED

# Each opcode is a step, and so is each element that a call copies. A step takes some 200 bytes of memory at most.
MAX_STEPS: Final = 1 << 24
MAX_PROTOCOL: Final = 5


@dataclass(slots=True)
class Unpickled:
    """The contents of a pickle.

    Args:
        value: its object, made of plain containers, stand-ins and tensor references.
        names: every class and function that it names, in order.
        storages: every storage that it refers to, by key.
        stand_ins: every call that was not made, in order.
        tensors: every tensor that it describes, in order.
    """

    value: Any
    names: list[Name]
    storages: dict[str, StorageRef]
    stand_ins: list[StandIn]
    tensors: list[TensorRef]


class Readable(Protocol):
    """An open file, a buffer or a mapped file."""

    def read(self, n: int, /) -> bytes:
        """Return up to n bytes from where the last read ended."""

    def readline(self) -> bytes:
        """Return the bytes up to and including the end of the line."""


def unpickle(stream: Readable, label: str) -> Unpickled:
    """Read one pickle without running any of it.

    Args:
        stream: is read from the start of the pickle up to its end, not beyond.
        label: the file's name in messages.

    Raises:
        SourceError: the pickle is damaged, or contains something that no torch file needs.

    >>> import io
    >>> result = unpickle(io.BytesIO(b"cos\\nsystem\\n(S'echo'\\ntR."), "model.pt")
    >>> result.names, result.value.args
    ([Name(module='os', name='system')], ('echo',))
    """
    machine = Machine(stream, label)
    try:
        value = machine.run()
    except SourceError:
        raise
    except Exception as e:  # a damaged pickle makes an opcode fail in any way, for example on an empty stack
        reason = " ".join(str(e).split())[:200]
        raise SourceError(f"{label} is damaged: its pickle cannot be read ({type(e).__name__}: {reason}).") from None
    return Unpickled(value, list(machine.names), machine.storages, machine.stand_ins, machine.tensors)


@final
class Machine:
    """The stack, the marks and the memo that opcodes work on; each method is an opcode or serves several of them."""

    def __init__(self, stream: Readable, label: str) -> None:
        self.label = label
        self.names: dict[Name, None] = {}
        self.storages: dict[str, StorageRef] = {}
        self.stand_ins: list[StandIn] = []
        self.tensors: list[TensorRef] = []
        self._stream = stream
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._steps_left = MAX_STEPS
        self._bytes_left = MAX_PARSED

    def run(self) -> Any:
        """Carry out opcodes up to the pickle's end and return its object."""
        while (opcode := self.take(1)) != pickle.STOP:
            self.spend(1)
            if (handler := _HANDLERS.get(opcode)) is None:
                name = _name_of(opcode)
                raise SourceError(f"{self.label} is refused: its pickle uses opcode {name}, which no torch file needs.")
            handler(self)
        return self._stack.pop()

    def spend(self, steps: int) -> None:
        """Count steps, so that a small pickle cannot ask for much time and memory."""
        self._steps_left -= steps
        if self._steps_left < 0:
            raise SourceError(f"{self.label} is refused: its pickle takes over {MAX_STEPS} steps to read.")

    # --- reading the stream

    def take(self, n: int) -> bytes:
        """Return the next n bytes of the pickle."""
        self._bytes_left -= n
        if self._bytes_left < 0:
            raise SourceError(f"{self.label} is refused: its pickle claims to have over {MAX_PARSED} bytes.")
        data = self._stream.read(n)
        if len(data) < n:
            raise EOFError("it ends too early")
        return data

    def line(self) -> bytes:
        """Return the bytes up to the end of the line, without the line break."""
        found = self._stream.readline()
        if not found.endswith(b"\n"):
            raise EOFError("it ends too early")
        return found[:-1]

    def number(self, layout: str) -> Any:
        """Return a number in a layout of `struct`."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    # --- numbers and text

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def decimal(self) -> None:
        text = self.line().removesuffix(b"L")
        self.push({b"00": False, b"01": True}[text] if text in (b"00", b"01") else int(text))

    def integer(self, width: str) -> None:
        count = self.number(width)
        if count < 0:
            raise ValueError(f"an integer of {count} bytes")
        self.push(int.from_bytes(self.take(count), "little", signed=True))

    def raw(self, width: str) -> None:
        self.push(self.take(self.number(width)))

    def text(self, width: str) -> None:
        self.push(self.take(self.number(width)).decode("utf-8", "surrogatepass"))

    def old_text(self, width: str) -> None:
        count = self.number(width)
        if count < 0:
            raise ValueError(f"a string of {count} bytes")
        self.push(self.take(count).decode("utf-8", "backslashreplace"))

    def quoted(self) -> None:
        line = self.line()
        if len(line) < 2 or line[0] != line[-1] or line[:1] not in (b"'", b'"'):
            raise ValueError("a string without quotes")
        self.push(line[1:-1].decode("unicode_escape"))

    # --- the stack, the marks and the memo

    def mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def above_mark(self) -> list[Any]:
        """Take the values above the last mark off the stack."""
        found, self._stack = self._stack, self._marked.pop()
        return found

    def pop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self.above_mark()

    def duplicate(self) -> None:
        self.push(self._stack[-1])

    def keep(self, index: int) -> None:
        if index < 0:
            raise ValueError(f"place {index} of the memo")
        self._memo[index] = self._stack[-1]

    def memoize(self) -> None:
        self.keep(len(self._memo))

    def recall(self, index: int) -> None:
        self.push(self._memo[index])

    # --- containers

    def make_tuple(self, count: int) -> None:
        self._stack[-count:] = [tuple(self._stack[i] for i in range(-count, 0))]

    def make_dict(self) -> None:
        pairs = self.above_mark()
        self.push({})
        self.set_pairs(pairs)

    def set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self.set_pairs([key, value])

    def append(self) -> None:
        self.extend([self._stack.pop()])

    def add_items(self) -> None:
        values, target = self.above_mark(), self._stack[-1]
        if isinstance(target, set):
            target.update(map(safe_key, values))

    def set_pairs(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        table = target.items if isinstance(target, StandIn) else target
        if isinstance(table, dict):
            for key, value in zip(pairs[::2], pairs[1::2], strict=True):
                table[safe_key(key)] = value

    def extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(values)

    # --- names and calls

    def named(self, module: str, name: str) -> Name:
        """Return a stand-in for a class or function; nothing is imported."""
        # the name in Python 2, which protocols below 3 write
        found = Name("builtins" if module == "__builtin__" else module, name)
        self.names.setdefault(found)
        return found

    def global_(self) -> None:
        self.push(self.named(self.line().decode(), self.line().decode()))

    def stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("a name that is not text")
        self.push(self.named(module, name))

    def call(self, function: Any, args: Any) -> Any:
        """Return the result of a call: a container, a tensor reference, or a stand-in if the call is not in CALLS."""
        if not isinstance(function, Name) or not isinstance(args, tuple):
            raise SourceError(f"{self.label} is damaged: its pickle calls {shown(function)}.")
        self.spend(len(args))
        if (known := CALLS.get(str(function))) is None:
            made: Any = StandIn(function, args)
            self.stand_ins.append(made)
        elif isinstance(made := known(self, args), TensorRef):
            self.tensors.append(made)
        return made

    def reduce(self) -> None:
        args = self._stack.pop()
        self._stack[-1] = self.call(self._stack[-1], args)

    def new_with_keywords(self) -> None:
        kwargs, args = self._stack.pop(), self._stack.pop()
        if not isinstance(args, tuple):
            raise ValueError("arguments that are not a tuple")
        self._stack[-1] = self.call(self._stack[-1], (*args, kwargs))

    def make_instance(self) -> None:
        function = self.named(self.line().decode(), self.line().decode())
        self.push(self.call(function, tuple(self.above_mark())))

    def make_object(self) -> None:
        function, *args = self.above_mark()
        self.push(self.call(function, tuple(args)))

    def build(self) -> None:
        state = self._stack.pop()
        if isinstance(self._stack[-1], StandIn):
            self._stack[-1].state = state

    def storage(self) -> None:
        """Push a storage that is stored outside the pickle, or the class whose source text an old file carries."""
        pid = self._stack.pop()
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module" and isinstance(pid[1], Name):
            self.push(pid[1])
            return
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            raise SourceError(f"{self.label} is damaged: it refers to stored data that is not a tensor.")
        kind, key, count = pid[1], pid[2], pid[4]
        if len(pid) > 5 and pid[5] is not None:
            raise SourceError(f"{self.label}: views of storages as torch 0.3 wrote them are not read. Save it again.")
        dtype = STORAGES.get(kind.name) if isinstance(kind, Name) else None
        if dtype is None or type(key) is not str or type(count) is not int:
            raise SourceError(f"{self.label}: a storage in it is of a kind that cannot be read.")
        self.push(self.storages.setdefault(key, StorageRef(key, dtype, count)))

    def protocol(self) -> None:
        version = self.number("<B")
        if version > MAX_PROTOCOL:
            raise ValueError(f"protocol {version}")


# The opcodes that are allowed, by their names in Python's pickle module. STOP ends the pickle.
OPCODES: Final[Mapping[str, Callable[[Machine], object]]] = {
    "PROTO": Machine.protocol,
    "FRAME": lambda m: m.take(8),  # a length that only helps to read ahead
    # constants and numbers
    "NONE": lambda m: m.push(None),
    "NEWTRUE": lambda m: m.push(True),
    "NEWFALSE": lambda m: m.push(False),
    "INT": Machine.decimal,
    "BININT": lambda m: m.push(m.number("<i")),
    "BININT1": lambda m: m.push(m.number("<B")),
    "BININT2": lambda m: m.push(m.number("<H")),
    "LONG": Machine.decimal,
    "LONG1": lambda m: m.integer("<B"),
    "LONG4": lambda m: m.integer("<i"),
    "FLOAT": lambda m: m.push(float(m.line())),
    "BINFLOAT": lambda m: m.push(m.number(">d")),
    # text and bytes
    "STRING": Machine.quoted,
    "BINSTRING": lambda m: m.old_text("<i"),
    "SHORT_BINSTRING": lambda m: m.old_text("<B"),
    "UNICODE": lambda m: m.push(m.line().decode("raw-unicode-escape")),
    "BINUNICODE": lambda m: m.text("<I"),
    "SHORT_BINUNICODE": lambda m: m.text("<B"),
    "BINUNICODE8": lambda m: m.text("<Q"),
    "BINBYTES": lambda m: m.raw("<I"),
    "SHORT_BINBYTES": lambda m: m.raw("<B"),
    "BINBYTES8": lambda m: m.raw("<Q"),
    # the stack and the memo
    "MARK": Machine.mark,
    "POP": Machine.pop,
    "POP_MARK": Machine.above_mark,
    "DUP": Machine.duplicate,
    "PUT": lambda m: m.keep(int(m.line())),
    "BINPUT": lambda m: m.keep(m.number("<B")),
    "LONG_BINPUT": lambda m: m.keep(m.number("<I")),
    "MEMOIZE": Machine.memoize,
    "GET": lambda m: m.recall(int(m.line())),
    "BINGET": lambda m: m.recall(m.number("<B")),
    "LONG_BINGET": lambda m: m.recall(m.number("<I")),
    # containers
    "EMPTY_TUPLE": lambda m: m.push(()),
    "TUPLE1": lambda m: m.make_tuple(1),
    "TUPLE2": lambda m: m.make_tuple(2),
    "TUPLE3": lambda m: m.make_tuple(3),
    "TUPLE": lambda m: m.push(tuple(m.above_mark())),
    "EMPTY_LIST": lambda m: m.push([]),
    "LIST": lambda m: m.push(m.above_mark()),
    "APPEND": Machine.append,
    "APPENDS": lambda m: m.extend(m.above_mark()),
    "EMPTY_DICT": lambda m: m.push({}),
    "DICT": Machine.make_dict,
    "SETITEM": Machine.set_item,
    "SETITEMS": lambda m: m.set_pairs(m.above_mark()),
    "EMPTY_SET": lambda m: m.push(set()),
    "ADDITEMS": Machine.add_items,
    "FROZENSET": lambda m: m.push(frozenset(map(safe_key, m.above_mark()))),
    # names, calls and storages: nothing is imported, called or loaded
    "GLOBAL": Machine.global_,
    "STACK_GLOBAL": Machine.stack_global,
    "REDUCE": Machine.reduce,
    "NEWOBJ": Machine.reduce,
    "NEWOBJ_EX": Machine.new_with_keywords,
    "INST": Machine.make_instance,
    "OBJ": Machine.make_object,
    "BUILD": Machine.build,
    "BINPERSID": Machine.storage,
}
_HANDLERS: Final = {getattr(pickle, name): handler for name, handler in OPCODES.items()}


def _name_of(opcode: bytes) -> str:
    """Return the name of an opcode in Python's pickle module, or its byte."""
    return next((name for name, value in vars(pickle).items() if value == opcode), repr(opcode))
