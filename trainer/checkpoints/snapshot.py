"""Copies of this rank's tensors in CPU memory, from which a checkpoint is written while training goes on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trainer.checkpoints.state import Tensors, local


@dataclass(frozen=True)
class Piece:
    """Which part of a whole tensor a rank has."""

    name: str
    dtype: torch.dtype
    whole: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))


def piece_of(name: str, tensor: torch.Tensor) -> Piece:
    whole = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Piece(name, tensor.dtype, whole, (0,) * len(whole), whole)
    shape, offset = compute_local_shape_and_global_offset(whole, tensor.device_mesh, tensor.placements)
    return Piece(name, tensor.dtype, whole, tuple(offset), tuple(shape))


class Snapshot:
    """`begin` on the training thread, `copy` on the writer's; parameters may change once `copy` is done.

    The copy is needed on the CPU too: the optimizer writes in place. It may overlap with forward and
    backward passes, which change neither parameters nor moments; what else is in the model (buffers, such
    as a sparsity schedule's) is copied at once. Memory is kept for the next snapshot, pinned on GPUs: to get it
    costs more than to copy.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: Tensors = {}
        self._sources: Tensors = {}
        self._ready: torch.cuda.Event | None = None

    def begin(self, tensors: Tensors) -> None:
        self._sources = tensors
        pinned = self._device.type == "cuda"
        for name, tensor in tensors.items():
            mine, kept = local(tensor), self._copies.get(name)
            if kept is None or kept.shape != mine.shape or kept.dtype != mine.dtype:
                self._copies[name] = torch.empty(mine.shape, dtype=mine.dtype, pin_memory=pinned)
        for name in self._copies.keys() - tensors.keys():
            del self._copies[name]
        for name, tensor in tensors.items():
            if not _moves_with_the_optimizer(name, tensor):
                self._copies[name].copy_(local(tensor))
        if pinned:
            self._ready = torch.cuda.Event()
            self._ready.record()

    def copy(self) -> None:
        """Fills the copies; on a GPU over a stream of its own, so that kernels go on."""
        stream = None
        if self._ready is not None:
            torch.cuda.set_device(self._device)
            stream = torch.cuda.Stream(self._device)
            stream.wait_event(self._ready)
        with torch.cuda.stream(stream):  # type: ignore[arg-type]  # None: does nothing
            for name, tensor in self._sources.items():
                if _moves_with_the_optimizer(name, tensor):
                    self._copies[name].copy_(local(tensor), non_blocking=True)
        if stream is not None:
            stream.synchronize()

    def pieces(self) -> list[Piece]:
        """Those with elements, in an order that is the same on ranks with the same part of the model."""
        return [piece_of(name, tensor) for name, tensor in self._sources.items() if self._copies[name].numel()]

    def __getitem__(self, name: str) -> torch.Tensor:
        """This rank's values of tensor `name`."""
        return self._copies[name]

    def tensors(self) -> Tensors:
        return dict(self._copies)

    def distributed(self) -> Tensors:
        """The copies, those of DTensors in the same placement (as torch's own asynchronous save makes them)."""
        return {
            name: DTensor(self._copies[name], tensor._spec, requires_grad=False)
            if isinstance(tensor, DTensor)
            else self._copies[name]
            for name, tensor in self._sources.items()
        }


def _moves_with_the_optimizer(name: str, tensor: torch.Tensor) -> bool:
    return name.startswith("optimizer.") or isinstance(tensor, nn.Parameter)
