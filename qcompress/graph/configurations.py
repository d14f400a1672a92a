"""Settings of a model's configuration with which it can be traced, for the time of the trace."""

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import torch

# Settings of transformers' configurations with which a graph holds what a model computes, and ONNX can write it.
_TRACEABLE: Final = {"use_cache": False, "_experts_implementation": "batched_mm"}
_ATTENTION: Final = "_attn_implementation"
_EAGER: Final = "eager"


@contextlib.contextmanager
def traceable(module: torch.nn.Module) -> Iterator[tuple[str, ...]]:
    """Set a model's configurations so that it can be traced, and give notes on that; the settings come back after."""
    changed = [
        (config, name, old)
        for config in _configs(module)
        for name, value in _TRACEABLE.items()
        if (old := getattr(config, name, None)) not in (None, False, value)
    ]
    notes: tuple[str, ...] = ()
    if any(name == "use_cache" for _, name, _ in changed) and _may_generate(module):
        notes += ("The model keeps no cache of what it has seen (use_cache): each call computes all of its inputs.",)
    try:
        for config, name, _ in changed:
            setattr(config, name, _TRACEABLE[name])
        yield notes
    finally:
        for config, name, old in changed:
            setattr(config, name, old)


@contextlib.contextmanager
def eager_attention(module: torch.nn.Module) -> Iterator[bool]:
    """Set attention to plain operators where a model offers the choice, and give whether it does; as it was after."""
    held = [(config, getattr(config, _ATTENTION, None)) for config in _configs(module)]
    chosen = [(config, old) for config, old in held if old not in (None, _EAGER)]
    try:
        for config, _ in chosen:
            setattr(config, _ATTENTION, _EAGER)
        yield bool(chosen)
    finally:
        for config, old in held:  # a configuration passes its own on to those in it, which come later
            if old is not None:
                setattr(config, _ATTENTION, old)


def _may_generate(module: torch.nn.Module) -> bool:
    """Return whether a model may generate sequences step by step: unless all of its parts say that they cannot."""
    asked = [ask for part in module.modules() if callable(ask := getattr(part, "can_generate", None))]
    return not asked or any(ask() for ask in asked)


def _configs(module: torch.nn.Module) -> list[Any]:
    """Return the configurations that the parts of a model hold, as those of transformers do."""
    found = (vars(part).get("config") for part in module.modules())
    return list({id(config): config for config in found if config is not None}.values())
