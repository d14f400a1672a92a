"""What torch looks up anew for every trace, though it finds the same each time; it is most of what a small net takes.

`look_up_once` is called where tests trace: what a trace holds is the same with it.
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
    """A registry of one's own, to add operators to."""
    registry = copy.copy(read(opset_version))
    registry.functions = {name: list(found) for name, found in registry.functions.items()}
    return registry


def _materialize(materialize, known):
    """Look again only where an operator was registered since."""
    found = set(torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"))
    if found - known:
        materialize()
        known |= found
