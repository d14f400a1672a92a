"""The classes that a pickled module may consist of: torch.nn's own, and those that the user names."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from qcompress.errors import SourceError, UnsafeFileError
from qcompress.sources.pickles.machine import Unpickled
from qcompress.sources.pickles.standins import Name, shown
from qcompress.user_code import find_object

# Functions that torch.nn modules have as attributes; each computes on tensors and does nothing else.
_HARMLESS: Final = frozenset(
    {
        "torch.nn.functional.relu",
        "torch.nn.functional.gelu",
        "torch.nn.functional.silu",
        "torch.nn.functional.tanh",
        "torch.nn.functional.sigmoid",
        "torch._C._nn.gelu",
    }
)
# Names that torch's restricted unpickler allows by itself, as far as the pickle of a module needs them.
_KNOWN_TO_TORCH: Final = frozenset(
    {
        "collections.OrderedDict",
        "collections.Counter",
        "builtins.set",
        "builtins.dict",
        "builtins.list",
        "builtins.bytearray",
        "_codecs.encode",
        "torch.Size",
        "torch.Tensor",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.nn.parameter.Buffer",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._tensor._rebuild_from_type_v2",
    }
)
WAYS_OUT: Final = (
    "save a .pt2 (torch.export.save), or a state dict and pass its architecture with --arch, or allow the class with "
    "--allow-class {example}. Only if you trust whoever made the file: --trust-pickle."
)


def module_class(name: Name) -> type | None:
    """Return the torch.nn class of that name, or None; only modules that torch has already imported are searched.

    A name that torch.nn merely re-exports (`torch.nn.modules.module.functools`) does not count.

    >>> import torch
    >>> module_class(Name("torch.nn.modules.conv", "Conv2d")) is torch.nn.Conv2d
    True
    >>> module_class(Name("torch.nn.modules.module", "functools")) is None
    True
    """
    import torch

    if not name.module.startswith("torch.nn.modules.") or not name.name.isidentifier():
        return None
    found = vars(sys.modules.get(name.module, object)).get(name.name)
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        return None
    return found if (found.__module__, found.__name__) == (name.module, name.name) else None


def allow_list(pickled: Unpickled, allow_classes: Sequence[str], label: str) -> list[Any]:
    """Return the further classes and functions that torch's restricted unpickler needs to read a pickled module.

    Args:
        pickled: the contents of the pickle.
        allow_classes: `pkg.mod:Cls` as the user wrote them; only these are imported.
        label: the file's name in messages.

    Raises:
        UnsafeFileError: the pickle names other classes, or calls an allowed class with arguments that are not allowed.
        SourceError: an allowed class cannot be found.
    """
    granted = {spec: _granted(spec) for spec in allow_classes}
    allowed: list[Any] = []
    refused: list[Name] = []
    for name in pickled.names:
        if (own := module_class(name)) is not None:
            allowed.append(own)
        elif str(name) in _HARMLESS:
            allowed.append((_harmless(name), str(name)))
        elif (match := _match(name, granted)) is not None:
            allowed.append((match, str(name)))
        elif not _torch_knows(name):
            refused.append(name)
    if refused:
        raise refusal(refused, label)
    for made in pickled.stand_ins:
        if _match(made.made_by, granted) is None and not _ARGUMENTS.get(str(made.made_by), _no_arguments)(made.args):
            args = f"{', '.join(map(shown, made.args[:3]))}{', …' if len(made.args) > 3 else ''}"
            raise UnsafeFileError(
                f"{label} is refused: its pickle calls {made.made_by} with the arguments {args}, which torch.save does "
                "not write and which could make an object of any size. None of its code was run."
            )
    return allowed


def _no_arguments(args: tuple[Any, ...]) -> bool:
    return not args


def _plain(args: tuple[Any, ...]) -> bool:
    return all(isinstance(arg, str | int | None) for arg in args)


def _one_container(args: tuple[Any, ...]) -> bool:
    return len(args) == 1 and isinstance(args[0], tuple | list | dict)


# Arguments that these calls may have; any other call (of a torch.nn class, for example) must have no arguments.
_ARGUMENTS: Final[Mapping[str, Callable[[tuple[Any, ...]], bool]]] = {
    "torch.Size": _one_container,
    "torch.device": _plain,
    "_codecs.encode": _plain,
    "collections.Counter": _one_container,
}


def calls(names: Iterable[Name]) -> list[Name]:
    """Return the names that, judged by spelling, are neither torch's own data nor classes of torch.nn.

    torch is not imported.

    >>> [str(n) for n in calls([Name("torch._utils", "_rebuild_tensor_v2"), Name("posix", "system")])]
    ['posix.system']
    """
    return [
        n
        for n in names
        if str(n) not in _KNOWN_TO_TORCH
        and not n.module.startswith("torch.nn.modules.")
        and not (n.module in ("torch", "torch.storage") and n.name.endswith("Storage"))
    ]


def refusal(names: Sequence[Name], label: str) -> UnsafeFileError:
    """Return the error that lists unknown names and what the user can do."""
    listed = ", ".join(str(n) for n in names[:10]) + (", …" if len(names) > 10 else "")
    first = names[0]
    module = "your_module" if first.module == "__main__" else first.module
    return UnsafeFileError(
        f"{label} is a pickle that needs code which is not part of torch.nn: {listed}. None of its code was run. "
        "Ways out: " + WAYS_OUT.format(example=f"{module}:{first.name}")
    )


def _granted(spec: str) -> type:
    found = find_object(spec, "--allow-class")
    if not isinstance(found, type):
        raise SourceError(f"--allow-class {spec} must be a class, got {type(found).__name__}.")
    return found


def _match(name: Name, granted: dict[str, type]) -> type | None:
    for spec, found in granted.items():
        place, _, attribute = spec.rpartition(":")
        # classes of a script are saved as classes of __main__, whatever module they are imported from later
        if name.name == attribute and name.module in (place, found.__module__, "__main__"):
            return found
    return None


def _torch_knows(name: Name) -> bool:
    if str(name) in _KNOWN_TO_TORCH:
        return True
    return name.module in ("torch", "torch.storage") and (name.name.endswith("Storage") or name.name in _dtypes())


def _dtypes() -> frozenset[str]:
    import torch

    return frozenset(n for n, v in vars(torch).items() if isinstance(v, torch.dtype))


def _harmless(name: Name) -> Any:
    return vars(sys.modules[name.module])[name.name]
