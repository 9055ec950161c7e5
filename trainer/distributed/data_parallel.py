"""Data parallelism with torch's own DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.distributed.process_group import Communicator


class DataParallel:
    """A model replicated on every rank.

    `wrapped` is what forward passes go through; `module` is the plain model, for checkpoints,
    evaluation and generation.
    """

    def __init__(self, module: nn.Module, comm: Communicator) -> None:
        self.module = module
        self.world_size = comm.world_size
        self.wrapped: nn.Module = module
        if comm.active:
            self.wrapped = DistributedDataParallel(
                module,
                device_ids=[comm.device] if comm.device.type == "cuda" else None,
                forward_sync_buffers=False,  # the models' buffers are constants (rotary frequencies)
                gradient_as_bucket_view=True,
            )

    @property
    def gradient_scale(self) -> float:
        """What a rank's loss is multiplied with, because DDP averages gradients where a sum is wanted."""
        return float(self.world_size)

    def accumulate(self, last: bool) -> AbstractContextManager[None]:
        """The context of one micro-batch: gradients are reduced only with the last."""
        if last or not isinstance(self.wrapped, DistributedDataParallel):
            return nullcontext()
        return self.wrapped.no_sync()

    def settle(self, backward: Callable[[], torch.Tensor | None]) -> None:
        """Two discarded backward passes.

        DDP re-orders its gradient buckets after the first one; a resumed run equals the uninterrupted
        one bit for bit only if it too starts with settled buckets.
        """
        if isinstance(self.wrapped, DistributedDataParallel):
            for _ in range(2):
                backward()
                self.module.zero_grad(set_to_none=True)
