"""Agreeing on the checkpoint to start from: the newest that verifies, wherever it lies."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from trainer.checkpoints import manifest
from trainer.checkpoints.formats import local
from trainer.checkpoints.group import Group
from trainer.checkpoints.manifest import Found
from trainer.checkpoints.storage import Storage
from trainer.checkpoints.upload import Remote, fetch, scan
from trainer.errors import CheckpointError


@dataclass(frozen=True)
class Chosen:
    """The checkpoint to start from."""

    found: Found
    holder: int
    """A rank on whose disk it is whole; of type `shard` and `local`, every rank has what it needs."""
    host: str
    uploaded: bool
    """Whether the remote has it too."""


@dataclass(frozen=True)
class Choice:
    chosen: Chosen | None
    timeline: int
    """That in which training goes on."""
    passed_over: list[str]


@dataclass
class _Candidate:
    """One save, and who has it."""

    holders: dict[int, Found] = field(default_factory=dict)
    """By sealer."""
    remote: Found | None = None

    @property
    def any(self) -> Found:
        return self.remote or next(iter(self.holders.values()))


def choose(wanted: str, storage: Storage, group: Group, remote: Remote | None) -> Choice:
    """The same answer on every rank. Collective.

    `wanted` is `auto` (the newest), `none`, a name in the checkpoint folder or a path; all but `auto` begin a
    new timeline. Hashes are checked newest first, by all ranks that see the disk; what only the remote has is
    fetched. Raises CheckpointError if one was asked for by name and does not verify, or if there are checkpoints and
    none verifies: starting anew by accident would cost more than asking.
    """
    return _Chooser(storage, group, remote).choose(wanted)


class _Chooser:
    def __init__(self, storage: Storage, group: Group, remote: Remote | None) -> None:
        self._storage, self._group, self._remote = storage, group, remote
        self._sees = storage.rank == storage.sealer
        self._passed_over: list[str] = []
        self._hosts = group.gather(os.uname().nodename)

    def choose(self, wanted: str) -> Choice:
        root = self._storage.root
        candidates = self._list(manifest.scan(root) if self._sees else ([], []), "")
        timelines = [candidate.any.timeline for candidate in candidates]
        anew = max(timelines) + 1 if timelines else 0
        if wanted == "none":
            return Choice(None, anew, [])
        if wanted != "auto":
            self._passed_over.clear()
            path = Path(wanted) if "/" in wanted else root / wanted
            candidates = self._list(_named(path) if self._sees else ([], []), path.name)
        chosen = next((chosen for chosen in map(self._try, candidates) if chosen), None)
        if chosen is None and (wanted != "auto" or self._passed_over):
            raise CheckpointError(
                f"no checkpoint verifies: {'; '.join(self._passed_over) or wanted}",
                hint="checkpoint.resume=none starts anew and leaves these checkpoints until retention.",
            )
        timeline = anew if wanted != "auto" else chosen.found.timeline if chosen else 0
        return Choice(chosen, timeline, self._passed_over)

    def _list(self, here: tuple[list[Found], list[str]], only: str) -> list[_Candidate]:
        """Newest first, from every disk and the remote (there, with `only`, the folder of that name)."""
        listings = self._group.gather(here)
        there = scan(self._remote, only) if self._remote is not None and self._group.rank == 0 else ([], [])
        distant, reasons = self._group.gather(there)[0]
        candidates: dict[tuple[int, int, str], _Candidate] = {}
        for rank, (found, bad) in enumerate(listings):
            self._passed_over += [self._at(rank) + reason for reason in bad]
            for one in found:
                candidates.setdefault((one.timeline, one.step, one.save), _Candidate()).holders[rank] = one
        for one in distant:
            candidates.setdefault((one.timeline, one.step, one.save), _Candidate()).remote = one
        self._passed_over += reasons
        return [candidates[key] for key in sorted(candidates, reverse=True)]

    def _try(self, candidate: _Candidate) -> Chosen | None:
        ways = self._ways(candidate)
        for holders in ways:
            first = min(holders)
            if self._verify(holders):
                return Chosen(holders[first], first, self._hosts[first], candidate.remote is not None)
        if candidate.remote is not None and not candidate.remote.parts:
            return self._fetch(candidate.remote)
        if not ways:
            found = candidate.any
            self._passed_over.append(
                f"{found.path}: of type {found.layout}, and its files are not on every node"
                " (checkpoint.remote can bring them together)"
            )
        return None

    def _ways(self, candidate: _Candidate) -> list[dict[int, Found]]:
        """The sets of disks from which the candidate can be loaded, if they verify."""
        holders = candidate.holders
        if candidate.any.layout == "full":
            return [{sealer: one} for sealer, one in sorted(holders.items())]
        everywhere = len(holders) == len(self._storage.sealers)
        whole = not any(one.parts for one in holders.values())
        return [holders] if everywhere and (whole or candidate.any.layout == "local") else []

    def _verify(self, holders: dict[int, Found]) -> bool:
        """Whether these disks can be used. All ranks that see one take their share of the hashing."""
        storage, reason = self._storage, None
        mine = holders.get(storage.sealer)
        if mine is not None:
            try:
                head = manifest.verify(Path(mine.path), share=(storage.peers.index(storage.rank), len(storage.peers)))
                stem = local.stem(storage.rank)
                if (
                    mine.parts
                    and head["world"] == self._group.size
                    and not any(name.startswith(stem) for name in head["files"])
                ):
                    reason = f"{mine.path}: the files of rank {storage.rank} lie on another node"
            except CheckpointError as error:
                reason = error.message
        return self._agree(reason)

    def _fetch(self, found: Found) -> Chosen | None:
        """Brings a checkpoint from the remote to rank 0's disk, or where every rank reads its own, to all."""
        storage, reason = self._storage, None
        sealers = [storage.sealer_of[0]] if found.layout == "full" else storage.sealers
        name = manifest.folder_name(found.step)
        if storage.rank in sealers:
            assert self._remote is not None
            try:
                fetch(self._remote, name, storage.root)
            except (CheckpointError, OSError) as error:
                reason = error.message if isinstance(error, CheckpointError) else f"{found.path}: {error}"
        if not self._agree(reason):
            return None
        here = Found(found.timeline, found.step, str(storage.root / name), found.layout, found.save)
        return Chosen(here, sealers[0], f"{self._hosts[sealers[0]]}, fetched from {found.path}", True)

    def _agree(self, reason: str | None) -> bool:
        """Whether no rank has a reason to pass over; else the first is noted."""
        reasons = [self._at(rank) + why for rank, why in enumerate(self._group.gather(reason)) if why is not None]
        self._passed_over += reasons[:1]
        return not reasons

    def _at(self, rank: int) -> str:
        return f"{self._hosts[rank]}: " if len(set(self._hosts)) > 1 else ""


def _named(path: Path) -> tuple[list[Found], list[str]]:
    try:
        return [Found.of(str(path), manifest.read(path))], []
    except CheckpointError as error:
        return [], [error.message]
