"""`shard`: torch.distributed.checkpoint (DCP); every rank writes what only it has; loads in any layout.

shards/.metadata shards/__<rank>_0.distcp
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from trainer.checkpoints.group import Group
from trainer.checkpoints.snapshot import Snapshot
from trainer.checkpoints.state import Tensors

FOLDER = "shards"


def write(staging: Path, snapshot: Snapshot, group: Group) -> list[str]:
    """Collective; → the files that this rank wrote. What failed on a rank is raised there; others return nothing."""
    folder = staging / FOLDER
    try:
        dcp.save(
            snapshot.distributed(),
            storage_writer=dcp.FileSystemWriter(folder, sync_files=False),  # flushed when hashed
            process_group=group.handle,
            no_dist=not group.active,
        )
    except dcp.CheckpointException as error:  # a BaseException, the same on all ranks
        if group.rank in error.failures:
            raise error.failures[group.rank][0] from None
        return []
    mine = [path.name for path in folder.glob(f"__{group.rank}_*.distcp")]
    if group.rank == 0:
        mine.append(".metadata")
    return [f"{FOLDER}/{name}" for name in sorted(mine)]


class Source:
    """A folder of type `shard` that this rank sees."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER
        metadata = dcp.FileSystemReader(self._folder).read_metadata().state_dict_metadata
        self.shapes = {
            name: (tuple(entry.size), entry.properties.dtype)
            for name, entry in metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def load(self, targets: Tensors) -> None:
        """Fills this rank's `targets`, reading only what it needs of each file. Not collective."""
        if targets:
            plain: dict[str, torch.Tensor] = {name: tensor.detach() for name, tensor in targets.items()}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist is meant
                dcp.load(plain, storage_reader=dcp.FileSystemReader(self._folder), no_dist=True)
