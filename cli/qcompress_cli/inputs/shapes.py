"""Parses descriptions of inputs on the command line: `[NAME=]1,3,32,32[:int64]` and `NAME:0=batch`."""

import math
import re
from dataclasses import dataclass
from typing import Final

from qcompress.errors import ConfigError

DTYPES: Final = ("float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
MAX_ELEMENTS: Final = 1 << 28  # of an example input, which is made in memory

_SHAPE: Final = re.compile(r"(?:(?P<name>[^=]+)=)?(?P<shape>[0-9]+(?:[,x][0-9]+)*)(?::(?P<dtype>\w+))?", re.ASCII)
_DYNAMIC: Final = re.compile(r"(?P<name>[^:=]+):(?P<axis>[0-9]+)=(?P<label>[A-Za-z_]\w*)", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputShape:
    """One input of a model; the first number is the batch.

    Args:
        shape: its shape.
        name: its name; None where the model has one input only.
        dtype: numpy name of its dtype.
    """

    shape: tuple[int, ...]
    name: str | None = None
    dtype: str = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamic:
    """A named dynamic axis of an input.

    Args:
        name: the input.
        axis: which of its axes.
        label: name of the axis in the graph.
    """

    name: str
    axis: int
    label: str


def parse_input_shape(text: str) -> InputShape:
    """Return the input that a text describes.

    >>> parse_input_shape("1,3,32,32")
    InputShape(shape=(1, 3, 32, 32), name=None, dtype='float32')
    >>> parse_input_shape("ids=1,128:int64")
    InputShape(shape=(1, 128), name='ids', dtype='int64')

    Raises:
        ConfigError: the text has another form, an unknown dtype, an axis of length 0, or too many elements.
    """
    match = _SHAPE.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ConfigError(f"An input shape must read like 1,3,32,32 or ids=1,128:int64, got {text!r}.")
    dtype = match["dtype"] or "float32"
    if dtype not in DTYPES:
        raise ConfigError(f"The dtype of an input shape must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    shape = tuple(int(n) for n in re.split("[,x]", match["shape"]))
    if 0 in shape:
        raise ConfigError(f"Every axis of an input shape must be at least 1, got {text!r}.")
    if math.prod(shape) > MAX_ELEMENTS:
        raise ConfigError(f"An input shape must hold at most {MAX_ELEMENTS:,} elements, got {text!r}.")
    return InputShape(shape=shape, name=match["name"], dtype=dtype)


def parse_dynamic(text: str) -> Dynamic:
    """Return the dynamic axis that a text describes.

    >>> parse_dynamic("ids:1=sequence")
    Dynamic(name='ids', axis=1, label='sequence')

    Raises:
        ConfigError: the text has another form.
    """
    match = _DYNAMIC.fullmatch(text)
    if match is None:
        raise ConfigError(f"A dynamic axis must read like NAME:0=batch, got {text!r}.")
    return Dynamic(name=match["name"], axis=int(match["axis"]), label=match["label"])
