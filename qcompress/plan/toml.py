"""The TOML text of a plan: the line of every field, and how tables are written."""

import json
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from qcompress.errors import ConfigError

# A table, ("kind", "first"), or a field of one, ("kind", "first", "bits").
Path = tuple[str, ...]


def parsed(text: str, label: str) -> dict[str, Any]:
    """Return the tables of a TOML text.

    Args:
        text: the TOML.
        label: what messages call it.

    Raises:
        ConfigError: it is not valid TOML.
    """
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise ConfigError(f"{label} is not valid TOML: {e}.") from None
    except ValueError:
        raise ConfigError(f"{label} is not valid TOML: an integer has too many digits.") from None


def lines_of(text: str) -> dict[Path, int]:
    """Return the line, from 1, of every table header and of every key that has a line to itself.

    >>> lines_of('[default]\\nbits = 2\\n[name."a.*"]\\nskip = true')
    {('default',): 1, ('default', 'bits'): 2, ('name', 'a.*'): 3, ('name', 'a.*', 'skip'): 4}
    """
    found: dict[Path, int] = {}
    table: Path = ()
    for number, line in enumerate(text.splitlines(), 1):
        try:
            paths = list(_leaves(tomllib.loads(line)))
        except tomllib.TOMLDecodeError:
            continue  # part of a value over several lines, which no field of a plan needs
        if line.lstrip().startswith("["):
            table = paths[0]
            found.setdefault(table, number)
        else:
            for path in paths:
                found.setdefault(table + path, number)
    return found


def header(table: Path) -> str:
    """Return the header of a table.

    >>> header(("name", "layer1.*")), header(("kind", "first")), header(("default",))
    ('[name."layer1.*"]', '[kind.first]', '[default]')
    """
    if len(table) == 1:
        return f"[{table[0]}]"
    kind, key = table
    return f"[{kind}.{_quoted(key) if kind == 'name' else key}]"


def written(table: Path, fields: Mapping[str, Any]) -> str:
    """Return a table as text.

    >>> print(written(("default",), {"bits": 2, "rows_per_lut": "auto", "skip": False}), end="")
    [default]
    bits = 2
    rows_per_lut = "auto"
    skip = false
    """
    return "\n".join([header(table), *(f"{key} = {value_text(value)}" for key, value in fields.items()), ""])


def value_text(value: bool | int | str) -> str:
    """Return a value as TOML writes it.

    >>> value_text("auto"), value_text(True), value_text(2)
    ('"auto"', 'true', '2')
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    return _quoted(value) if isinstance(value, str) else str(value)


def _quoted(text: str) -> str:
    # A JSON string is a TOML basic string, except for one character.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _leaves(parsed: Mapping[str, Any], prefix: Path = ()) -> Iterator[Path]:
    for key, value in parsed.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key)
