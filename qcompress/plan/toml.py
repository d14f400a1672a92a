"""The plan's TOML text: which line set a field, and how a table is written."""

import json
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

# A table, ("kind", "first"), or a field of one, ("kind", "first", "bits").
Path = tuple[str, ...]


def lines_of(text: str) -> dict[Path, int]:
    """The line, from 1, of every table header and of every key that stands on a line of its own.

    >>> lines_of('[default]\\nbits = 2\\n[name."a.*"]\\nskip = true')
    {('default',): 1, ('default', 'bits'): 2, ('name', 'a.*'): 3, ('name', 'a.*', 'skip'): 4}
    """
    found: dict[Path, int] = {}
    table: Path = ()
    for number, line in enumerate(text.splitlines(), 1):
        try:
            paths = list(_leaves(tomllib.loads(line)))
        except tomllib.TOMLDecodeError:
            continue  # a piece of a value over several lines; no field of a plan needs one
        if line.lstrip().startswith("["):
            table = paths[0]
            found.setdefault(table, number)
        else:
            for path in paths:
                found.setdefault(table + path, number)
    return found


def header(table: Path) -> str:
    """A table's header as it stands in a plan.

    >>> header(("name", "layer1.*")), header(("kind", "first")), header(("default",))
    ('[name."layer1.*"]', '[kind.first]', '[default]')
    """
    if len(table) == 1:
        return f"[{table[0]}]"
    kind, key = table
    return f"[{kind}.{_quoted(key) if kind == 'name' else key}]"


def written(table: Path, fields: Mapping[str, Any]) -> str:
    """A table as text.

    >>> print(written(("default",), {"bits": 2, "rows_per_lut": "auto", "skip": False}), end="")
    [default]
    bits = 2
    rows_per_lut = "auto"
    skip = false
    """
    return "\n".join([header(table), *(f"{key} = {_value(value)}" for key, value in fields.items()), ""])


def _value(value: bool | int | str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return _quoted(value) if isinstance(value, str) else str(value)


def _quoted(text: str) -> str:
    # A JSON string is a TOML basic string but for one character.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _leaves(parsed: Mapping[str, Any], prefix: Path = ()) -> Iterator[Path]:
    for key, value in parsed.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key)
