"""The config of a project: `[tool.qcompress]` of pyproject.toml, or qcompress.toml, in the working directory.

Options of the command line win over it, key by key; `run_options` merges the two.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Final

import pydantic
from pydantic.dataclasses import dataclass as pydantic_dataclass

from qcompress.errors import ConfigError
from qcompress.files import read_plain
from qcompress.gate.verdicts import GateLimits
from qcompress.plan import toml
from qcompress.plan.fields import BITS
from qcompress_cli.inputs.shapes import Dynamic, InputShape, parse_input_shape
from qcompress_cli.inputs.tables import read_table

PYPROJECT: Final = "pyproject.toml"
OWN_FILE: Final = "qcompress.toml"
MODEL_SUFFIXES: Final = (".pt", ".pth", ".pt2", ".safetensors", ".bin")


@pydantic_dataclass(frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid"))
class Project:
    """The table of a project; every key means what the option of that name means."""

    model: str | None = None
    arch: str | None = None
    arch_kwargs: dict[str, Any] = field(default_factory=dict)
    calibration: str | None = None
    data: str | None = None
    input_shape: str | list[str] | list[int] | None = None
    transform: str | None = None
    metric: str | None = None
    lower_is_better: pydantic.StrictBool | None = None
    target: str | None = None
    output: str | None = None
    plan: str | None = None
    bits: Annotated[int | None, pydantic.PlainValidator(BITS.checked)] = None
    gate: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """The options that several commands share: from the command line, else the config, else None or a default."""

    model: Path | None = None
    arch: str | None = None
    arch_kwargs: Mapping[str, Any] = field(default_factory=dict)
    allow_class: tuple[str, ...] = ()
    trust_pickle: bool = False
    calibration: str | None = None
    data: str | None = None
    input_shape: tuple[InputShape, ...] = ()
    transform: str | None = None
    metric: str | None = None
    lower_is_better: bool = False
    target: str | None = None
    output: Path | None = None
    plan: Path | None = None
    bits: int | None = None
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    dynamic: tuple[Dynamic, ...] = ()
    fixed_batch: bool = False
    device: str = "cpu"
    force: bool = False


_PATHS: Final = ("model", "output", "plan")


def run_options(params: Mapping[str, Any], folder: Path | None = None) -> RunOptions:
    """Merge the command line with the project's config.

    Args:
        params: what click parsed, None or empty where an option was not given; parameters that `RunOptions` lacks
            belong to the command and are left out.
        folder: of the config; None for the working directory.

    Raises:
        ConfigError: the config is wrong, or two options contradict each other.
    """
    if params.get("fixed_batch") and params.get("dynamic"):
        raise ConfigError("--fixed-batch makes no axis dynamic, but --dynamic names one; remove one of the two.")
    project, where = load_project(folder)
    merged: dict[str, Any] = {}
    for name in (f.name for f in fields(RunOptions)):
        value: Any = params.get(name)
        if name == "arch_kwargs":
            # They belong to the config's arch; another one on the command line does not get them.
            value = {**(project.arch_kwargs if params.get("arch") is None else {}), **(value or {})}
        elif value is None or value == ():
            value = _from_config(getattr(project, name, None), name, where)
        if value is not None:
            merged[name] = Path(value) if name in _PATHS else value
    return RunOptions(**merged)


def load_project(folder: Path | None = None) -> tuple[Project, str]:
    """Return the project's config, empty where there is no file, and what messages call it.

    Raises:
        ConfigError: there are two configs, or one is not TOML, has an unknown key or a wrong value.
    """
    folder = Path() if folder is None else folder
    own, pyproject = folder / OWN_FILE, folder / PYPROJECT
    table = _tool_table(pyproject) if pyproject.is_file() else None
    if own.is_file():
        if table is not None:
            raise ConfigError(
                f"Both {OWN_FILE} and [tool.qcompress] of {PYPROJECT} configure this folder: keep {OWN_FILE} and "
                f"remove the table from {PYPROJECT}, or the other way round."
            )
        return read_table(Project, _read_toml(own), OWN_FILE), OWN_FILE
    if table is not None:
        where = f"[tool.qcompress] of {PYPROJECT}"
        return read_table(Project, table, where), where
    return Project(), "no config"


def load_config_file(path: Path) -> tuple[Project, str]:
    """Return the config in a file that the user named: all of it, or [tool.qcompress] of a pyproject.toml.

    Raises:
        ConfigError: it cannot be read, or is wrong.
    """
    if path.name != PYPROJECT:
        return read_table(Project, _read_toml(path), str(path)), str(path)
    table = _tool_table(path)
    if table is None:
        raise ConfigError(f"{path} has no table [tool.qcompress].")
    return read_table(Project, table, f"[tool.qcompress] of {path}"), f"[tool.qcompress] of {path}"


def read_gate(project: Project, where: str) -> tuple[GateLimits, tuple[str, ...]]:
    """Return the limits of a project's gate, and its files or globs.

    Args:
        project: the config.
        where: what messages call it.

    Raises:
        ConfigError: a key or a value is wrong.
    """
    table = dict(project.gate or {})
    files = table.pop("files", ())
    texts = [files] if isinstance(files, str) else files
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"gate in {where}: files must be a list of files or globs, got {files!r}.")
    return read_table(GateLimits, table, f"gate in {where}", also=("files",)), tuple(texts)


def require_model(given: RunOptions, args: tuple[str, ...], folder: Path | None = None) -> Path:
    """Return MODEL, or raise an error that names the model files here and the full command to type.

    Args:
        given: the run's options.
        args: the command line as typed, without `qcompress`.
        folder: where model files are looked for; None for the working directory.

    Raises:
        ConfigError: no MODEL was given.
    """
    if given.model is not None:
        return given.model
    here = sorted(p.name for p in (folder or Path()).iterdir() if p.suffix in MODEL_SUFFIXES and p.is_file())
    command = shlex.join(["qcompress", args[0], here[0] if here else "MODEL", *args[1:]])
    found = f"model files here: {', '.join(here)}" if here else f"no model file here ({', '.join(MODEL_SUFFIXES)})"
    raise ConfigError(
        f"MODEL is missing, from the command line and from the config; {found}.\n"
        f'Type: {command}\nor write model = "…" into {OWN_FILE} once.'
    )


def _from_config(value: Any, name: str, where: str) -> Any:
    if value is None or name != "input_shape":
        return value
    texts = [value] if isinstance(value, str) else value
    if texts and isinstance(texts[0], int):
        texts = [",".join(str(n) for n in texts)]
    try:
        return tuple(parse_input_shape(text) for text in texts)
    except ConfigError as e:
        raise ConfigError(f"{where}: input_shape: {e}") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        text = read_plain(path).decode("utf-8")
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}.") from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not valid TOML: {e}.") from None
    return toml.parsed(text, str(path))


def _tool_table(path: Path) -> dict[str, Any] | None:
    tool = _read_toml(path).get("tool", {})
    table = tool.get("qcompress") if isinstance(tool, dict) else None
    if table is not None and not isinstance(table, dict):
        raise ConfigError(f"{path}: tool.qcompress must be a table, got {table!r}.")
    return table
