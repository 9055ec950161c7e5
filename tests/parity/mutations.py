"""Faults put into the code on purpose; with each of them the comparison must fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement

from trainer.distributed import gradients
from trainer.distributed.data_parallel import DataParallelModel
from trainer.distributed.process_group import Communicator

Mutation = Callable[[], AbstractContextManager[Any]]


def _ddp_average() -> AbstractContextManager[Any]:
    """DDP's average is taken for the sum."""
    return patch.object(DataParallelModel, "_sum_factor", 1)


def _fsdp_average() -> AbstractContextManager[Any]:
    """FSDP2 divides by the number of ranks, as it does by default."""
    original = FSDPModule.set_gradient_divide_factor

    def divide(self: FSDPModule, factor: float) -> None:
        original(self, factor * torch.distributed.get_world_size())

    return patch.object(FSDPModule, "set_gradient_divide_factor", divide)


def _hybrid_no_all_reduce() -> AbstractContextManager[Any]:
    """Replicas keep their own sums."""
    original = FSDPModule.set_requires_all_reduce
    return patch.object(FSDPModule, "set_requires_all_reduce", lambda self, _last: original(self, False))


def _no_sync_never() -> AbstractContextManager[Any]:
    """Gradients of the first micro-batches stay on their rank."""

    @contextmanager
    def forget(self: DataParallelModel, last: bool) -> Iterator[None]:
        if last:
            self.zero_grad()
        yield

    return patch.object(DataParallelModel, "_accumulating", forget)


def _mean_of_means() -> AbstractContextManager[Any]:
    """Each micro-batch's loss is divided by its own count."""
    original = DataParallelModel._loss

    def mean(self: DataParallelModel, module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        valid = (batch["labels"] != -100).sum().clamp(min=1)
        return original(self, module, batch) / valid

    return patch.object(DataParallelModel, "_loss", mean)


def _norm_counts_replicas() -> AbstractContextManager[Any]:
    """What several ranks hold counts once for each of them."""
    return patch.object(gradients, "_copies", lambda *_: 1)


def _norm_not_reduced() -> AbstractContextManager[Any]:
    """Each rank takes the norm of what it holds."""
    return patch.object(Communicator, "sum", lambda self, values: [float(value) for value in values])


def _norms_gradient_partial() -> AbstractContextManager[Any]:
    """Replicated parameters keep the gradient of their own tokens or heads, as if it were complete."""

    def keep(placements: Sequence[Placement], gradient: torch.Tensor) -> torch.Tensor:
        assert isinstance(gradient, DTensor)
        if not placements[0].is_replicate():
            return gradient.redistribute(placements=placements)
        return DTensor.from_local(gradient.to_local(), gradient.device_mesh, placements, run_check=False)

    return patch("trainer.distributed.tensor_parallel._complete", keep)


def _documents_leak() -> AbstractContextManager[Any]:
    """Positions do not say where documents begin."""
    original = DataParallelModel._loss

    def loss(self: DataParallelModel, module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return original(self, module, {name: value for name, value in batch.items() if name != "position_ids"})

    return patch.object(DataParallelModel, "_loss", loss)


MUTATIONS: dict[str, Mutation] = {  # pipeline_cells adds its own
    "ddp_average": _ddp_average,
    "fsdp_average": _fsdp_average,
    "replicate_average": _fsdp_average,
    "hybrid_no_all_reduce": _hybrid_no_all_reduce,
    "no_sync_never": _no_sync_never,
    "mean_of_means": _mean_of_means,
    "norm_counts_replicas": _norm_counts_replicas,
    "norm_not_reduced": _norm_not_reduced,
    "norms_gradient_partial": _norms_gradient_partial,
    "documents_leak": _documents_leak,
    "every_rank_counts": lambda: patch("trainer.distributed.mesh.Mesh.counts_rows", True),
    "tie_lost": lambda: patch("trainer.distributed.tensor_parallel._tied", lambda _module: False),
}
