"""A plan resolved for one model: the settings of every tensor, and where each was set."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, final

from qcompress.artifacts.digest import short_digest
from qcompress.errors import ConfigError, did_you_mean
from qcompress.kinds import LAYER_WEIGHT_KINDS, UNKNOWN, WEIGHT_KINDS
from qcompress.plan.combinations import BUILT_IN, check_weight, set_to
from qcompress.plan.fields import FLOAT16, PlanField
from qcompress.plan.plan import FIRST, LAST, Plan, leaves_as_is, not_compressed
from qcompress.plan.settings import Settings


class Named(NamedTuple):
    """What a plan knows about a tensor: qualified name, kind of its layer, and further names of a tied one."""

    name: str
    kind: str
    aliases: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """What happens to one tensor, and where that was set.

    Every field of the plan is an attribute too, as code uses it (`PlanField.read`): `tensor.bits`. It is None for a
    tensor that stays in float.

    Args:
        name: qualified name.
        kind: kind of the layer that the tensor belongs to.
        settings: its fields, with their defaults; None for a tensor that stays in float.
        reason: why it stays in float; None for one that is compressed.
        float16: whether it stays in float, and is stored as float16.
        origins: where each field was set: `plan.toml:12 [kind.depthwise]`, `--bits`, `built-in default`.

    >>> tensor = TensorPlan(name="fc.weight", kind="linear", settings=Settings(bits=2, rows_per_lut="auto"))
    >>> tensor.bits, tensor.rows_per_lut, tensor.vector_dim
    (2, None, 1)
    """

    name: str
    kind: str
    settings: Settings | None
    reason: str | None = None
    float16: bool = False
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __getattr__(self, name: str) -> Any:
        if name not in TensorPlan.__slots__:
            for row in Settings.fields if self.settings is None else self.settings.fields:
                if row.name == name:
                    return None if self.settings is None else row.read(getattr(self.settings, name))
        raise AttributeError(f"TensorPlan has no attribute {name!r}")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedPlan:
    """A plan for one model: all tensors in the model's order."""

    tensors: tuple[TensorPlan, ...]

    def __getitem__(self, name: str) -> TensorPlan:
        return next(tensor for tensor in self.tensors if tensor.name == name)

    @property
    def compressed(self) -> tuple[TensorPlan, ...]:
        """The tensors that are compressed."""
        return tuple(tensor for tensor in self.tensors if tensor.settings is not None)

    def as_plan(self) -> Plan:
        """Return a plan that resolves to this one: the most frequent settings as default, exceptions by name."""
        settings = next((type(t.settings) for t in self.tensors if t.settings is not None), Settings)
        wanted = {
            t.name: t.settings or settings(skip=FLOAT16 if t.float16 else True)
            for t in self.tensors
            if t.kind in WEIGHT_KINDS
        }
        if not wanted:
            return Plan()
        most = Counter(wanted.values()).most_common(1)[0][0].given()
        kept = [s.given() for s in wanted.values() if not s.skip]
        # No table can unset what another one sets: what some weights lack is set by name for those that have it.
        default = {name: value for name, value in most.items() if all(name in s for s in kept)}
        exceptions = {
            _literally(name): settings(**_difference(s.given(), default))
            for name, s in wanted.items()
            if s.given() != default
        }
        return Plan(default=settings(**default), name=exceptions)

    def to_toml(self) -> str:
        """Return `as_plan` as TOML, which is what `--save-plan` writes."""
        return self.as_plan().to_toml()

    @property
    def digest(self) -> str:
        """A short digest of what happens to each tensor; where that was set does not count."""
        canonical = [
            [t.name, t.settings.given() if t.settings else FLOAT16 if t.float16 else None]
            for t in self.tensors
            if t.kind in WEIGHT_KINDS
        ]
        return short_digest(json.dumps(canonical, sort_keys=True).encode())


def resolve(plan: Plan, tensors: Iterable[tuple[str, str] | tuple[str, str, tuple[str, ...]]]) -> ResolvedPlan:
    """Return what a plan means for one model.

    Args:
        plan: the plan.
        tensors: (name, kind) or (name, kind, aliases) of the model's tensors, in their order.

    Raises:
        ConfigError: a pattern matches no tensor, a weight has no bits, two settings cannot be combined, or a kind table
            is used where kinds are unknown.

    >>> plan = Plan(default=Settings(bits=2), kind={"last": Settings(bits=8)})
    >>> [(t.name, t.bits) for t in resolve(plan, [("a.weight", "conv"), ("b.weight", "linear")]).tensors]
    [('a.weight', 2), ('b.weight', 8)]
    """
    named = [Named(*tensor) for tensor in tensors]
    _check_kinds_known(plan, named)
    _check_patterns(plan, named)
    weights = [tensor.name for tensor in named if tensor.kind in LAYER_WEIGHT_KINDS]
    ends = {FIRST: weights[:1], LAST: weights[-1:]}
    resolved = tuple(
        _tensor_plan(plan, tensor, {tensor.kind, *(end for end, at in ends.items() if tensor.name in at)})
        for tensor in named
    )
    _check_bits(resolved)
    for tensor in resolved:
        if tensor.settings is not None:
            check_weight(tensor.settings, tensor.origins, name=tensor.name)
            _check_kind(tensor, tensor.settings)
    _check_defaults_apply(plan, resolved)
    return ResolvedPlan(tensors=resolved)


