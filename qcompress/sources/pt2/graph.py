"""The JSON of an exported program, checked key by key before torch sees it.

Three tables are allow-lists: `schema.RECORDS` of keys, `forms.FORMS` of strings and numbers, and within it the one of
operators. Anything unknown is refused, and anything unneeded is left out.
"""

from typing import Any, Final, final

from qcompress.errors import SourceError, UnsafeFileError
from qcompress.sources.pt2.forms import DESCRIPTIONS, FORMS, UnsafeTextError
from qcompress.sources.pt2.schema import NEWEST_TORCH, RECORDS, UNIONS

MAX_DEPTH: Final = 100


def checked_program(program: Any, label: str) -> dict[str, Any]:
    """Return a copy of `models/model.json` that holds known keys only, and strings only in the form that torch writes.

    Guards, annotations and unknown metadata are left out: torch would execute the guards, and they are not needed to
    run the program on inputs of the shapes that it was exported for.

    Args:
        program: the parsed JSON.
        label: the file's name in messages.

    Raises:
        UnsafeFileError: it has a key that torch is not known to write, or a string that could run code.
        SourceError: it is not an exported program.
    """
    return checked_record(program, "ExportedProgram", label)


def checked_record(value: Any, record: str, label: str, part: str = "its graph") -> dict[str, Any]:
    """Return a copy of a JSON object that is a record of the schema, checked at every level.

    Args:
        value: the parsed JSON.
        record: a key of `schema.RECORDS`.
        label: the file's name in messages.
        part: what messages call the JSON.

    Raises:
        UnsafeFileError: it has a key that torch is not known to write, or a string that could run code.
        SourceError: it is not such a record.
    """
    version = value.get("torch_version") if isinstance(value, dict) else None
    return _Checker(label, part, str(version)[:40] if version else "").record(value, record, 0)


@final
class _Checker:
    """Copies a JSON value along the schema, and refuses unknown keys."""

    def __init__(self, label: str, part: str, torch_version: str) -> None:
        self._label, self._part = label, part
        self._writer = f" The file says that torch {torch_version} wrote it." if torch_version else ""

    def record(self, value: Any, record: str, depth: int) -> dict[str, Any]:
        if depth > MAX_DEPTH:
            raise SourceError(f"{self._label} is refused: {self._part} is nested over {MAX_DEPTH} deep.")
        if not isinstance(value, dict):
            raise self._damaged(record, "an object", value)
        known = RECORDS[record]
        for key in value:
            if key not in known:
                raise UnsafeFileError(
                    f"{self._label} is refused: {self._part} has the key {str(key)[:80]!r} in {record}, which torch up "
                    f"to {NEWEST_TORCH} does not write, so it cannot be checked.{self._writer} Export the model with "
                    f"torch {NEWEST_TORCH} or older."
                )
        if record in UNIONS and len(value) != 1:
            raise self._damaged(record, "one key", value)
        return {key: self.typed(inner, known[key], f"{record}.{key}", depth + 1) for key, inner in value.items()}

    def typed(self, value: Any, kind: str, where: str, depth: int) -> Any:
        """Return a copy of a value, whose type must be that in the schema."""
        if kind.endswith(" | None"):
            return None if value is None else self.typed(value, kind.removesuffix(" | None"), where, depth)
        if kind.startswith("list["):
            if not isinstance(value, list):
                raise self._damaged(where, "a list", value)
            return [self.typed(inner, kind[5:-1], where, depth) for inner in value]
        if kind.startswith("dict["):
            if not isinstance(value, dict):
                raise self._damaged(where, "an object", value)
            of_keys, _, of_values = kind[5:-1].partition(", ")
            return {
                self.typed(key, of_keys, where, depth): self.typed(inner, of_values, where, depth)
                for key, inner in value.items()
            }
        if kind in RECORDS:
            return self.record(value, kind, depth)
        try:
            return FORMS[kind](value)
        except UnsafeTextError as e:
            raise UnsafeFileError(
                f"{self._label} is refused: {self._part} holds {e}, which is not what torch.export.save writes for a "
                "float model and could run code when the program is loaded. None of its code was run."
            ) from None
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
            raise self._damaged(where, DESCRIPTIONS.get(kind, kind), value) from None

    def _damaged(self, where: str, wanted: str, value: Any) -> SourceError:
        shown = repr(value)[:40] if isinstance(value, str | float | bool | None) else type(value).__name__
        return SourceError(
            f"{self._label} is damaged: {self._part} is not what torch writes ({where} must be {wanted}, got {shown})."
        )
