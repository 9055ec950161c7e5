"""The request to stop: the file `stop` in the run folder, or SIGTERM."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType


class StopRequest:
    """What this rank knows; the loop makes all ranks agree before it acts on it."""

    def __init__(self, run_dir: Path) -> None:
        self._file = str(run_dir / "stop")
        self._signalled = False

    def listen(self) -> None:
        """Makes SIGTERM a request to stop instead of the end of the process (main thread only)."""
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    @property
    def requested(self) -> bool:
        return self._signalled or os.path.exists(self._file)

    @property
    def reason(self) -> str:
        """Why, as far as this rank knows."""
        if self._signalled:
            return "SIGTERM"
        return f"{self._file} exists" if os.path.exists(self._file) else "on another rank"
