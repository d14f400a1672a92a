"""The plan: which width and scheme each weight gets. From TOML, from Python or from flags, and resolved for a model.

Tables merge field by field: default < kind < name, and a later matching table over an earlier one.
"""

import dataclasses
import json
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, Literal, Protocol, Self, final

from qcompress.artifacts.digest import short_digest
from qcompress.errors import ConfigError, did_you_mean
from qcompress.plan import toml as _plan_toml
from qcompress.plan.combinations import check_weight
from qcompress.plan.settings import LutDtype, Scheme, Settings, settings_from
from qcompress.plan.toml import header
from qcompress.sources.base import KINDS, UNKNOWN, WEIGHT_KINDS

__all__ = ["Plan", "ResolvedPlan", "Settings", "TensorPlan", "load_plan", "parse_plan", "resolve"]

VERSION: Final = 1
FIRST: Final = "first"
LAST: Final = "last"
# What a `[kind.…]` table can be for.
TABLE_KINDS: Final = (*KINDS, FIRST, LAST)
# Of weights that are matrices of inputs and outputs: these can have a block_size.
BLOCK_KINDS: Final = ("linear", "embedding")
BUILT_IN: Final = Settings(scheme="palette", rows_per_lut="auto", skip=False)

_BUILT_IN_ORIGIN: Final = "built-in default"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Settings for all weights, for kinds of layers and for names.

    Args:
        default: for every weight; `bits` has no default of its own.
        kind: by kind of layer, and `first`, `last`; a later one wins.
        name: by pattern (`*`, `?`, `[…]`; case-sensitive) on qualified names; a later one wins.
        origins: where each field was set, for the resolved plan; no part of what the plan says.

    Raises:
        ConfigError: a kind that there is not, or settings for one whose weights are never compressed.

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
    origins: Mapping[_plan_toml.Path, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for kind, settings in self.kind.items():
            where = self.where(("kind", kind))
            if kind not in TABLE_KINDS:
                raise ConfigError(
                    f"{where}: unknown kind; known: {', '.join(TABLE_KINDS)}.{did_you_mean(kind, TABLE_KINDS)}"
                )
            if kind not in (*WEIGHT_KINDS, FIRST, LAST) and set(settings.given()) - {"skip"}:
                raise ConfigError(
                    f"{where}: {_not_compressed(kind)}; leave the table out, or say skip = true and nothing else."
                )

    @classmethod
    def from_flags(
        cls,
        bits: int | None = None,
        rows_per_lut: int | Literal["auto"] | None = None,
        scheme: str | None = None,
        activation_bits: int | None = None,
        vector_dim: int | None = None,
        block_size: int | None = None,
        lut_dtype: str | None = None,
    ) -> Self:
        """The plan that flags alone make.

        >>> Plan.from_flags(bits=2).default.bits
        2
        """
        return cls().with_flags(bits, rows_per_lut, scheme, activation_bits, vector_dim, block_size, lut_dtype)

    def with_flags(
        self,
        bits: int | None = None,
        rows_per_lut: int | Literal["auto"] | None = None,
        scheme: str | None = None,
        activation_bits: int | None = None,
        vector_dim: int | None = None,
        block_size: int | None = None,
        lut_dtype: str | None = None,
    ) -> Self:
        """This plan with flags in place of what `[default]` says; None: flag not given.

        Raises:
            ConfigError: a value that the field cannot have.
        """
        flags = {
            "bits": bits, "rows_per_lut": rows_per_lut, "scheme": scheme, "activation_bits": activation_bits,
            "vector_dim": vector_dim, "block_size": block_size, "lut_dtype": lut_dtype,
        }  # fmt: skip
        given = {name: value for name, value in flags.items() if value is not None}
        values, origins = {**self.default.given(), **given}, {**self.origins}
        if bits is not None:  # says what to do with every weight, in place of leaving them out
            values.pop("skip", None)
            origins.pop(("default", "skip"), None)
        default = settings_from(values, _flag)
        origins.update({("default", name): _flag(name) for name in given})
        return dataclasses.replace(self, default=default, origins=origins)

    def to_toml(self) -> str:
        """The plan as TOML; `parse_plan` gives an equal plan back."""
        parts = [f"version = {VERSION}\n"]
        parts += [
            _plan_toml.written(table, settings.given())
            for table, settings in self.tables()
            if table != ("default",) or settings.given()
        ]
        return "\n".join(parts)

    def tables(self) -> Iterator[tuple[_plan_toml.Path, Settings]]:
        """Every table with its settings, the weakest first."""
        yield ("default",), self.default
        yield from ((("kind", kind), settings) for kind, settings in self.kind.items())
        yield from ((("name", pattern), settings) for pattern, settings in self.name.items())

    def where(self, path: _plan_toml.Path) -> str:
        """What a user calls a table or a field: `plan.toml:12 [kind.first]`, or `--bits`."""
        return self.origins.get(path) or header(path[:1] if path[0] == "default" else path[:2])


def load_plan(path: Path) -> Plan:
    """Read a plan from a TOML file.

    Raises:
        ConfigError: no such file, no TOML, or something in it that a plan cannot say; with its line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{path}: the plan cannot be read: {e.strerror}.") from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: the plan must be UTF-8 text, got byte {e.object[e.start]:#04x}.") from None
    return parse_plan(text, str(path))


def parse_plan(text: str, label: str = "plan") -> Plan:
    """Read a plan from TOML text.

    Args:
        text: the TOML.
        label: what a user calls it.

    Raises:
        ConfigError: no TOML, or something in it that a plan cannot say; with its line.

    >>> parse_plan("version = 1\\n[kind.first]\\nbits = 8").kind["first"].bits
    8
    """
    try:
        parsed = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise ConfigError(f"{label}: not valid TOML: {e}.") from None
    lines = _plan_toml.lines_of(text)

    def at(path: _plan_toml.Path) -> str:
        return f"{label}:{lines[path]}" if path in lines else label

    version = parsed.pop("version", None)
    if version is None:
        raise ConfigError(f"{label}: version is missing: begin the plan with `version = {VERSION}`.")
    if type(version) is not int or version != VERSION:
        raise ConfigError(
            f"{at(('version',))}: version must be {VERSION}, the one that this qcompress reads, got {version!r}."
        )
    for key in parsed:
        if key not in _TABLES:
            known = ("version", *_TABLES)
            raise ConfigError(
                f"{at((key,))}: unknown key {key!r}; known: {', '.join(known)}.{did_you_mean(key, known)}"
            )

    origins: dict[_plan_toml.Path, str] = {}

    def settings(table: _plan_toml.Path, fields: Any) -> Settings:
        if not isinstance(fields, dict):
            raise ConfigError(f"{at(table)}: {header(table)} must be a table of settings, got {fields!r}.")
        origins[table] = f"{at(table)} {header(table)}"
        for name in fields:
            origins[*table, name] = f"{at((*table, name))} {header(table)}"
        return settings_from(fields, lambda name: f"{origins[*table, name]} {name}")

    def family(key: str) -> dict[str, Settings]:
        tables = parsed.get(key, {})
        if not isinstance(tables, dict):
            raise ConfigError(f"{at((key,))}: {key} must hold tables like {_TABLES[key]}, got {tables!r}.")
        return {name: settings((key, name), fields) for name, fields in tables.items()}

    return Plan(
        default=settings(("default",), parsed.get("default", {})),
        kind=family("kind"),
        name=family("name"),
        origins=origins,
    )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """What happens to one tensor, and who said so.

    Args:
        name: qualified name.
        kind: kind of the layer whose weight it is.
        settings: every field set; None for a tensor that stays in float.
        reason: why it stays in float; None for one that is compressed.
        origins: for each field where it was set: `plan.toml:12 [kind.depthwise]`, `--bits`, `built-in default`.
    """

    name: str
    kind: str
    settings: Settings | None
    reason: str | None = None
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def bits(self) -> int:
        """Bits per code of a tensor that is compressed."""
        assert self.settings is not None
        assert self.settings.bits is not None
        return self.settings.bits

    @property
    def scheme(self) -> Scheme:
        """What the codes of a tensor that is compressed stand for."""
        assert self.settings is not None
        assert self.settings.scheme is not None
        return self.settings.scheme

    @property
    def activation_bits(self) -> int | None:
        """Bits per code of what the layer computes with the tensor; None: floats, as with a tensor that stays float."""
        return None if self.settings is None else self.settings.activation_bits

    @property
    def rows_per_lut(self) -> int | None:
        """Output channels that share a palette; None: all of them, which is what `auto` means without calibration."""
        assert self.settings is not None
        return None if self.settings.rows_per_lut == "auto" else self.settings.rows_per_lut

    @property
    def vector_dim(self) -> int:
        """Consecutive weights that share a code."""
        assert self.settings is not None
        return self.settings.vector_dim or 1

    @property
    def lut_dtype(self) -> LutDtype | None:
        """Type of a palette's entries; None: what layers compute in decides."""
        assert self.settings is not None
        return self.settings.lut_dtype

    @property
    def block_size(self) -> int | None:
        """Consecutive inputs that share a scale of an even grid; None: all of an output channel."""
        assert self.settings is not None
        return self.settings.block_size


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedPlan:
    """A plan for one model: every tensor, in the model's order."""

    tensors: tuple[TensorPlan, ...]

    def __getitem__(self, name: str) -> TensorPlan:
        return next(tensor for tensor in self.tensors if tensor.name == name)

    @property
    def compressed(self) -> tuple[TensorPlan, ...]:
        """The tensors that are compressed."""
        return tuple(tensor for tensor in self.tensors if tensor.settings is not None)

    def as_plan(self) -> Plan:
        """A plan that resolves to this for the same model: the most frequent settings, and the exceptions by name."""
        wanted = {t.name: t.settings or Settings(skip=True) for t in self.tensors if t.kind in WEIGHT_KINDS}
        if not wanted:
            return Plan()
        default = Counter(wanted.values()).most_common(1)[0][0]
        kept = [settings.given() for settings in wanted.values() if not settings.skip]
        # No table can take back what another one says: what some weights have nothing of is said by name for those
        # that have it.
        default = dataclasses.replace(default, **{f: None for f in default.given() if any(f not in s for s in kept)})
        exceptions = {
            _literally(name): Settings(**_difference(settings, default))
            for name, settings in wanted.items()
            if settings != default
        }
        return Plan(default=default, name=exceptions)

    def to_toml(self) -> str:
        """`as_plan` as TOML: what `--save-plan` writes."""
        return self.as_plan().to_toml()

    @property
    def digest(self) -> str:
        """A short digest of what happens to which tensor; who said so does not matter."""
        canonical = [
            [t.name, t.settings.given() if t.settings else None] for t in self.tensors if t.kind in WEIGHT_KINDS
        ]
        return short_digest(json.dumps(canonical, sort_keys=True).encode())


class _Named(Protocol):
    """What a plan must know of a tensor: of a source or of a program."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def aliases(self) -> tuple[str, ...]: ...


def resolve(plan: Plan, tensors: Iterable[_Named | tuple[str, str]]) -> ResolvedPlan:
    """What a plan means for one model.

    Args:
        plan: the plan.
        tensors: the model's tensors in their order, or (name, kind) of each.

    Raises:
        ConfigError: a pattern that matches nothing, a weight without a width, settings that do not go together, a kind
            table where kinds are unknown.

    >>> plan = Plan(default=Settings(bits=2), kind={"last": Settings(bits=8)})
    >>> [(t.name, t.bits) for t in resolve(plan, [("a.weight", "conv"), ("b.weight", "linear")]).tensors]
    [('a.weight', 2), ('b.weight', 8)]
    """
    entries = [(t[0], t[1], ()) if isinstance(t, tuple) else (t.name, t.kind, t.aliases) for t in tensors]
    _check_kinds(plan, entries)
    _check_patterns(plan, entries)
    weights = [name for name, kind, _ in entries if kind in WEIGHT_KINDS]
    resolved = tuple(
        _one(plan, name, kind, (name, *aliases), first=name in weights[:1], last=name in weights[-1:])
        for name, kind, aliases in entries
    )
    widthless = [t for t in resolved if t.settings is not None and t.settings.bits is None]
    if widthless:
        others = f" and {len(widthless) - 1} more weights" if len(widthless) > 1 else ""
        raise ConfigError(
            f"{widthless[0].name}{others}: no bits set: give --bits N (1 to 8), or set bits in a plan (--plan FILE)."
        )
    for tensor in resolved:
        if tensor.settings is not None:
            check_weight(
                tensor.scheme, tensor.bits, tensor.rows_per_lut, tensor.origins, name=tensor.name,
                vector_dim=tensor.vector_dim, block_size=tensor.block_size, lut_dtype=tensor.lut_dtype,
            )  # fmt: skip
            if tensor.block_size is not None and tensor.kind not in BLOCK_KINDS:
                raise ConfigError(
                    f"{tensor.name}: block_size = {tensor.block_size} ({tensor.origins['block_size']}) is for weights "
                    f"of kind {' or '.join(BLOCK_KINDS)}, and this one is of kind {tensor.kind}: leave it out, or say "
                    "it in [default], where it goes to those that can have it."
                )
    by_default = plan.default.block_size
    if by_default is not None and all(t.settings is None or t.block_size is None for t in resolved):
        raise ConfigError(
            f"block_size = {by_default} ({plan.where(('default', 'block_size'))}) is for weights of kind "
            f"{' or '.join(BLOCK_KINDS)}, and none that is compressed to an even grid is of these: leave it out."
        )
    return ResolvedPlan(tensors=resolved)


_Entry = tuple[str, str, tuple[str, ...]]
_TABLES: Final = {"default": "[default]", "kind": "[kind.first]", "name": '[name."layer1.*"]'}


def _one(plan: Plan, name: str, kind: str, names: tuple[str, ...], *, first: bool, last: bool) -> TensorPlan:
    if kind not in WEIGHT_KINDS:
        return TensorPlan(name=name, kind=kind, settings=None, reason=_not_compressed(kind))
    kinds = {kind} | ({FIRST} if first else set()) | ({LAST} if last else set())
    values, origins = BUILT_IN.given(), dict.fromkeys(BUILT_IN.given(), _BUILT_IN_ORIGIN)
    tables = dict[str, str]()
    for table, settings in plan.tables():
        if (
            table[0] == "default"
            or (table[0] == "kind" and table[1] in kinds)
            or (table[0] == "name" and any(fnmatchcase(n, table[1]) for n in names))
        ):
            values |= settings.given()
            origins |= {f: plan.where((*table, f)) for f in settings.given()}
            tables |= dict.fromkeys(settings.given(), table[0])
    is_other = kind not in BLOCK_KINDS or (values["scheme"] == "palette" and tables.get("scheme") in ("kind", "name"))
    if is_other and tables.get("block_size") == "default":
        del values["block_size"], origins["block_size"]
    if values["skip"]:
        return TensorPlan(name=name, kind=kind, settings=None, reason=f"by plan ({origins['skip']})", origins=origins)
    return TensorPlan(name=name, kind=kind, settings=Settings(**values), origins=origins)


def _check_kinds(plan: Plan, entries: list[_Entry]) -> None:
    if plan.kind and any(kind == UNKNOWN for _, kind, _ in entries):
        raise ConfigError(
            f"{plan.where(('kind', next(iter(plan.kind))))}: a bare state dict does not say of what kinds its tensors "
            f'are: give --arch, or write [name."PATTERN"] tables.'
        )


def _check_patterns(plan: Plan, entries: list[_Entry]) -> None:
    kind_of = {n: kind for name, kind, aliases in entries for n in (name, *aliases)}
    for pattern, settings in plan.name.items():
        where = plan.where(("name", pattern))
        matches = [name for name in kind_of if fnmatchcase(name, pattern)]
        if not matches:
            modules = {f"{name[:i]}.*" for name in kind_of for i, char in enumerate(name) if char == "."}
            near = did_you_mean(pattern, modules if pattern.endswith("*") else kind_of) or (
                f" Legal names are {', '.join(list(kind_of)[:3])} …" if kind_of else ""
            )
            raise ConfigError(
                f"{where} matches no tensor of this model.{near} `qcompress inspect MODEL` lists the legal names."
            )
        if set(settings.given()) - {"skip"} and not any(kind_of[name] in WEIGHT_KINDS for name in matches):
            raise ConfigError(
                f"{where} matches nothing that is compressed: {matches[0]}: {_not_compressed(kind_of[matches[0]])}. "
                f"`qcompress inspect MODEL` lists the legal names."
            )


def _not_compressed(kind: str) -> str:
    if kind == "recurrent":
        return "this version does not compress recurrent weights"
    if kind == UNKNOWN:
        return "a bare state dict does not say whether this is a weight: give --arch"
    return "not a weight"


def _literally(name: str) -> str:
    """The pattern that matches this name and no other."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _difference(settings: Settings, default: Settings) -> dict[str, Any]:
    if settings.skip:
        return {"skip": True}
    return {name: value for name, value in settings.given().items() if getattr(default, name) != value}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
