"""`full`: one whole copy, written by global rank 0, in the layout of Hugging Face; loads in any layout.

    config.json model.safetensors                  or model-00001-of-0000N.safetensors with their index
    training/optimizer.safetensors                 the moments: <parameter's name>.exp_avg …

The optimizer lies in a folder of its own because serving engines read every safetensors file beside config.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from trainer.checkpoints.formats.files import Reader, split_files, write_file, write_index
from trainer.checkpoints.group import Group
from trainer.checkpoints.snapshot import Piece, Snapshot, piece_of
from trainer.checkpoints.state import Tensors, local
from trainer.distributed.process_group import Communicator

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def write(staging: Path, snapshot: Snapshot, plan: Sequence[Sequence[Piece]], group: Group) -> list[str]:
    """Rank 0 gathers tensor by tensor and writes; the others send. → the files that this rank wrote.

    `plan` is every rank's `snapshot.pieces()`. Rank 0 holds one file's worth of gathered tensors at a time. If it
    cannot write, it goes on receiving, so that no other rank waits for it, and then raises.
    """
    owners: dict[str, dict[tuple[int, ...], tuple[int, Piece]]] = {}
    for rank, pieces in enumerate(plan):
        for piece in pieces:  # replicas have the same values: the first rank's is taken
            owners.setdefault(piece.name, {}).setdefault(piece.offset, (rank, piece))
    written: list[str] = []
    failure: Exception | None = None
    for kind, stem in (("model", "model"), ("optimizer", "training/optimizer")):
        sizes = {name: _bytes(next(iter(o.values()))[1]) for name, o in owners.items() if name.startswith(f"{kind}.")}
        if not sizes:
            continue  # an optimizer that has taken no step
        groups = split_files(stem, sizes)
        for file, names in groups.items():
            wholes = {name: _gather(list(owners[name].values()), snapshot, group) for name in names}
            if group.rank == 0 and failure is None:
                try:
                    write_file(
                        staging / file, {name.partition(".")[2]: t for name, t in wholes.items() if t is not None}
                    )
                    written.append(file)
                except Exception as error:  # safetensors makes its own of a full disk
                    failure = error
        if kind == "model" and len(groups) > 1 and group.rank == 0 and failure is None:
            plain = {file: [name.partition(".")[2] for name in names] for file, names in groups.items()}
            write_index(staging / f"{stem}.safetensors.index.json", plain, sum(sizes.values()))
            written.append(f"{stem}.safetensors.index.json")
    if failure is not None:
        raise failure
    return written


def _bytes(piece: Piece) -> int:
    return torch.Size(piece.whole).numel() * piece.dtype.itemsize


def _gather(owners: Sequence[tuple[int, Piece]], snapshot: Snapshot, group: Group) -> torch.Tensor | None:
    """The whole tensor on rank 0; None on the others."""
    if group.rank != 0:
        for rank, piece in owners:
            if rank == group.rank:
                group.send(snapshot[piece.name], 0)
        return None
    first = owners[0][1]
    if owners[0][0] == 0 and first.shape == first.whole:
        return snapshot[first.name]  # no need to copy again
    whole = torch.empty(first.whole, dtype=first.dtype)
    for rank, piece in owners:
        part = snapshot[piece.name] if rank == 0 else group.receive(piece.shape, piece.dtype, rank)
        whole[piece.slices] = part
    return whole


class Source:
    """A folder of type `full` on the disk of rank `holder`; the other ranks need not see it."""

    def __init__(self, folder: Path, comm: Communicator, holder: int) -> None:
        self._comm, self._holder = comm, holder
        self._readers: list[Reader] = []
        if comm.env.rank == holder:
            models = sorted(folder.glob("model*.safetensors"))
            moments = sorted((folder / "training").glob("optimizer*.safetensors"))
            self._readers = [
                Reader(models, lambda name: f"model.{name}"), Reader(moments, lambda name: f"optimizer.{name}")
            ]  # fmt: skip
        mine = {name: shape for reader in self._readers for name, shape in reader.shapes().items()}
        self.shapes: Shapes = comm.broadcast(mine, holder)

    def load(self, targets: Tensors) -> None:
        """Fills this rank's `targets`. Collective: ranks may want different tensors, but all take part in all.

        A rank holds one whole tensor at a time.
        """
        wanted = {name for names in self._comm.gather(sorted(targets)) for name in names}
        device = self._comm.device
        for name, (shape, dtype) in self.shapes.items():
            if name not in wanted:
                continue
            if self._comm.env.rank == self._holder:
                reader = self._readers[name.startswith("optimizer.")]
                whole = reader.read(name).to(device).contiguous()
            else:
                whole = torch.empty(shape, dtype=dtype, device=device)
            if whole.numel():
                self._comm.broadcast_tensor(whole.reshape(-1).view(torch.uint8), self._holder)
            if name in targets:
                target = targets[name]
                local(target).copy_(whole[piece_of(name, target).slices])
