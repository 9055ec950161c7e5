"""Data parallelism with torch's DistributedDataParallel, `replicate` and FSDP2 (`fully_shard`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from trainer.config import Config
from trainer.distributed.layout import Layout
from trainer.distributed.mesh import Mesh
from trainer.distributed.parallel_model import Batch, ParallelModel
from trainer.distributed.tensor_parallel import loss_context
from trainer.models.memory import LOW, decoder_layers


class DataParallelModel(ParallelModel):
    """A whole model, for all layouts without pipeline: plain, DDP, FSDP2, with or without tensor parallelism."""

    def __init__(self, module: nn.Module, config: Config, mesh: Mesh) -> None:
        """`module`'s forward gives the summed loss of a batch that has `labels`. It has been through
        `apply_tensor_parallel` and `shard_data_parallel`, and holds its weights."""
        self.mesh = mesh
        self.parts = [module]
        self._module = module
        self._config = config
        self._wrapped: nn.Module = module
        if mesh.layout.data > 1 and not uses_fsdp(config, mesh.layout):
            device = mesh.comm.device
            self._wrapped = DistributedDataParallel(
                module,
                device_ids=[device] if device.type == "cuda" else None,
                forward_sync_buffers=False,  # the models' buffers are constants (rotary frequencies)
                gradient_as_bucket_view=True,
            )

    def forward_backward(self, batches: Sequence[Batch], scale: float) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.comm.device)
        scale *= self._sum_factor
        for number, batch in enumerate(batches, start=1):
            with self._accumulating(last=number == len(batches)), loss_context(self._config, self.mesh):
                loss = self._loss(self._wrapped, batch)
                (loss * scale).backward()
            total += loss.detach()
        return total if self.mesh.counts_rows else torch.zeros_like(total)

    @property
    def _sum_factor(self) -> int:
        """What a loss is multiplied with, because DDP averages gradients over its ranks where a sum is wanted."""
        return self.mesh.layout.data if isinstance(self._wrapped, DistributedDataParallel) else 1

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        """Also collective among data-parallel ranks if the layout shards parameters: all must call it equally
        often (with labels that are all IGNORE once they have run out of rows)."""
        with loss_context(self._config, self.mesh):
            loss = self._loss(self._module, batch).double()  # DDP's own forward would wait for the other ranks
        for module in self._module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what forward gathered would otherwise stay, and hide the sharded parameters
        return loss if self.mesh.counts_rows else torch.zeros_like(loss)

    def settle(self, backward: Callable[[], object]) -> None:
        """Two discarded steps under DDP: it re-orders its gradient buckets after its first backward pass, and a
        resumed run equals the uninterrupted one bit for bit only if it too starts with settled buckets."""
        if isinstance(self._wrapped, DistributedDataParallel):
            for _ in range(2):
                backward()
                self.zero_grad()

    def _loss(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        device = self.mesh.comm.device
        with compute_precision(self._config, self.mesh):
            loss = module(**{name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()})
        return loss.full_tensor() if isinstance(loss, DTensor) else loss

    @contextmanager
    def _accumulating(self, last: bool) -> Iterator[None]:
        """One micro-batch. Whole gradients are reduced with the last one only; sharded ones must not become whole
        in between: FSDP2 reduce-scatters them each time, and hybrid sharding leaves its all-reduce to the last.

        `shard_grad_op` trades memory for speed: parameters and gradients stay whole until the last.
        """
        module = self._wrapped
        if isinstance(module, DistributedDataParallel):
            with nullcontext() if last else module.no_sync():
                yield
            return
        if isinstance(module, FSDPModule):
            layout = self.mesh.layout
            if self._config.parallel.strategy == "shard_grad_op" or layout.shard == 1:
                module.set_requires_gradient_sync(last)
                module.set_reshard_after_backward(last)
            elif layout.replicate > 1:
                module.set_requires_all_reduce(last)
        yield


def uses_fsdp(config: Config, layout: Layout) -> bool:
    """Whether `shard_data_parallel` does anything.

    `ddp` alone is DistributedDataParallel; together with tensor or pipeline parallelism, whose DTensors and
    stages that cannot take, it is torch's `replicate`, which does the same with FSDP2's machinery.
    """
    if layout.data == 1:
        return False
    return config.parallel.strategy != "ddp" or layout.tensor > 1 or layout.pipeline > 1


def shard_data_parallel(module: nn.Module, config: Config, mesh: Mesh) -> None:
    """Applies FSDP2 to each decoder layer and to the rest of `module` together, in place, if `uses_fsdp`.

    `module` is a transformers model, or a pipeline stage of one, and may be on the meta device. Gradients are
    sums over the data-parallel ranks, reduced in fp32 (fp64 under fp64), in the sharded parameters' `.grad`.
    """
    layout = mesh.layout
    if not uses_fsdp(config, layout):
        return
    precision = config.train.precision
    policy = MixedPrecisionPolicy(
        param_dtype=LOW.get(precision),
        reduce_dtype=torch.float64 if precision == "fp64" else torch.float32,
    )
    gather_again = config.parallel.strategy in ("full_shard", "hybrid") and layout.pipeline == 1
    layers = [layer for _, layer in decoder_layers(module)]
    for unit in [*layers, module]:
        if next(unit.parameters(), None) is None:
            continue  # a layer of another pipeline stage
        if layout.shard == 1:
            replicate(unit, mesh=mesh["replicate"], mp_policy=policy)
        else:
            fully_shard(
                unit,
                mesh=mesh["shard"] if layout.replicate == 1 else mesh["replicate", "shard"],
                mp_policy=policy,
                # backward begins with the last layer, and the rest of the model is needed at both ends
                reshard_after_forward=gather_again and unit is not module and unit is not layers[-1],
            )
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            # Exact sums: the default averages, and a factor without plain sums needs an operation Gloo lacks.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)


def compute_precision(config: Config, mesh: Mesh) -> AbstractContextManager[object]:
    """Autocast for forward passes, where FSDP2's own policy does not cast."""
    dtype = LOW.get(config.train.precision)
    if dtype is None or uses_fsdp(config, mesh.layout):
        return nullcontext()
    return torch.autocast(mesh.comm.device.type, dtype=dtype)
