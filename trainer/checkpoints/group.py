"""The collectives of the writer's thread, and of what takes long, over a process group of their own.

Training's collectives run at the same time on the main thread: on one group the two would be taken for each other.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer.distributed.process_group import Communicator
from trainer.errors import CheckpointError

Value = TypeVar("Value")


class Group:
    """All ranks, on the CPU. Correct for one process without a group."""

    def __init__(self, comm: Communicator, timeout: float) -> None:
        """Collective. `timeout`: seconds that a rank waits for another to have written its share."""
        self.rank = comm.env.rank
        self.size = comm.world_size
        self.active = comm.active
        self.handle: dist.ProcessGroup | None = None
        if comm.active:
            self.handle = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def gather(self, value: Value) -> list[Value]:
        """Every rank's picklable `value`, in the order of ranks."""
        if not self.active:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.handle)
        return values

    def agree(self, action: Callable[[], Value]) -> list[Value]:
        """Runs `action` on every rank. → all results, or CheckpointError on all ranks if it failed on one."""
        failure: str | None = None
        result: Any = None
        try:
            result = action()
        except Exception as error:  # OSError, and what torch and safetensors make of it
            failure = reason(error)
        outcomes = self.gather((failure, result))
        for rank, (failed, _) in enumerate(outcomes):
            if failed is not None:
                raise CheckpointError(failed if self.size == 1 else f"rank {rank}: {failed}")
        return [value for _, value in outcomes]

    def send(self, tensor: torch.Tensor, to: int) -> None:
        dist.send(tensor.contiguous(), to, group=self.handle)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, source: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        dist.recv(tensor, source, group=self.handle)
        return tensor


def reason(error: BaseException) -> str:
    """The system's reason if there is one below torch's or safetensors' own words; one line."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None and cause.strerror:
        return cause.strerror
    return " ".join(str(error).split()) or type(error).__name__
