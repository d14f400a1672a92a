"""The stand-ins in an unpickled object: for names, for calls that are not made, and for data that is not read yet."""

from dataclasses import dataclass, field
from typing import Any, Final

from qcompress.sources.strided import Strided

# The dtypes of torch's classes of storages, by the name of the class.
STORAGES: Final = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}


def shown(value: Any) -> str:
    """Return a short description of a pickle's value for messages; printing a hostile one could take forever.

    >>> shown("abc"), shown(10**5000), shown([[1]])
    ("'abc'", 'a very large integer', 'an object of type list')
    """
    if type(value) is int and value.bit_length() > 64:
        return "a very large integer"
    if value is None or type(value) in (bool, int, float, str, bytes):
        return repr(value[:40] if isinstance(value, str | bytes) else value)
    return str(value) if isinstance(value, Name) else f"an object of type {type(value).__name__}"


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that the pickle names; it is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class StandIn:
    """The result that a call in the pickle would have had: the name that is called, its arguments, and the state."""

    made_by: Name
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """Return the attributes that the object would have."""
        state = self.state
        if isinstance(state, tuple) and len(state) == 2:  # (dict, slots)
            state = {**(state[0] or {}), **(state[1] or {})} if all(isinstance(s, dict | None) for s in state) else {}
        return state if isinstance(state, dict) else {}


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage of the file: its key, its dtype, and its size in elements."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor of the file, whose bytes are not read yet.

    Args:
        view: its dtype, shape and strides over a storage.
        parameter: whether it was an nn.Parameter.
    """

    view: Strided
    parameter: bool = False
