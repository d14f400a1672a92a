"""What stands in a pickle's place: names never looked up, calls never made, storages and tensors not read yet."""

from dataclasses import dataclass, field
from typing import Any, Final

from qcompress.sources.strided import Strided

# How a legacy storage class names its dtype.
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


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that the pickle names, never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class StandIn:
    """What a call in the pickle would have made: the name that was called, and the state that was handed to it."""

    made_by: Name
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """The attributes that the object would have had."""
        state = self.state
        if isinstance(state, tuple) and len(state) == 2:  # (dict, slots)
            state = {**(state[0] or {}), **(state[1] or {})} if all(isinstance(s, dict | None) for s in state) else {}
        return state if isinstance(state, dict) else {}


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage of the file: its key, dtype and size in elements."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor of the file, its bytes not read yet.

    Args:
        view: dtype, shape and strides over a storage.
        parameter: whether it was an nn.Parameter.
    """

    view: Strided
    parameter: bool = False
