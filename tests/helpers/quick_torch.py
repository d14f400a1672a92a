"""Speeds up tracing: torch repeats some look-ups for every trace, and they take most of the time of a small net.

Tests that trace call `look_up_once`; it does not change the traces.
"""

import copy
import functools

import torch
from torch._export import utils
from torch.onnx._internal.exporter._registration import ONNXRegistry


@functools.cache
def look_up_once() -> None:
    """Let torch.onnx read the sources of its operators once, and torch.export list composite operators once."""
    ONNXRegistry.from_torchlib = staticmethod(functools.partial(_registry, functools.cache(ONNXRegistry.from_torchlib)))
    utils._materialize_cpp_cia_ops = functools.partial(_materialize, utils._materialize_cpp_cia_ops, set())


def _registry(read, opset_version):
    """Return a copy of the registry, so that adding operators does not change the cached one."""
    registry = copy.copy(read(opset_version))
    registry.functions = {name: list(found) for name, found in registry.functions.items()}
    return registry


def _materialize(materialize, known):
    """Repeat the look-up only if operators were registered since the last one."""
    found = set(torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"))
    if found - known:
        materialize()
        known |= found
