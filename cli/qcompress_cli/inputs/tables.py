"""A table (of TOML) read into a frozen pydantic dataclass; wrong keys and values are errors that name the remedy."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TypeVar

from pydantic import ValidationError

from qcompress.errors import ConfigError, did_you_mean

T = TypeVar("T")


def read_table(cls: type[T], table: Mapping[str, object], where: str, *, also: Iterable[str] = ()) -> T:
    """Return an instance of a pydantic dataclass (`extra="forbid"`) made from a table.

    Args:
        cls: the dataclass.
        table: keys and values, as TOML gives them.
        where: what messages call the table: `gate in qcompress.toml`.
        also: legal keys that the caller has taken out of the table, for the hint.

    Raises:
        ConfigError: the first key or value that is wrong; for a key with the nearest legal one.
    """
    known = [field.name for field in fields(cls) if field.init]  # type: ignore[arg-type]
    legal = [*known, *also]
    for key in table:
        if key not in known:
            same = key.replace("-", "_").lower()
            hint = f" Did you mean {same}?" if same in legal else did_you_mean(key, legal)
            hint = hint or f" Known: {', '.join(legal)}."
            raise ConfigError(f"{where}: unknown key {key!r}.{hint}")
    try:
        return cls(**table)
    except ValidationError as e:
        first = e.errors()[0]
        name = first["loc"][0]
        ours = first.get("ctx", {}).get("error")
        if isinstance(ours, Exception):  # raised by a validator of this project
            raise ConfigError(f"{where}: {name}: {ours}") from None
        required = first["msg"].removeprefix("Input should be ")
        raise ConfigError(f"{where}: {name} must be {required}, got {first['input']!r}.") from None
