"""Finds and calls the user's own code, given as `package.module:factory` or `path/file.py:factory`."""

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from qcompress.errors import SourceError, did_you_mean

if TYPE_CHECKING:
    import torch

_COLOURS: Final = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def find_object(spec: str, flag: str) -> Any:
    """Return the object named by `package.module:name` or `path/file.py:name`; importing it runs the user's code.

    Args:
        spec: the value of the option.
        flag: the name of the option, for messages.

    Raises:
        SourceError: there is no such file, module or name, or importing the module fails.

    >>> find_object("collections:OrderedDict", "--arch").__name__
    'OrderedDict'
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise SourceError(f"{flag} needs package.module:name or path/file.py:name, got {spec!r}.")
    is_file = place.endswith(".py") or "/" in place or "\\" in place
    first_on_path(Path.cwd())
    module = _import_file(Path(place), spec, flag) if is_file else _import_module(place, spec, flag)
    if not hasattr(module, name):
        public = [word for word in vars(module) if not word.startswith("_")]
        known = did_you_mean(name, public) or (f" It defines {', '.join(sorted(public)[:10])}." if public else "")
        raise SourceError(f"{flag} {spec}: {place} has no {name!r}.{known}")
    return getattr(module, name)


def build_module(spec: str, kwargs: Mapping[str, Any]) -> "torch.nn.Module":
    """Build the float module that the factory of `--arch` returns.

    Raises:
        SourceError: the factory cannot be found, fails, or does not return a module.
    """
    import torch

    factory: Callable[..., Any] = find_object(spec, "--arch")
    call = f"{spec.rpartition(':')[2]}({', '.join(f'{k}={v!r}' for k, v in kwargs.items())})"
    if not callable(factory):
        raise SourceError(f"--arch {spec} must be a function or a class, got {type(factory).__name__}.")
    try:
        module = factory(**kwargs)
    except (Exception, SystemExit) as e:
        raise SourceError(
            f"--arch {spec}: {call} failed with {one_line(e)}. Its arguments come from --arch-kwargs."
        ) from e
    if not isinstance(module, torch.nn.Module):
        raise SourceError(f"--arch {spec}: {call} must return a torch.nn.Module, got {type(module).__name__}.")
    return module


def first_on_path(folder: Path) -> None:
    """Put a folder at the head of the import path, as `python -m` does with the working directory."""
    if sys.path[:1] != [str(folder)]:
        sys.path.insert(0, str(folder))


def one_line(e: BaseException) -> str:
    """Return the type and message of an exception in one line, without the colours of a terminal.

    >>> one_line(TypeError("bad\\n\\x1b[96mvalue\\x1b[0m"))
    'TypeError: bad value'
    """
    text = " ".join(_COLOURS.sub("", str(e)).split())
    return f"{type(e).__name__}: {text[:300]}" if text else type(e).__name__


def causes(e: BaseException) -> list[BaseException]:
    """Return an exception and what caused it, the first cause last."""
    chain = [e]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    return chain


def _import_module(name: str, spec: str, flag: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name is not None and (name == e.name or name.startswith(f"{e.name}.")):
            raise SourceError(
                f"{flag} {spec}: there is no module {e.name!r}; looked in the working directory {Path.cwd()} and in "
                "the installed packages."
            ) from None
        raise SourceError(f"{flag} {spec}: importing {name} failed with {one_line(e)}.") from e
    except (Exception, SystemExit) as e:
        raise SourceError(f"{flag} {spec}: importing {name} failed with {one_line(e)}.") from e


def _import_file(path: Path, spec: str, flag: str) -> ModuleType:
    if not path.is_file():
        raise SourceError(f"{flag} {spec}: there is no file {path}.")
    name = f"_qcompress_arch_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise SourceError(f"{flag} {spec}: {path} is not a Python file.")
    first_on_path(path.resolve().parent)
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        del sys.modules[name]
        raise SourceError(f"{flag} {spec}: running {path} failed with {one_line(e)}.") from e
    return module
