"""Notices that no step ends any more, and writes down what every thread of every rank is doing."""

from __future__ import annotations

import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from trainer.events import Events

HISTORY = 100
"""Steps whose median is the usual step time."""


class Watchdog:
    """A thread of each rank. A rank that hangs stops the others in their collectives, so all of them dump.

    When no step has ended for max(`floor`, `factor` × the median step time) seconds it appends the stacks of all
    threads to `stacks/rank-R.txt` in the run folder, emits the event `hang` (seconds, file) and writes one line to
    stderr; once for each hang: the next step arms it again. It never ends the run: collectives have deadlines.

    Armed by the end of the first step, whose own time (compilation, first allocations) counts only until there is
    another. Not armed within `pause`: evaluations and checkpoints have no usual time.
    """

    def __init__(self, run_dir: Path, rank: int, events: Events, *, factor: float, floor: float) -> None:
        """`factor` 0: never."""
        self._file = run_dir / "stacks" / f"rank-{rank}.txt"
        self._rank = rank
        self._events = events
        self._factor = factor
        self._floor = floor
        self._times: deque[float] = deque(maxlen=HISTORY)
        self._steps = 0
        self._began: float | None = None  # when waiting for the next step began; None: not armed
        self._pauses = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if factor > 0:
            self._thread.start()

    def step(self, seconds: float) -> None:
        """A step has ended that took `seconds`."""
        with self._changed:
            self._steps += 1
            if self._steps == 2:
                self._times.clear()
            self._times.append(seconds)
            self._began = time.monotonic()
            self._changed.notify()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around what has no usual time. Waiting for the next step begins anew after it."""
        with self._changed:
            self._pauses += 1
            self._began = None
        try:
            yield
        finally:
            with self._changed:
                self._pauses -= 1
                if self._steps and not self._pauses:
                    self._began = time.monotonic()
                    self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def limit(self) -> float:
        """Seconds without a step that count as a hang."""
        return max(self._floor, self._factor * statistics.median(self._times or [0.0]))

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                if self._began is None:
                    self._changed.wait()
                    continue
                passed = time.monotonic() - self._began
                if passed < self.limit:
                    self._changed.wait(self.limit - passed)
                    continue
                self._began = None
                self._report(passed)

    def _report(self, seconds: float) -> None:
        with contextlib.suppress(OSError):  # a full disk must not end the training
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"\nno step for {seconds:.1f} s after step {self._events.step}, {time.ctime()}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        self._events.emit("hang", seconds=round(seconds, 3), file=str(self._file))
        print(
            f"warning: rank {self._rank}: no step for {seconds:.0f} s (usual:"
            f" {statistics.median(self._times):.2f} s); the stacks of all threads are in {self._file}",
            file=sys.stderr,
            flush=True,
        )
