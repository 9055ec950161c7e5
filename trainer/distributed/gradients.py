"""The global gradient norm, and scaling, of gradients that lie as plain tensors and as DTensors on any sub-mesh."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor

from trainer.distributed.parallel_model import ParallelModel


def global_norm(model: ParallelModel) -> float:
    """The 2-norm of all gradients of the whole model, the same number on every rank and in every layout.

    Collective: one all-reduce of one number. A NaN or an infinity on any rank reaches all of them.
    """
    layout = model.mesh.layout
    peers = layout.world // layout.pipeline  # the ranks that hold this rank's stages
    by_copies: dict[int, list[torch.Tensor]] = {}
    for gradient in _gradients(model):
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        by_copies.setdefault(_copies(gradient, peers), []).append(local)
    total = 0.0
    for copies, local in by_copies.items():
        filled = [tensor for tensor in local if tensor.numel()]  # the last ranks of an uneven shard may have none
        if filled:
            dtype = torch.float64 if filled[0].dtype == torch.float64 else torch.float32
            norms = torch.stack(torch._foreach_norm(filled, 2, dtype=dtype))
            total += float(norms.double().square().sum()) / copies
    return math.sqrt(model.mesh.comm.sum([total])[0])


def multiply_(model: ParallelModel, factor: float) -> None:
    """Multiplies every gradient by `factor`, in place. Not collective."""
    local = [g.to_local() if isinstance(g, DTensor) else g for g in _gradients(model)]
    if local:
        torch._foreach_mul_(local, factor)


def _gradients(model: ParallelModel) -> Iterator[torch.Tensor]:
    for _, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield parameter.grad


def _copies(gradient: torch.Tensor, peers: int) -> int:
    """How many of `peers` ranks hold the same values as this one."""
    distinct = 1
    if isinstance(gradient, DTensor):
        for size, placement in zip(gradient.device_mesh.shape, gradient.placements, strict=True):
            assert not placement.is_partial(), f"a gradient was left as an unfinished sum: {gradient.placements}"
            distinct *= 1 if placement.is_replicate() else size
    return peers // distinct
