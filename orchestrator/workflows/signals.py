"""What INT, TERM and HUP mean in each phase of a deploy.

Before all nodes are started they raise `Interrupted`, and the deploy rolls everything back. While
that happens they are held. Afterwards they are only noted: the follower asks for them and decides.
"""

from __future__ import annotations

import signal
import threading
from collections import deque
from types import FrameType

from orchestrator.errors import Interrupted

_WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """A context manager that owns the three signals; outside the main thread it does nothing."""

    def __init__(self) -> None:
        self._raising = True
        self._noted: deque[int] = deque()
        self._previous: dict[int, object] = {}
        self.arrived = threading.Event()

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {each: signal.signal(each, self._handle) for each in _WATCHED}
        return self

    def __exit__(self, *exception: object) -> None:
        for each, handler in self._previous.items():
            signal.signal(each, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._raising:
            self._raising = False  # a second signal must not break the rollback that the first began
            raise Interrupted(f"interrupted by {signal.Signals(signum).name}", signum=signum)
        self._noted.append(signum)
        self.arrived.set()

    def hold(self) -> None:
        """From now on signals are noted, not raised."""
        self._raising = False

    def take(self) -> int | None:
        """The oldest noted signal, or None."""
        try:
            signum = self._noted.popleft()
        except IndexError:
            self.arrived.clear()
            return None
        return signum
