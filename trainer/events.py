"""The event stream: `events/rank-R.jsonl` in the run folder, one JSON object per line.

Every line has `schema, kind, time, attempt, rank, step`; see docs/contracts.md for the rest. A line is
written with one system call, so a reader never sees a torn one, and a kill loses at most the line that
was not yet written.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCHEMA = 1


class Events:
    """Writes one rank's events; thread-safe. `step` is the number of finished optimizer steps."""

    def __init__(
        self, run_dir: Path, rank: int, attempt: int, clock: Callable[[], float] = time.time
    ) -> None:
        self.step = 0
        self._rank = rank
        self._attempt = attempt
        self._clock = clock
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        folder = run_dir / "events"
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank-{rank}.jsonl"
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def emit(self, kind: str, **fields: Any) -> None:
        """Appends one event. NaN and infinities become null: they are not JSON."""
        head = {"schema": SCHEMA, "kind": kind, "time": round(self._clock(), 6)}
        row = {**head, "attempt": self._attempt, "rank": self._rank, "step": self.step, **_finite(fields)}
        line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")
        with self._lock:
            if self._file < 0:
                return
            with contextlib.suppress(OSError):  # a full disk must not end the training, nor hide its error
                os.write(self._file, line)

    def heartbeats(self, interval: float) -> None:
        """Starts the thread that emits `heartbeat` every `interval` seconds until `close`."""

        def beat() -> None:
            while not self._stopped.wait(interval):
                self.emit("heartbeat")

        threading.Thread(target=beat, name="heartbeat", daemon=True).start()

    def error(self, error: BaseException) -> None:
        """The event that the operator's `orch why` reads."""
        text = "".join(traceback.format_exception(error))
        self.emit("error", type=type(error).__name__, message=str(error), traceback=text)

    def close(self) -> None:
        self._stopped.set()
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in fields.items()
    }
