"""Lists the operators that compute, and checks where their results are."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}


class Kernels(TorchDispatchMode):
    """Counts operators in its context, in the backward pass too; views and allocations are left out.

    Args:
        device: where all results must be; None: anywhere.
    """

    def __init__(self, device=None):
        super().__init__()
        self.found, self._device = Counter(), device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in _ALLOCATE | {"detach"}:
            self.found[name] += 1
            tensors = [value for value in tree_leaves(out) if isinstance(value, torch.Tensor)]
            assert self._device is None or all(t.device.type == self._device for t in tensors), func
        return out

    @property
    def total(self) -> int:
        return sum(self.found.values())
