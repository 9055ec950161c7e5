"""`full`: one whole copy, written by global rank 0, in the layout of Hugging Face; loads in any layout.

    config.json model.safetensors                  or model-00001-of-0000N.safetensors with their index
    training/optimizer.safetensors                 the moments: <parameter's name>.exp_avg …

    adapter_config.json adapter_model.safetensors  instead, where only adapters are trained: in that of peft

The optimizer lies in a folder of its own because serving engines read every safetensors file beside config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.checkpoints.formats.files import Reader, split_files, write_file, write_index
from trainer.checkpoints.group import Group
from trainer.checkpoints.snapshot import Piece, Snapshot, piece_of
from trainer.checkpoints.state import Tensors, TrainingState, local
from trainer.distributed.process_group import Communicator
from trainer.models import lora

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Form:
    """How the model's tensors lie in the folder."""

    stem: str = "model"
    limit: int | None = None
    """Bytes of one file; None: the usual."""
    convert: Callable[[Tensors], Tensors] = dict
    """Makes what is written of some modules' whole tensors, by the parameters' names."""
    dtype: torch.dtype | None = None
    """Of the floating-point tensors; None: as they are."""

    def made(self, tensors: Tensors) -> Tensors:
        converted = self.convert(tensors)
        if self.dtype is None:
            return converted
        return {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in converted.items()}


WHOLE = Form()
ADAPTER = Form(
    Path(lora.WEIGHTS).stem,
    limit=1 << 62,  # peft reads one file
    convert=lambda tensors: lora.adapter_state(tensors.items()),
)


MOMENTS = Form("training/optimizer")


def form_of(state: TrainingState) -> Form:
    """That of the state's checkpoints."""
    return WHOLE if state.adapter is None else ADAPTER


def write(
    staging: Path, snapshot: Snapshot, plan: Sequence[Sequence[Piece]], group: Group, form: Form = WHOLE
) -> list[str]:
    """Rank 0 gathers tensor by tensor and writes; the others send. → the files that this rank wrote.

    `plan` is every rank's `snapshot.pieces()`. Rank 0 holds one file's worth of gathered tensors at a time. If it
    cannot write, it goes on receiving, so that no other rank waits for it, and then raises.
    """
    owners: dict[str, dict[tuple[int, ...], tuple[int, Piece]]] = {}
    for rank, pieces in enumerate(plan):
        for piece in pieces:  # replicas have the same values: the first rank's is taken
            owners.setdefault(piece.name, {}).setdefault(piece.offset, (rank, piece))
    output = _Output(staging, group.rank == 0)
    for kind, one in (("model", form), ("optimizer", MOMENTS)):
        modules: dict[str, list[str]] = {}  # a module's tensors stay together
        for name in owners:
            if name.startswith(f"{kind}."):
                modules.setdefault(name.rpartition(".")[0], []).append(name)
        sizes = {module: sum(_bytes(owners[name]) for name in names) for module, names in modules.items()}
        if not sizes:
            continue  # an optimizer that has taken no step
        for file, members in split_files(one.stem, sizes, one.limit).items():
            names = [name for module in members for name in modules[module]]
            wholes = {name: _gather(list(owners[name].values()), snapshot, group) for name in names}
            output.add(file, {name.partition(".")[2]: t for name, t in wholes.items() if t is not None}, one)
        output.close(one.stem)
    return output.files()


class _Output:
    """The files of rank 0. After a failure it takes no more, and `files` raises it."""

    def __init__(self, staging: Path, active: bool) -> None:
        self._staging, self._active = staging, active
        self._written: list[str] = []
        self._groups: dict[str, list[str]] = {}
        self._total = 0
        self._failure: Exception | None = None

    def add(self, file: str, tensors: Tensors, form: Form) -> None:
        if self._active and self._failure is None:
            try:
                made = form.made(tensors)
                write_file(self._staging / file, made)
                self._written.append(file)
                self._groups[file] = list(made)
                self._total += sum(tensor.nbytes for tensor in made.values())
            except Exception as error:  # safetensors makes its own of a full disk
                self._failure = error

    def close(self, stem: str) -> None:
        """After the last file of this stem: the index of several."""
        if "/" not in stem and len(self._groups) > 1 and self._failure is None:
            try:
                write_index(self._staging / f"{stem}.safetensors.index.json", self._groups, self._total)
                self._written.append(f"{stem}.safetensors.index.json")
            except OSError as error:
                self._failure = error
        self._groups, self._total = {}, 0

    def files(self) -> list[str]:
        if self._failure is not None:
            raise self._failure
        return self._written


def _bytes(owners: dict[tuple[int, ...], tuple[int, Piece]]) -> int:
    """Of the whole tensor."""
    _, piece = next(iter(owners.values()))
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
            moments = sorted((folder / "training").glob("optimizer*.safetensors"))
            self._readers = [_model_reader(folder), Reader(moments, lambda name: f"optimizer.{name}")]
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


def _model_reader(folder: Path) -> Reader:
    if (folder / lora.WEIGHTS).is_file():
        return Reader([folder / lora.WEIGHTS], lambda name: f"model.{lora.own_name(name)}")
    return Reader(sorted(folder.glob("model*.safetensors")), lambda name: f"model.{name}")
