"""A table (of TOML) read into a frozen pydantic dataclass: wrong keys and values are errors with a remedy."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TypeVar

from pydantic import ValidationError

from qcompress.errors import ConfigError, did_you_mean

T = TypeVar("T")


def read_table(cls: type[T], table: Mapping[str, object], where: str, *, also: Iterable[str] = ()) -> T:
    """An instance of a pydantic dataclass (`extra="forbid"`) from a table.

    Args:
        cls: the dataclass.
        table: keys and values, as TOML gives them.
        where: what a user calls the table, `[gate] of qcompress.toml`.
        also: keys that the caller has taken out of the table, for the hint.

    Raises:
        ConfigError: the first thing that is wrong, with the nearest legal key where the key is.
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
        key = ".".join(str(part) for part in first["loc"])
        ours = first.get("ctx", {}).get("error")
        if isinstance(ours, Exception):
            raise ConfigError(f"{where}: {key}: {ours}") from None
        raise ConfigError(f"{where}: {key}: {first['msg']}, got {first['input']!r}.") from None
