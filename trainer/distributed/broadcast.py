"""Sending a state dict from the rank that has it to all others, one tensor at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trainer.distributed.process_group import Communicator


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor while the structure around it is sent."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def broadcast_tree(tree: Any, comm: Communicator, source: int) -> Any:
    """`source`'s nested dicts, lists and tuples of CPU tensors and plain values, on every rank.

    On the other ranks `tree` is ignored. Peak extra memory on the source is one tensor.
    """
    if not comm.active:
        return tree
    mine = comm.env.rank == source
    skeleton = comm.broadcast(_strip(tree) if mine else None, source)
    return _fill(skeleton, tree if mine else None, comm, source)


def _strip(node: Any) -> Any:
    if isinstance(node, torch.Tensor):
        return _Slot(tuple(node.shape), node.dtype)
    if isinstance(node, dict):
        return {key: _strip(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_strip(value) for value in node)
    return node


def _fill(node: Any, own: Any, comm: Communicator, source: int) -> Any:
    if isinstance(node, _Slot):
        tensor = torch.empty(node.shape, dtype=node.dtype) if own is None else own.contiguous()
        return comm.broadcast_tensor(tensor, source)
    if isinstance(node, dict):
        return {
            key: _fill(value, None if own is None else own[key], comm, source) for key, value in node.items()
        }
    if isinstance(node, (list, tuple)):
        return type(node)(
            _fill(value, None if own is None else own[index], comm, source)
            for index, value in enumerate(node)
        )
    return node