def _tensor_plan(plan: Plan, tensor: Named, kinds: set[str]) -> TensorPlan:
    """Merge the tables that match a tensor, the weakest first."""
    name, kind, aliases = tensor
    if kind not in WEIGHT_KINDS:
        return TensorPlan(name=name, kind=kind, settings=None, reason=not_compressed(kind))
    settings = type(plan.default)
    values = settings.defaults().given()
    origins, tables = dict.fromkeys(values, BUILT_IN), dict.fromkeys(values, BUILT_IN)
    for table, given in plan.tables():
        matches = {
            "default": True,
            "kind": table[-1] in kinds,
            "name": any(fnmatchcase(n, table[-1]) for n in (name, *aliases)),
        }
        if matches[table[0]]:
            values |= given.given()
            origins |= {f: plan.where((*table, f)) for f in given.given()}
            tables |= dict.fromkeys(given.given(), table[0])
    for row in settings.fields:
        if row.kinds and tables.get(row.name) == "default":
            is_other_scheme = values["scheme"] not in row.schemes and tables["scheme"] in ("kind", "name")
            if kind not in row.kinds or is_other_scheme:
                del values[row.name], origins[row.name]
    if values["skip"]:
        return TensorPlan(
            name=name,
            kind=kind,
            settings=None,
            reason=f"by plan ({origins['skip']})",
            float16=values["skip"] == FLOAT16,
            origins=origins,
        )
    return TensorPlan(name=name, kind=kind, settings=settings(**values), origins=origins)


def _check_bits(tensors: Iterable[TensorPlan]) -> None:
    unset = [t.name for t in tensors if t.settings is not None and t.settings.bits is None]
    if unset:
        others = f" and {len(unset) - 1} more weights" if len(unset) > 1 else ""
        raise ConfigError(
            f"{unset[0]}{others}: bits is unset; add --bits N (1 to 8), or set bits in a plan (--plan FILE)."
        )


def _check_kind(tensor: TensorPlan, settings: Settings) -> None:
    for row in settings.fields:
        if row.kinds and row.name in settings.given() and tensor.kind not in row.kinds:
            raise ConfigError(
                f"{tensor.name}: {set_to(row, settings, tensor.origins)} applies to {_kinds(row)} weights only, but "
                f"this one is {tensor.kind}; remove it, or set it in [default], where it is ignored for other weights."
            )


def _check_defaults_apply(plan: Plan, tensors: Iterable[TensorPlan]) -> None:
    """A field that is ignored for some weights must apply to one."""
    settings = [t.settings.given() for t in tensors if t.settings is not None]
    for row in plan.default.fields:
        if row.kinds and row.name in plan.default.given() and not any(row.name in given for given in settings):
            where = set_to(row, plan.default, {row.name: plan.where(("default", row.name))})
            raise ConfigError(
                f"{where} has no effect: no {_kinds(row)} weight uses scheme "
                f"{' or '.join(map(repr, row.schemes))}; remove it."
            )


def _kinds(row: PlanField) -> str:
    return " or ".join(row.kinds)


def _check_kinds_known(plan: Plan, tensors: Iterable[Named]) -> None:
    if plan.kind and any(tensor.kind == UNKNOWN for tensor in tensors):
        raise ConfigError(
            f"{plan.where(('kind', next(iter(plan.kind))))}: a bare state dict does not tell the kinds of its layers; "
            f'add --arch, or use [name."PATTERN"] tables.'
        )


def _check_patterns(plan: Plan, tensors: Iterable[Named]) -> None:
    kind_of = {name: tensor.kind for tensor in tensors for name in (tensor.name, *tensor.aliases)}
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
        if not leaves_as_is(settings) and not any(kind_of[name] in WEIGHT_KINDS for name in matches):
            why = not_compressed(kind_of[matches[0]])
            raise ConfigError(
                f"{where} matches no weight that can be compressed; {matches[0]}: {why}. `qcompress inspect MODEL` "
                "lists the legal names."
            )


def _literally(name: str) -> str:
    """Return the pattern that matches this name and no other."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _difference(given: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """Return what a name table must set; a skipped weight needs nothing else."""
    if given.get("skip"):
        return {"skip": given["skip"]}
    return {name: value for name, value in given.items() if default.get(name) != value}
