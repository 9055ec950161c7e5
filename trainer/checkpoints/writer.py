"""Writing one checkpoint in a thread: copy, write, flush and hash, seal, delete the old ones, hand to the upload.

Each stage ends with the ranks agreeing that it worked everywhere, over the writer's own process group. So a disk
that is full on one rank fails the save on all, and nobody deletes an old checkpoint before all have sealed the new.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoints import manifest
from trainer.checkpoints.formats import full, local, shard
from trainer.checkpoints.group import Group
from trainer.checkpoints.settings import write_settings
from trainer.checkpoints.snapshot import Piece, Snapshot
from trainer.checkpoints.state import TrainingState, rng_state, tensors
from trainer.checkpoints.storage import Storage
from trainer.checkpoints.upload import Uploader
from trainer.config import CheckpointConfig
from trainer.distributed.mesh import Mesh
from trainer.errors import CheckpointError

STATE, RNG = "training/state.json", "training/rng.pt"


@dataclass
class Job:
    """One save under way."""

    step: int
    began: float
    blocked: float = 0.0
    """Seconds that the training loop has waited for it."""
    seconds: float = 0.0
    size: int = 0
    failure: str | None = None
    """The same on every rank."""
    notes: list[str] = field(default_factory=list)
    copied: threading.Event = field(default_factory=threading.Event)
    """Parameters and moments may change again."""
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class _Share:
    """What one rank adds to the checkpoint beside its tensors."""

    rng: dict[str, Any]
    data: tuple[int, dict[str, Any]] | None
    """(data rank, state of its rows), from one rank of each data-parallel rank."""
    pieces: list[Piece]
    save: str


class Writer:
    def __init__(
        self,
        config: CheckpointConfig,
        layout: str,
        storage: Storage,
        mesh: Mesh,
        group: Group,
        uploader: Uploader | None,
    ) -> None:
        self._config, self._layout, self._storage, self._mesh = config, layout, storage, mesh
        self._group, self._uploader = group, uploader
        self._snapshot = Snapshot(mesh.comm.device)
        self._sealers = [storage.sealer_of[0]] if layout == "full" else storage.sealers
        self._seals = storage.rank in self._sealers

    def start(self, state: TrainingState, timeline: int) -> Job:
        """Takes what must be of this moment and leaves the rest to a thread. `copied` tells when tensors are."""
        job = Job(state.step, time.perf_counter())
        self._snapshot.begin(tensors(state))
        data = json.loads(json.dumps(state.stream.state_dict()))  # a copy; and it must be JSON in the end
        share = _Share(
            rng_state(self._mesh.comm.device),
            (self._mesh.data_rank, data) if self._mesh.counts_rows else None,
            self._snapshot.pieces() if self._layout == "full" else [],
            uuid.uuid4().hex,
        )
        about = {
            "step": state.step,
            "config_hash": state.config_hash,
            "schedule": state.schedule.state_dict(),
            "scaler": None if state.scaler is None else state.scaler.state_dict(),
        }
        text = json.dumps(about)
        work = (job, share, text, timeline, state)
        threading.Thread(target=self._run, args=work, name="checkpoint-writer", daemon=True).start()
        return job

    def _run(self, job: Job, share: _Share, about: str, timeline: int, state: TrainingState) -> None:
        try:
            self._write(job, share, json.loads(about), timeline, state)
        except Exception as error:  # a CheckpointError that all agree on, or a lost connection
            job.failure = error.message if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        job.seconds = time.perf_counter() - job.began
        job.copied.set()
        job.done.set()

    def _write(self, job: Job, share: _Share, about: dict[str, Any], timeline: int, state: TrainingState) -> None:
        group, root = self._group, self._storage.root
        staging = manifest.staging_folder(root, job.step)

        def copy() -> _Share:
            self._snapshot.copy()
            job.copied.set()
            return share

        shares = group.agree(copy)
        data = [one.data for one in sorted((s for s in shares if s.data), key=lambda s: s.data[0])]  # type: ignore[index]
        about["data"] = type(state.stream).merge([one[1] for one in data if one])
        head = self._head(state, timeline, job.step, shares[0].save)
        try:
            common = group.agree(lambda: self._prepare(about, [one.rng for one in shares], state))[group.rank]
            written = group.agree(lambda: manifest.digest(staging, [*common, *self._fill(staging, shares, state)]))
            group.agree(lambda: self._seal(staging, head, written))
        except CheckpointError:
            if self._seals:
                manifest.discard_staging(root, job.step)
            raise
        job.size = sum(entry["bytes"] for files in written for entry in files.values())
        job.notes = [
            note for notes in group.gather(self._after(root / manifest.folder_name(job.step))) for note in notes
        ]

    def export(self, state: TrainingState, name: str, form: full.Form, timeline: int, saved: bool) -> Path:
        """Writes the model alone as `root/name` on rank 0's disk; → its path. Collective, and done when it returns.

        `saved`: this step has a checkpoint; if that holds the very same files, they are linked, not written again.
        Raises CheckpointError on all ranks.
        """
        group, root = self._group, self._storage.root
        folder, main = root / name, group.rank == 0
        twin = root / manifest.folder_name(state.step)
        same = saved and self._layout == "full" and form == full.form_of(state)
        head = self._head(state, timeline, state.step, uuid.uuid4().hex) | {"layout": "full"}

        def begin() -> tuple[Path, manifest.Files]:
            if not main:
                return folder, {}
            staging = manifest.stage_as(root, name)
            write_settings(staging, state, form.dtype)
            return staging, _link(twin, staging, form.stem) if same else {}

        def seal(staging: Path, linked: manifest.Files) -> None:
            if main:
                names = sorted(path.name for path in staging.iterdir())
                files = manifest.digest(staging, [name for name in names if name not in linked])
                manifest.publish(staging, name, {manifest.MANIFEST: manifest.text_of(head, {**files, **linked})})

        try:
            staging, linked = group.agree(begin)[0]
            if not linked:
                self._snapshot.begin(tensors(state, optimizer=False))
                self._snapshot.copy()
                plan = group.gather(self._snapshot.pieces())
                group.agree(lambda: full.write(staging, self._snapshot, plan, group, form))
            group.agree(lambda: seal(staging, linked))
        except CheckpointError as error:
            if main:
                manifest.sweep(root)
            raise CheckpointError(
                f"the model could not be written to {folder}: {error.message}",
                hint="The checkpoints are as they were: the same command writes it again.",
            ) from error
        if main and self._uploader is not None:
            self._uploader.submit(folder)
        return folder

    def _head(self, state: TrainingState, timeline: int, step: int, save: str) -> dict[str, Any]:
        head = {
            "step": step,
            "timeline": timeline,
            "world": self._group.size,
            "layout": self._layout,
            "parallel": self._mesh.layout.describe(),
            "save": save,
        }
        return head if state.adapter is None else {**head, "base": state.adapter.fingerprint}

    def _prepare(self, about: dict[str, Any], rngs: list[dict[str, Any]], state: TrainingState) -> list[str]:
        """Makes the staging folder with what is not tensors; → the files' names."""
        if not self._seals:
            return []
        staging = manifest.stage(self._storage.root, about["step"])
        (staging / "training").mkdir()
        (staging / STATE).write_text(json.dumps(about, indent=1) + "\n")
        with (staging / RNG).open("wb") as file:
            torch.save(rngs, file)
        if self._storage.rank == self._sealers[0]:
            write_settings(staging, state)
        return [path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()]

    def _fill(self, staging: Path, shares: list[_Share], state: TrainingState) -> list[str]:
        if self._layout == "full":
            return full.write(staging, self._snapshot, [one.pieces for one in shares], self._group, full.form_of(state))
        if self._layout == "shard":
            return shard.write(staging, self._snapshot, self._group)
        return local.write(staging, self._snapshot, self._storage.rank)

    def _seal(self, staging: Path, head: dict[str, Any], written: list[manifest.Files]) -> None:
        if not self._seals:
            return
        files = {name: entry for rank in self._storage.peers for name, entry in written[rank].items()}
        part, parts = self._sealers.index(self._storage.rank), len(self._sealers)
        manifest.seal(staging, head, dict(sorted(files.items())), part=part, parts=parts)

    def _after(self, folder: Path) -> list[str]:
        """Retention and upload; → what went wrong, which does not make the checkpoint any worse."""
        if not self._seals:
            return []
        notes: list[str] = []
        try:
            manifest.retain(self._storage.root, self._config.keep_last, self._config.keep_every)
        except OSError as error:
            notes.append(f"{platform.node()}: old checkpoints could not be deleted: {error.strerror or error}")
        if self._uploader is not None:
            notes += self._uploader.notes()
            self._uploader.submit(folder)
        return notes


def _link(checkpoint: Path, staging: Path, stem: str) -> manifest.Files:
    """The model's files of a checkpoint in `staging` too, without a copy; nothing where the disk cannot do so."""
    known = manifest.read(checkpoint)["files"]
    files = {name: entry for name, entry in known.items() if name.startswith(stem) and ".safetensors" in name}
    try:
        for name in files:
            os.link(checkpoint / name, staging / name)
    except OSError:
        for name in files:
            (staging / name).unlink(missing_ok=True)
        return {}
    return files
