"""`local`: every rank's own tensors as they are; the fastest, and only for the same layout.

local/rank-00000.safetensors …
"""

from __future__ import annotations

from pathlib import Path

from trainer.checkpoints.formats.files import Reader, split_files, write_file
from trainer.checkpoints.snapshot import Snapshot, piece_of
from trainer.checkpoints.state import Tensors, local

FOLDER = "local"


def stem(rank: int) -> str:
    return f"{FOLDER}/rank-{rank:05}"


def write(staging: Path, snapshot: Snapshot, rank: int) -> list[str]:
    """→ the files that this rank wrote. Not collective."""
    (staging / FOLDER).mkdir(exist_ok=True)
    tensors = snapshot.tensors()
    groups = split_files(stem(rank), {name: tensor.nbytes for name, tensor in tensors.items()})
    for file, names in groups.items():
        write_file(staging / file, {name: tensors[name] for name in names})
    return list(groups)


class Source:
    """A folder of type `local`, as rank `rank` of the same layout sees it."""

    def __init__(self, folder: Path, rank: int, targets: Tensors) -> None:
        """`targets` give the whole shapes, which only the layout knows."""
        self._reader = Reader(sorted(folder.glob(f"{stem(rank)}*.safetensors")))
        there = self._reader.shapes()
        self.shapes = dict(there)
        for name, target in targets.items():
            if name in there and there[name][0] == piece_of(name, target).shape:
                self.shapes[name] = (tuple(target.shape), there[name][1])

    def load(self, targets: Tensors) -> None:
        for name, target in targets.items():
            local(target).copy_(self._reader.read(name))
