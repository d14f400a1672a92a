"""Training in several processes: each has the whole model and a share of every batch, and gradients are averaged.

accelerate finds this process's device and connects the processes, as `torchrun` and `accelerate launch` started them;
torch.distributed does the rest.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch import distributed as dist

from qcompress.errors import ConfigError, missing


@final
@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of a training run, of which this is one.

    Args:
        device: torch's name of this process's device.
        rank: its number, from 0; number 0 writes files and reports.
        size: how many there are.
    """

    device: str
    rank: int = 0
    size: int = 1

    @classmethod
    def launched(cls, device: str) -> "Processes":
        """Returns the processes that a launcher started; without one, this process alone.

        Args:
            device: "cpu" or "cuda".

        Raises:
            ConfigError: the launcher asks for what is not supported.
            DependencyError: accelerate is not installed.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
            return cls(device)
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            raise ConfigError(
                "finetune does not shard models (FSDP): each process needs the whole weights for their scales and "
                "palettes; launch it with DDP."
            )
        try:
            from accelerate import PartialState  # type: ignore[import-untyped]
        except ImportError:
            raise missing("accelerate", "training in several processes") from None
        state = PartialState(cpu=device == "cpu")
        # accelerate numbers CPUs, too, but there is one for all.
        where = "cpu" if state.device.type == "cpu" else str(state.device)
        return cls(where, state.process_index, state.num_processes)

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their means over all processes, which pass them in the same order."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for group in by_dtype.values():
            flat = torch.cat([tensor.flatten() for tensor in group])
            dist.all_reduce(flat)
            parts = torch.split(flat.div_(self.size), [tensor.numel() for tensor in group])
            torch._foreach_copy_(group, [part.view_as(tensor) for part, tensor in zip(parts, group, strict=True)])

    def any(self, value: bool) -> bool:
        """Returns whether a value is true in any process. It waits for the others."""
        if self.size == 1:
            return value
        flag = torch.tensor(float(value), device=self.device)
        dist.all_reduce(flag)
        return bool(flag > 0)

    def first_of(self, value: int) -> int:
        """Returns the value of the first process. It waits for the others."""
        if self.size == 1:
            return value
        number = torch.tensor(value, device=self.device)
        dist.broadcast(number, 0)
        return int(number)

    def close(self) -> None:
        """Disconnects this process."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
