"""Chooses the tensors of a checkpoint that are the model's, and gives them their names."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from qcompress.errors import SourceError
from qcompress.graph.module_types import layer_kind
from qcompress.kinds import UNKNOWN
from qcompress.sources.pickles.standins import StandIn, TensorRef, shown
from qcompress.sources.prefixes import WRAPPERS

# The keys under which checkpoints keep their model, the most likely first.
_USUAL: Final = ("", "state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
# A candidate that holds less than this share of the largest one's values is no model: a loss or a mean beside it.
_MODEL_SHARE: Final = 0.1
MAX_DEPTH: Final = 200
MAX_MODULES: Final = 200_000
MAX_PLACES: Final = 200


@dataclass(frozen=True, slots=True)
class Named:
    """A tensor of a checkpoint under its qualified name.

    Args:
        name: as in `named_parameters`.
        kind: the layer's kind, or unknown in a bare state dict.
        ref: its data in the file.
        persistent: whether a state dict would hold it.
        buffer: whether it is a buffer of a module.
    """

    name: str
    kind: str
    ref: TensorRef
    persistent: bool = True
    buffer: bool = False


@dataclass(frozen=True, slots=True)
class Chosen:
    """The part of a checkpoint that is the model.

    Args:
        where: its key in the checkpoint; empty for the whole checkpoint.
        tensors: its tensors in order; tied ones once for each name.
        is_module: whether it is a pickled module rather than a state dict.
        others: keys of the other candidates.
    """

    where: str
    tensors: list[Named]
    is_module: bool
    others: tuple[str, ...] = ()


def choose(value: Any, label: str) -> Chosen:
    """Find the model in a checkpoint: a module or a state dict, at the top or up to two levels down.

    Raises:
        SourceError: there is no named tensor.

    >>> choose({"epoch": 3}, "m.pt")
    Traceback (most recent call last):
    qcompress.errors.SourceError: no tensor found in m.pt: it holds a dict with the keys epoch. Save model.state_dict().
    """
    places = dict(itertools.islice(_places(value), MAX_PLACES))
    candidates = {where: found for where, inner in places.items() if (found := _named(inner, label))}
    if not candidates:
        raise SourceError(f"no tensor found in {label}: it holds {_describe(value)}. Save model.state_dict().")

    held = {where: sum(_floats(t) for t in found) for where, found in candidates.items()}
    large = [where for where in candidates if held[where] >= _MODEL_SHARE * max(held.values())]

    def rank(where: str) -> tuple[int, int]:
        return (_USUAL.index(where) if where in _USUAL else len(_USUAL), -len(candidates[where]))

    best = min(large, key=rank)
    is_module = isinstance(places[best], StandIn)
    tensors = candidates[best] if is_module else _without_prefix(candidates[best])
    return Chosen(best, tensors, is_module, tuple(where for where in candidates if where != best))


def _floats(tensor: Named) -> int:
    """Return how many floats a tensor holds: the state of a random generator is large, too."""
    view = tensor.ref.view
    return math.prod(view.shape) if "float" in view.dtype.name else 0


def _places(value: Any) -> Iterator[tuple[str, Any]]:
    yield "", value
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(key, str) and isinstance(inner, dict | StandIn):
                yield key, inner
                if isinstance(inner, dict):
                    deeper = ((k, v) for k, v in inner.items() if isinstance(k, str))
                    yield from ((f"{key}.{k}", v) for k, v in deeper if isinstance(v, dict | StandIn))


def _named(value: Any, label: str) -> list[Named]:
    if isinstance(value, StandIn):
        found = list(_of_module(value, label))  # parameters, then buffers, in the order of a module in memory
        return [t for t in found if not t.buffer] + [t for t in found if t.buffer]
    if isinstance(value, dict):
        return [Named(k, UNKNOWN, v) for k, v in value.items() if isinstance(k, str) and isinstance(v, TensorRef)]
    return []


def _without_prefix(tensors: list[Named]) -> list[Named]:
    for prefix in WRAPPERS:
        if all(t.name.startswith(prefix) for t in tensors):
            return _without_prefix([Named(t.name.removeprefix(prefix), t.kind, t.ref) for t in tensors])
    return tensors


def _of_module(root: StandIn, label: str) -> Iterator[Named]:
    """Yield the parameters and buffers of a module, then of its children."""
    pending: list[tuple[str, StandIn, tuple[int, ...]]] = [("", root, ())]
    for visited in itertools.count():
        if not pending:
            return
        prefix, module, above = pending.pop()
        if visited > MAX_MODULES:  # for example, forty modules each of which holds the next one twice
            raise SourceError(f"{label} is refused: it claims to hold over {MAX_MODULES} modules.")
        if id(module) in above or len(above) > MAX_DEPTH:
            raise SourceError(f"{label} is refused: its modules hold each other, or are nested over {MAX_DEPTH} deep.")
        fields = module.fields()
        transient = fields.get("_non_persistent_buffers_set", ())
        for table in ("_parameters", "_buffers"):
            for name, ref in _entries(fields.get(table)):
                if isinstance(ref, TensorRef):
                    buffer = table == "_buffers"
                    kind = "other" if buffer else layer_kind(fields, name, ref.view.shape)
                    kept = not (buffer and isinstance(transient, set) and name in transient)
                    yield Named(f"{prefix}{name}", kind, ref, kept, buffer)
        children = [(n, m) for n, m in _entries(fields.get("_modules")) if isinstance(m, StandIn)]
        pending += [(f"{prefix}{n}.", m, (*above, id(module))) for n, m in reversed(children)]


def _entries(table: Any) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in table.items() if isinstance(k, str)] if isinstance(table, Mapping) else []


def _describe(value: Any) -> str:
    if isinstance(value, TensorRef):
        return "one bare tensor without a name"
    if isinstance(value, StandIn):
        return f"an object made by {value.made_by}, which was not run"
    if isinstance(value, dict):
        keys = ", ".join(k[:40] if isinstance(k, str) else shown(k) for k in list(value)[:8])
        return f"a dict with the keys {keys}" if keys else "an empty dict"
    return f"an object of type {type(value).__name__}"
