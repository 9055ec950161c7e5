"""The process group: made once, destroyed cleanly, and the few collectives that the trainer needs.

Everything is also correct for one process without a group, so callers never branch on the world size.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed.env import RankEnv


def pick_device(env: RankEnv, wanted: str) -> torch.device:
    """`cpu`, `cuda`, or `auto`: the GPU of this local rank if there is one."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", env.local_rank % max(torch.cuda.device_count(), 1))


class Communicator:
    """Collectives over all ranks. Control messages go over Gloo on the CPU, tensors where they lie."""

    def __init__(self, env: RankEnv, device: torch.device, timeout: float) -> None:
        """Joins the group of all ranks; `timeout` in seconds bounds this and every collective."""
        self.env = env
        self.device = device
        self._active = env.world_size > 1
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not self._active:
            return
        gpu = device.type == "cuda"
        inherited = env.launcher == "torchrun"
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if gpu else "gloo",
            # torchrun's agent already serves the store: env:// finds it, tcp:// would start a second one
            init_method="env://" if inherited else f"tcp://{env.master_addr}:{env.master_port}",
            rank=env.rank,
            world_size=env.world_size,
            timeout=timedelta(seconds=timeout),
            device_id=device if gpu else None,
        )

    @property
    def world_size(self) -> int:
        return self.env.world_size

    @property
    def active(self) -> bool:
        """Whether there is a process group (more than one rank)."""
        return self._active

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all ranks, in float64: exact for counts up to 2**53."""
        if not self._active:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable `value`, in the order of ranks, on every rank."""
        if not self._active:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """`source`'s picklable value, on every rank."""
        if not self._active:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=source, device=torch.device("cpu"))
        return box[0]

    def broadcast_tensor(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """Fills `tensor` (same shape and dtype everywhere) with `source`'s values, in place."""
        if self._active:
            dist.broadcast(tensor, src=source)
        return tensor

    def barrier(self) -> None:
        if self._active:
            dist.all_reduce(torch.zeros(1))

    def close(self) -> None:
        """Leaves the group, so that no destructor aborts the process at its exit."""
        if self._active and dist.is_initialized():
            dist.destroy_process_group()
        self._active = False
