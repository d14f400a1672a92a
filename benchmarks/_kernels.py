"""Counts what a training step does: kernels, operators, and how often the host waits for the device.

torch.profiler lists both. On CUDA kernels are those that ran on the device, copies and fills included. On a CPU every
operator of ATen that is not written in terms of others counts as one kernel, unless it makes a view or allocates memory
only; what it calls does not count. So a `_foreach_` operator is one kernel, as on CUDA, and so is a loop of compiled
code.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# Compiled code reports its loops to the profiler with this option of torch.compile.
REPORTED: Final = {"cpp.enable_kernel_profile": True}

_ALLOCATIONS: Final = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_")
_VIEWS: Final = (
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "as_strided_", "detach", "detach_", "diagonal", "expand",
    "lift_fresh", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind",
    "unfold", "unsqueeze", "view",
)  # fmt: skip
_NOT_KERNELS: Final = frozenset((*_ALLOCATIONS, *_VIEWS, "_local_scalar_dense"))
_WAITS: Final = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "equal", "unique_dim", "_unique2")
_OPTIMIZER: Final = "Optimizer."


@dataclass(frozen=True)
class Counts:
    """What one step does.

    Args:
        kernels: number of kernels.
        operators: number of dispatched operators.
        waits: how often the host waits for the device.
    """

    kernels: int
    operators: int
    waits: int


def counted(step: Callable[[], None], device: str) -> Counts:
    """Return what a step does; it runs once before.

    Args:
        step: runs one step.
        device: "cpu" or "cuda".
    """
    step()
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen, profile(activities=kinds) as found:
        warnings.simplefilter("always")
        step()
    events = found.events()
    operators = sum(event.name.startswith("aten::") for event in events)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("default")
        waits = sum("synchronizing CUDA operation" in str(warning.message) for warning in seen)
        ran = [e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]
        return Counts(len(ran), operators, waits)
    roots = [event for event in events if event.cpu_parent is None]
    return Counts(sum(map(_kernels, roots)), operators, sum(map(_waits, roots)))


def _kernels(event: Any) -> int:
    if event.name in _own_kernels():
        return int(event.name.removeprefix("aten::") not in _NOT_KERNELS)
    return sum(map(_kernels, event.cpu_children)) + ("cpp_fused" in event.name)


@functools.cache
def _own_kernels() -> frozenset[str]:
    """Return the operators that compute by themselves."""
    composed = set(torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"))
    others = (name for name in torch._C._dispatch_get_all_op_names() if name not in composed)
    return frozenset(name.partition(".")[0] for name in others if not name.endswith("out"))


def _waits(event: Any) -> int:
    """Return the waits in an event; the optimizer's are left out, which reads its counters, on the CPU."""
    if event.name.startswith(_OPTIMIZER):
        return 0
    return sum(map(_waits, event.cpu_children)) + (event.name.removeprefix("aten::") in _WAITS)
