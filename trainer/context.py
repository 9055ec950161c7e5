"""What every task gets: who this rank is, the configuration, the folders, the event stream."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainer.config import Config
from trainer.distributed.env import RankEnv
from trainer.events import Events
from trainer.stop import StopRequest


@dataclass(frozen=True)
class Folders:
    run: Path
    checkpoints: Path
    cache: Path
    """Shared by all runs on this node."""

    @classmethod
    def read(cls, environ: Mapping[str, str], name: str) -> Folders:
        """ORCH_RUN_DIR and ORCH_CHECKPOINT_DIR, else `./runs/<name>` and `checkpoints` in it.

        The cache is ORCH_CACHE_DIR, else a folder in HF_HOME, else in ~/.cache, else in the run folder.
        """
        run = Path(environ.get("ORCH_RUN_DIR") or Path("runs") / name).absolute()
        checkpoints = Path(environ.get("ORCH_CHECKPOINT_DIR") or run / "checkpoints").absolute()
        return cls(run, checkpoints, _cache(environ, run))


def _cache(environ: Mapping[str, str], run: Path) -> Path:
    candidates = []
    if environ.get("ORCH_CACHE_DIR"):
        candidates.append(Path(environ["ORCH_CACHE_DIR"]))
    if environ.get("HF_HOME"):
        candidates.append(Path(environ["HF_HOME"]) / "orch")
    if environ.get("HOME"):
        candidates.append(Path(environ["HOME"]) / ".cache" / "orch")
    for path in candidates:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(path, os.W_OK):
            return path
    return run / "cache"


@dataclass(frozen=True)
class Context:
    env: RankEnv
    config: Config
    folders: Folders
    events: Events
    stop: StopRequest


@dataclass(frozen=True)
class Outcome:
    """How a task ended: `status` is `succeeded` or `preempted`."""

    status: str
    step: int
    loss: float | None = None
    """Held-out loss per token at the end, where it was evaluated."""
