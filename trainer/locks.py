"""Waiting with a deadline and a word about what for: for a condition, or for a lock between processes of a node."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import DeadlineError

POLL = 0.05
"""Seconds between two looks."""


def wait_for(condition: Callable[[], bool], timeout: float, say: Callable[[str], None], what: str) -> None:
    """Returns once `condition()` holds; says once that it waits for `what`.

    Raises DeadlineError after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    told = False
    while not condition():
        if time.monotonic() > deadline:
            raise DeadlineError(f"waited {timeout:g} s for {what}")
        if not told:
            say(f"waiting for {what}")
            told = True
        time.sleep(POLL)


@contextmanager
def locked(path: Path, timeout: float, say: Callable[[str], None], what: str) -> Iterator[None]:
    """Holds an flock on `path` (made if missing, never deleted); the kernel frees it when the holder dies.

    `what` names the lock for a waiting process: "another run's download of …". Raises DeadlineError after
    `timeout` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def attempt() -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False

    try:
        wait_for(attempt, timeout, say, what)
        yield
    finally:
        os.close(handle)
