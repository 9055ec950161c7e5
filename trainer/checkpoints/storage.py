"""Which ranks see the same checkpoint folder: found out by looking, not from what nodes are called."""

from __future__ import annotations

import contextlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from trainer.distributed.process_group import Communicator
from trainer.errors import CheckpointError


@dataclass(frozen=True)
class Storage:
    """The checkpoint folder `root` of every rank. Ranks that see the same folder have the same *sealer*, the
    rank that names, lists and deletes checkpoints there."""

    root: Path
    rank: int
    sealer_of: tuple[int, ...]
    """For each rank."""

    @property
    def sealers(self) -> list[int]:
        return sorted(set(self.sealer_of))

    @property
    def sealer(self) -> int:
        """That of this rank."""
        return self.sealer_of[self.rank]

    @property
    def shared(self) -> bool:
        return len(self.sealers) == 1

    @property
    def peers(self) -> list[int]:
        """The ranks that see this rank's folder."""
        return [rank for rank, sealer in enumerate(self.sealer_of) if sealer == self.sealer]


def probe(root: Path, comm: Communicator) -> Storage:
    """Makes `root`; the first rank of each node puts a file there, and every rank tells which of them it sees.

    Raises CheckpointError on all ranks if the folder cannot be made or written on a node.
    """
    env = comm.env
    token = comm.broadcast(f".probe-{uuid.uuid4().hex}")
    mine = root / f"{token}-{env.rank}"
    failure = None
    if env.is_node_main or env.is_main:
        try:
            root.mkdir(parents=True, exist_ok=True)
            if not os.access(root, os.W_OK):
                raise PermissionError(13, "not writable")
            mine.touch()
        except OSError as error:
            failure = error.strerror or str(error)
    failures = comm.gather((env.is_node_main or env.is_main, failure))
    seen = [rank for rank, (first, _) in enumerate(failures) if first and (root / f"{token}-{rank}").exists()]
    sealers = comm.gather(seen[0] if seen else -1)
    with contextlib.suppress(OSError):
        mine.unlink(missing_ok=True)
    for rank, (_, why) in enumerate(failures):
        if why:
            raise CheckpointError(
                f"checkpoint folder {root} of rank {rank}: {why}", hint="Set ORCH_CHECKPOINT_DIR to a folder that is."
            )
    if -1 in sealers:
        raise CheckpointError(f"rank {sealers.index(-1)} does not see its node's checkpoint folder {root}")
    return Storage(root, env.rank, tuple(sealers))
