"""What one table of a plan can say, and the words in which a wrong value is refused."""

import functools
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import ConfigDict, Field, StrictBool, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from qcompress.errors import ConfigError, did_you_mean

# The fields of a table, and what each must be.
FIELDS: Final = {
    "bits": "an integer in [1, 8]",
    "activation_bits": "an integer in [1, 8]",
    "scheme": "'palette', 'uniform' or 'auto'",
    "rows_per_lut": "'auto' or an integer of at least 1",
    "vector_dim": "1, 2, 4 or 8",
    "lut_dtype": "'float32', 'float16' or 'int8'",
    "block_size": "an integer of at least 2",
    "skip": "true or false",
}

Width = Annotated[int, Field(strict=True, ge=1, le=8)]
Scheme = Literal["palette", "uniform", "auto"]
LutDtype = Literal["float32", "float16", "int8"]

_C = TypeVar("_C")


def _refused_in_our_words(cls: type[_C]) -> type[_C]:
    """From Python, too, a wrong value is a ConfigError that names the field."""
    original = cls.__init__

    @functools.wraps(original)
    def init(self: _C, *args: Any, **kwargs: Any) -> None:
        try:
            original(self, *args, **kwargs)
        except ValidationError as e:
            raise refusal(e, lambda field: f"{cls.__name__}.{field}") from None

    setattr(cls, "__init__", init)  # noqa: B010  (mypy refuses the plain assignment)
    return cls


def refusal(error: ValidationError, say: Callable[[str], str]) -> ConfigError:
    """The first thing that is wrong with a table, in our words.

    Args:
        error: what pydantic found.
        say: from a field to what a user calls it where it was written.
    """
    first = error.errors()[0]
    field = str(first["loc"][0])
    if field not in FIELDS:
        return ConfigError(f"{say(field)}: unknown key; known: {', '.join(FIELDS)}.{did_you_mean(field, FIELDS)}")
    return ConfigError(f"{say(field)} must be {FIELDS[field]}, got {first['input']!r}.")


@_refused_in_our_words
@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Settings:
    """What one table says; None: nothing about this field.

    Args:
        bits: bits per code of a weight, 1 to 8.
        activation_bits: bits per code of what the layer computes with its weight, 1 to 8; set nowhere: floats.
        scheme: `palette`, `uniform` for codes on an even grid, `auto` for the one with fewer bytes at the same error.
        rows_per_lut: output channels that share a palette, or `auto`.
        vector_dim: consecutive weights that share a code of a palette; set nowhere: 1.
        lut_dtype: type of a palette's entries; set nowhere: float32, and int8 where layers compute in int8.
        block_size: consecutive inputs that share a scale of an even grid; set nowhere: all of an output channel.
        skip: whether a tensor is left in float.

    Raises:
        ConfigError: an unknown field, or a value that it cannot have.
    """

    bits: Width | None = None
    activation_bits: Width | None = None
    scheme: Scheme | None = None
    rows_per_lut: Literal["auto"] | Annotated[int, Field(strict=True, ge=1)] | None = None
    vector_dim: Literal[1, 2, 4, 8] | None = None
    lut_dtype: LutDtype | None = None
    block_size: Annotated[int, Field(strict=True, ge=2)] | None = None
    skip: StrictBool | None = None

    def given(self) -> dict[str, Any]:
        """The fields that are set.

        >>> Settings(bits=2, skip=False).given()
        {'bits': 2, 'skip': False}
        """
        return {field: value for field in FIELDS if (value := getattr(self, field)) is not None}


_READ: Final = TypeAdapter(Settings)


def settings_from(fields: dict[str, Any], say: Callable[[str], str]) -> Settings:
    """Settings from a file or from flags, refused by the name that a user gave each field.

    >>> settings_from({"bits": 9}, lambda field: f"--{field}")
    Traceback (most recent call last):
      ...
    qcompress.errors.ConfigError: --bits must be an integer in [1, 8], got 9.
    """
    try:
        return _READ.validate_python(fields)
    except ValidationError as e:
        raise refusal(e, say) from None
