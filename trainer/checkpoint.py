"""Saving and resuming, agreed by all ranks.

Only global rank 0 writes. At the start all ranks agree on the newest checkpoint that verifies on *any*
node, and the rank that holds it sends it to the others: after a re-deploy rank 0 may be on another node,
whose disk has older checkpoints or none.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer import manifest
from trainer.config import CheckpointConfig
from trainer.distributed.process_group import Communicator
from trainer.errors import CheckpointError
from trainer.metrics import Reporter
from trainer.training_state import TrainingState, rng_state


@dataclass(frozen=True)
class Chosen:
    """The checkpoint to start from and the rank that has it on its disk."""

    found: manifest.Found
    holder: int
    host: str


class Checkpointer:
    def __init__(self, config: CheckpointConfig, root: Path, comm: Communicator, reporter: Reporter) -> None:
        self._config = config
        self._root = root
        self._comm = comm
        self._reporter = reporter
        self._timeline = 0
        self._saved: int | None = None
        self._ensure_writable()

    def resume(self, state: TrainingState, before_load: Callable[[], None]) -> bool:
        """Loads the checkpoint that `checkpoint.resume` names into `state`; whether there was one.

        `before_load` is called on all ranks just before, if there is something to load.
        Raises CheckpointError if one was asked for by name and does not verify, or if there are
        checkpoints and none verifies: starting anew by accident would cost more than asking.
        """
        chosen = self._choose()
        if chosen is None:
            return False
        before_load()
        state.load(Path(chosen.found.path), self._comm, chosen.holder)
        self._saved = state.step if self._timeline == chosen.found.timeline else None
        where = f" on {chosen.host}" if self._comm.active else ""
        self._reporter.say(f"resuming from step {state.step} ({chosen.found.path}{where})")
        return True

    def save(self, state: TrainingState) -> None:
        """Writes a checkpoint of this step, unless it was the last one written.

        A failure to write leaves the older checkpoints; it is a warning, or with `on_failure: stop` a
        CheckpointError on every rank.
        """
        if self._saved == state.step:
            return
        began = time.perf_counter()
        rngs = self._comm.gather(rng_state(self._comm.device))
        failure: str | None = None
        if self._comm.env.is_main:
            try:
                path, size = manifest.write(
                    self._root,
                    state.step,
                    lambda folder: state.write(folder, rngs),
                    timeline=self._timeline,
                    world=self._comm.world_size,
                    layout=self._config.type,
                )
                manifest.retain(self._root, self._config.keep_last)
            except Exception as error:  # OSError, and what torch and safetensors make of a full disk
                why = _why(error, self._root)
                failure = f"checkpoint at step {state.step} could not be written to {self._root}: {why}"
        failure = self._comm.broadcast(failure)
        seconds = time.perf_counter() - began
        if failure is None:
            self._saved = state.step
            if self._comm.env.is_main:
                self._reporter.checkpoint(path, size, seconds, seconds)
        elif self._config.on_failure == "stop":
            raise CheckpointError(failure, hint="Free space, or set checkpoint.on_failure=warn to train on.")
        else:
            self._reporter.say(f"warning: {failure}; older checkpoints are kept, training goes on")

    def _ensure_writable(self) -> None:
        reason = None
        if self._comm.env.is_main:
            try:
                self._root.mkdir(parents=True, exist_ok=True)
                if not os.access(self._root, os.W_OK):
                    reason = "not writable"
            except OSError as error:
                reason = error.strerror or str(error)
        reason = self._comm.broadcast(reason)
        if reason:
            raise CheckpointError(f"checkpoint folder {self._root}: {reason}")

    def _choose(self) -> Chosen | None:
        """The same answer on every rank. Hashes are checked newest first, by one holder at a time."""
        env, wanted = self._comm.env, self._config.resume
        # each node's disk is looked at by one rank; on shared storage all nodes see the same
        local = manifest.scan(self._root) if env.is_node_main else ([], [])
        listings = self._comm.gather((os.uname().nodename, *local))
        timelines = [found.timeline for _, there, _ in listings for found in there]
        if wanted == "auto":
            chosen, passed_over = self._verify_newest(listings)
        else:
            self._timeline = max(timelines) + 1 if timelines else 0
            if wanted == "none":
                return None
            chosen, passed_over = self._verify_newest(self._comm.gather(self._named(wanted)))
        for reason in passed_over:
            self._reporter.say(f"passed over: {reason}")
        if chosen is None:
            if wanted != "auto" or passed_over:
                raise CheckpointError(
                    f"no checkpoint verifies: {'; '.join(passed_over) or wanted}",
                    hint="checkpoint.resume=none starts anew and leaves these checkpoints until retention.",
                )
            return None
        if wanted == "auto":
            self._timeline = chosen.found.timeline
        return chosen

    def _named(self, wanted: str) -> tuple[str, list[manifest.Found], list[str]]:
        """This node's listing of the one checkpoint that `checkpoint.resume` names."""
        host = os.uname().nodename
        if not self._comm.env.is_node_main:
            return host, [], []
        path = Path(wanted) if "/" in wanted else self._root / wanted
        try:
            head = manifest.read(path)
        except CheckpointError as error:
            return host, [], [error.message]
        return host, [manifest.Found(int(head["timeline"]), int(head["step"]), str(path))], []

    def _verify_newest(
        self, listings: list[tuple[str, list[manifest.Found], list[str]]]
    ) -> tuple[Chosen | None, list[str]]:
        several = len({host for host, _, _ in listings}) > 1
        prefix = [f"{host}: " if several else "" for host, _, _ in listings]
        passed_over = [prefix[rank] + reason for rank, (_, _, bad) in enumerate(listings) for reason in bad]
        candidates = [(found, rank) for rank, (_, there, _) in enumerate(listings) for found in there]
        for found, rank in sorted(candidates, key=lambda item: (-item[0].timeline, -item[0].step, item[1])):
            reason: str | None = None
            if self._comm.env.rank == rank:
                try:
                    manifest.verify(Path(found.path))
                except CheckpointError as error:
                    reason = error.message
            reason = self._comm.broadcast(reason, rank)
            if reason is None:
                return Chosen(found, rank, listings[rank][0]), passed_over
            passed_over.append(prefix[rank] + reason)
        return None, passed_over


def _why(error: BaseException, root: Path) -> str:
    """The system's reason if there is one below torch's or safetensors' own words, and the space left."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    reason = (cause.strerror if cause else None) or " ".join(str(error).split())
    try:
        free = shutil.disk_usage(root).free
    except OSError:
        return reason
    return f"{reason} ({free / 1e6:,.1f} MB free)"
