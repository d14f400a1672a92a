"""The plan: settings for all weights, for kinds of layers and for names; from TOML, Python or options.

Tables merge field by field: default < kind < name, and a later matching table over an earlier one.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self, TypeVar, final

from qcompress.errors import ConfigError, did_you_mean
from qcompress.files import read_plain
from qcompress.kinds import KINDS, UNKNOWN, WEIGHT_KINDS
from qcompress.plan import toml
from qcompress.plan.settings import Settings
from qcompress.plan.training import Training

S = TypeVar("S", bound=Settings)

VERSION: Final = 1
FIRST: Final = "first"
LAST: Final = "last"
# What a `[kind.…]` table can be for.
TABLE_KINDS: Final = (*KINDS, FIRST, LAST)

# Each key of a plan beside its version, with an example of its tables.
_TABLES: Final = {
    "default": "[default]",
    "kind": "[kind.first]",
    "name": '[name."layer1.*"]',
    "training": "[training]",
}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Settings for all weights, for kinds of layers and for names.

    Args:
        default: for every weight; `bits` has no default of its own.
        kind: by kind of layer, `first` or `last`; a later one wins.
        name: by pattern (`*`, `?`, `[…]`; case-sensitive) for qualified names; a later one wins.
        training: how `finetune` trains; nothing else reads it.
        origins: where each field was set, for messages; plans are equal whatever their origins.

    Raises:
        ConfigError: a kind is unknown, or its weights are never compressed but have settings.

    >>> print(Plan(default=Settings(bits=2), name={"fc.*": Settings(bits=8)}).to_toml(), end="")
    version = 1
    <BLANKLINE>
    [default]
    bits = 2
    <BLANKLINE>
    [name."fc.*"]
    bits = 8
    """

    default: Settings = field(default_factory=Settings)
    kind: Mapping[str, Settings] = field(default_factory=dict)
    name: Mapping[str, Settings] = field(default_factory=dict)
    training: Training = field(default_factory=Training)
    origins: Mapping[toml.Path, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for kind, settings in self.kind.items():
            where = self.where(("kind", kind))
            if kind not in TABLE_KINDS:
                raise ConfigError(
                    f"{where}: unknown kind; known: {', '.join(TABLE_KINDS)}.{did_you_mean(kind, TABLE_KINDS)}"
                )
            if kind not in (*WEIGHT_KINDS, FIRST, LAST) and not leaves_as_is(settings):
                raise ConfigError(
                    f"{where}: {not_compressed(kind)}; remove the table, or set nothing in it but skip = true."
                )

    @classmethod
    def from_flags(cls, **flags: Any) -> Self:
        """Return the plan that options alone make.

        Args:
            flags: values by field; docs/plan.md lists the fields. None is the same as unset.

        Raises:
            ConfigError: a field is unknown, or its value is not legal.

        >>> Plan.from_flags(bits=2).default
        Settings(bits=2)
        """
        return cls().with_flags(**flags)

    def with_flags(self, **flags: Any) -> Self:
        """Return this plan with options in place of what `[default]` sets; see `from_flags`.

        `bits` also overrides a `skip` of `[default]`.
        """
        given = {name: value for name, value in flags.items() if value is not None}
        values, origins = {**self.default.given(), **given}, {**self.origins}
        if "bits" in given:
            values.pop("skip", None)
            origins.pop(("default", "skip"), None)
        default = self.default.read(values, _option)
        origins.update({("default", name): _option(name) for name in given})
        return dataclasses.replace(self, default=default, origins=origins)

    def with_training(self, **flags: Any) -> Self:
        """Return this plan with options in place of what `[training]` sets; None is the same as unset.

        >>> Plan().with_training(method="dkm").training
        Training(method='dkm')
        """
        given = {name: value for name, value in flags.items() if value is not None}
        training = Training.read({**self.training.given(), **given}, _option)
        origins = dict(self.origins)
        origins.update({("training", name): _option(name) for name in given})
        return dataclasses.replace(self, training=training, origins=origins)

    def to_toml(self) -> str:
        """Return the plan as TOML; `parse_plan` makes an equal plan of it."""
        parts = [f"version = {VERSION}\n"]
        parts += [
            toml.written(table, settings.given())
            for table, settings in self.tables()
            if table != ("default",) or settings.given()
        ]
        if self.training.given():
            parts.append(toml.written(("training",), self.training.given()))
        return "\n".join(parts)

    def tables(self) -> Iterator[tuple[toml.Path, Settings]]:
        """Yield every table with its settings, the weakest first."""
        yield ("default",), self.default
        yield from ((("kind", kind), settings) for kind, settings in self.kind.items())
        yield from ((("name", pattern), settings) for pattern, settings in self.name.items())

    def where(self, path: toml.Path) -> str:
        """Return what messages call a table or a field: `plan.toml:12 [kind.first]`, or `--bits`."""
        return self.origins.get(path) or toml.header(path[:1] if path[0] in ("default", "training") else path[:2])


def load_plan(path: Path, settings: type[Settings] = Settings) -> Plan:
    """Read a plan from a TOML file.

    Args:
        path: the file.
        settings: the class of the tables' settings, which knows the fields of the plan.

    Raises:
        ConfigError: the file cannot be read, or is not a valid plan; the message names the line.
    """
    try:
        text = read_plain(path).decode("utf-8")
    except OSError as e:
        raise ConfigError(f"{path}: the plan cannot be read: {e.strerror}.") from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: the plan must be UTF-8 text, got byte {e.object[e.start]:#04x}.") from None
    return parse_plan(text, str(path), settings)


def parse_plan(text: str, label: str = "plan", settings: type[Settings] = Settings) -> Plan:
    """Read a plan from TOML text.

    Args:
        text: the TOML.
        label: what messages call it.
        settings: as for `load_plan`.

    Raises:
        ConfigError: the text is not a valid plan; the message names the line.

    >>> parse_plan("version = 1\\n[kind.first]\\nbits = 8").kind["first"].bits
    8
    """
    parsed = toml.parsed(text, label)
    lines = toml.lines_of(text)

    def at(path: toml.Path) -> str:
        return f"{label}:{lines[path]}" if path in lines else label

    version = parsed.pop("version", None)
    if version is None:
        raise ConfigError(f"{label}: version is missing; begin the plan with `version = {VERSION}`.")
    if type(version) is not int or version != VERSION:
        raise ConfigError(f"{at(('version',))}: version must be {VERSION}, got {version!r}.")
    for key in parsed:
        if key not in _TABLES:
            known = ("version", *_TABLES)
            raise ConfigError(
                f"{at((key,))}: unknown key {key!r}; known: {', '.join(known)}.{did_you_mean(key, known)}"
            )

    origins: dict[toml.Path, str] = {}

    def read(table: toml.Path, fields: Any, settings: type[S]) -> S:
        if not isinstance(fields, dict):
            raise ConfigError(f"{at(table)}: {toml.header(table)} must be a table of settings, got {fields!r}.")
        origins[table] = f"{at(table)} {toml.header(table)}"
        for name in fields:
            origins[*table, name] = f"{at((*table, name))} {toml.header(table)}"
        return settings.read(fields, lambda name: f"{origins[*table, name]} {name}")

    def family(key: str) -> dict[str, Settings]:
        tables = parsed.get(key, {})
        if not isinstance(tables, dict):
            raise ConfigError(f"{at((key,))}: {key} must hold tables like {_TABLES[key]}, got {tables!r}.")
        return {name: read((key, name), fields, settings) for name, fields in tables.items()}

    return Plan(
        default=read(("default",), parsed.get("default", {}), settings),
        kind=family("kind"),
        name=family("name"),
        training=read(("training",), parsed.get("training", {}), Training),
        origins=origins,
    )


def leaves_as_is(settings: Settings) -> bool:
    """Return whether a table sets nothing that concerns tensors which are never compressed.

    >>> leaves_as_is(Settings(skip=True)), leaves_as_is(Settings(skip="float16"))
    (True, False)
    """
    return settings.given() in ({}, {"skip": True}, {"skip": False})


def not_compressed(kind: str) -> str:
    """Return why weights of a kind stay in float."""
    if kind == UNKNOWN:
        return "a bare state dict does not tell whether this is a weight; add --arch"
    return "not a weight"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
