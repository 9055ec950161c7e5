"""Brings a run's files home: the log, events and results of every node, and checkpoints if asked."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from orchestrator.backends.base import Backend, Found
from orchestrator.connect.base import Stream
from orchestrator.errors import ConnectionLost, OrchError, RemoteError, UsageError, unknown
from orchestrator.specs import Node
from orchestrator.workflows.locate import Located

RECORDS = ("job.json", "config.yaml", "result.json", "log", "log.index", "events", "errors", "tensorboard")
SILENCE_S = 60.0


@dataclass(frozen=True)
class Pulled:
    files: int
    bytes: int


def pull_run(located: Located, to: Path, checkpoint: str | None, *, notify: Callable[[str, str], None]) -> Pulled:
    """Fetches into `to/<node>/`; each node's folder appears only when all of it has arrived.

    `checkpoint` is None, `latest`, `all` or a step. Raises UsageError if no node has that checkpoint.
    """
    found, nodes, backend = located.found, located.nodes, located.backend
    steps = _steps(located) if checkpoint else {}
    wanted = {node.name: _chosen(steps.get(node.name, ()), checkpoint) for node in nodes}
    if checkpoint and not any(wanted.values()):
        have = sorted({step for each in steps.values() for step in each})
        if not have:
            raise UsageError(f"{found.run.id} has no checkpoint on any of its nodes")
        raise UsageError(unknown("checkpoint", checkpoint, have))
    to.mkdir(parents=True, exist_ok=True)

    def one(node: Node) -> Pulled:
        paths = [*RECORDS, *(f"checkpoints/{step}" for step in wanted[node.name])]
        got = _fetch(backend, found, node, paths, to)
        notify(node.name, f"{got.files} files" + (f", {', '.join(wanted[node.name])}" if wanted[node.name] else ""))
        return got

    with ThreadPoolExecutor(max(1, len(nodes))) as pool:  # all of them, also when one fails: map() would cancel
        futures = {node.name: pool.submit(one, node) for node in nodes}
    failed = {name: error for name, future in futures.items() if (error := future.exception()) is not None}
    for name, error in list(failed.items())[1:]:
        notify(name, str(error))
    for error in failed.values():
        raise error
    results = [future.result() for future in futures.values()]
    return Pulled(sum(each.files for each in results), sum(each.bytes for each in results))


def _steps(located: Located) -> dict[str, list[str]]:
    """Whole checkpoints on each node (a manifest is written last), oldest first."""
    return {
        node.name: sorted(located.backend.checkpoints(located.found, node), key=_step_number) for node in located.nodes
    }


def _step_number(name: str) -> int:
    digits = "".join(char for char in name if char.isdigit())
    return int(digits or 0)


def _chosen(steps: list[str] | tuple[str, ...], checkpoint: str | None) -> list[str]:
    if not checkpoint or not steps:
        return []
    if checkpoint == "all":
        return list(steps)
    if checkpoint == "latest":
        return [steps[-1]]
    return [step for step in steps if checkpoint in (step, str(_step_number(step)))]


def _fetch(backend: Backend, found: Found, node: Node, paths: list[str], to: Path) -> Pulled:
    staging, final = to / f".{node.name}.part", to / node.name
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    reader = _StreamFile(backend.fetch(found, node, paths), node.name)
    try:
        count = size = 0
        with tarfile.open(fileobj=reader, mode="r|") as tar:
            for entry in tar:
                tar.extract(entry, staging, filter="data")
                count += entry.isfile()
                size += entry.size
        reader.finish()
        shutil.rmtree(final, ignore_errors=True)
        staging.rename(final)
    except tarfile.TarError as error:
        raise RemoteError(f"the archive broke off: {error}", node=node.name) from error
    except OSError as error:
        raise OrchError(
            f"cannot write to {to}: {error.strerror or error}", hint="free disk here, or give --to"
        ) from error
    finally:
        reader.close()
        shutil.rmtree(staging, ignore_errors=True)
    return Pulled(count, size)


class _StreamFile:
    """A stream as the file that tarfile reads; silence for a minute is a lost connection."""

    def __init__(self, stream: Stream, node: str) -> None:
        self._stream, self._node, self._buffer, self._ended = stream, node, bytearray(), False

    def read(self, size: int) -> bytes:
        while len(self._buffer) < size and not self._ended:
            chunk = self._stream.read(SILENCE_S)
            if chunk is None:
                raise ConnectionLost(f"no data for {SILENCE_S:.0f} s", node=self._node)
            self._ended = chunk == b""
            self._buffer += chunk
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def finish(self) -> None:
        """Reads what follows the archive. Raises RemoteError if the command failed."""
        while self.read(1 << 16):
            pass
        if self._stream.returncode != 0:
            why = (self._stream.stderr.strip().splitlines() or ["nothing to fetch"])[-1]
            raise RemoteError(f"fetching failed: {why}", node=self._node)

    def close(self) -> None:
        self._stream.close()
