"""The settings that one table of a plan holds, checked against the rows of `fields`."""

from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError
from typing import TYPE_CHECKING, Any, ClassVar, Self

from qcompress.errors import ConfigError, did_you_mean
from qcompress.plan.fields import FIELDS, Fields


class Settings:
    """The settings of one table: an attribute per field of the plan, None where it is unset.

    Args:
        values: by field; docs/plan.md lists the fields, their values and their meaning.

    Raises:
        ConfigError: a field is unknown, or its value is not legal.

    >>> Settings(bits=2), Settings(bits=2).scheme
    (Settings(bits=2), None)
    """

    fields: ClassVar[Fields] = FIELDS

    def __init__(self, **values: Any) -> None:
        self._set(values, lambda name: f"{type(self).__name__}.{name}")

    @classmethod
    def read(cls, values: Mapping[str, Any], named: Callable[[str], str]) -> Self:
        """Return the settings of a file's table or of a command line.

        Args:
            values: by field.
            named: returns the name of a field for error messages: where it was written.

        >>> Settings.read({"bits": 9}, lambda field: f"--{field}")
        Traceback (most recent call last):
          ...
        qcompress.errors.ConfigError: --bits must be an integer in [1, 8], got 9.
        """
        made = cls.__new__(cls)
        made._set(values, named)
        return made

    @classmethod
    def defaults(cls) -> Self:
        """Return the settings of a weight for which a plan sets nothing.

        >>> Settings.defaults()
        Settings(scheme='palette', rows_per_lut='auto', skip=False)
        """
        return cls(**{field.name: field.default for field in cls.fields})

    def given(self) -> dict[str, Any]:
        """Return the fields that are set, in the order of the table.

        >>> Settings(skip=False, bits=2).given()
        {'bits': 2, 'skip': False}
        """
        return {f.name: value for f in self.fields if (value := getattr(self, f.name)) is not None}

    def _set(self, values: Mapping[str, Any], named: Callable[[str], str]) -> None:
        legal = {field.name: field for field in self.fields}
        for name, value in values.items():
            if name not in legal:
                raise ConfigError(f"{named(name)}: unknown key; known: {', '.join(legal)}.{did_you_mean(name, legal)}")
            if value is not None and value not in legal[name].values:
                raise ConfigError(f"{named(name)} {legal[name].wrong(value)}")
        self.__dict__.update(dict.fromkeys(legal), **values)

    def __setattr__(self, name: str, value: Any) -> None:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.given() == other.given()

    def __hash__(self) -> int:
        return hash(tuple(self.given().items()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.given().items())})"

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...
